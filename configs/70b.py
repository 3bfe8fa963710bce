"""Llama 3 70B's shape on 1.4T tokens, 20 a parameter, for some 512 accelerators or more."""

from lm_jax import config
from lm_jax.models import zoo


def get_config():
    c = config.default()
    c.name = "70b"
    c.model.update(zoo.get("llama-70b"))
    c.model.remat = "full"
    c.data.sources = "parquet:corpora/web/*.parquet#text; parquet:corpora/code/*.parquet#text; jsonl:corpora/math/*.zst"
    c.data.weights = ((0.0, 0.80, 0.15, 0.05), (0.8, 0.50, 0.30, 0.20))  # the cool-down sees more code and mathematics
    c.data.epochs = (4.0,)  # as good as new up to four times (Muennighoff et al. 2023)
    c.data.tokenizer = "corpora/llama3/tokenizer.json"
    c.data.length = 8192
    c.data.validation = 0.00002
    c.optim.lr = 1.5e-4  # Dubey et al. 2024, table 3
    c.optim.schedule = "wsd"
    c.optim.warmup = 2_000
    c.optim.spike = 6.0
    c.train.steps = 336_000
    c.train.batch = 512  # four million tokens a step
    c.train.z_loss = 1e-4
    c.train.log_every = 10
    c.train.eval_every = c.train.checkpoint_every = 1_000
    c.train.eval_rows = 4_096
    c.mesh.model = 4  # a chip's share of a layer's activations, and the rows: 512 over 512 / 4
    return c
