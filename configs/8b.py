"""Llama 3 8B's shape on 160B tokens, 20 a parameter, in a staged mixture, for some 256 accelerators."""

from lm_jax import config
from lm_jax.models import zoo


def get_config():
    c = config.default()
    c.name = "8b"
    c.model.update(zoo.get("llama-8b"))
    c.model.remat = "full"  # the state is small when 256 chips share it, every layer's activations are not
    c.data.sources = "parquet:corpora/web/*.parquet#text; parquet:corpora/code/*.parquet#text; jsonl:corpora/math/*.zst"
    c.data.weights = ((0.0, 0.80, 0.15, 0.05), (0.8, 0.50, 0.30, 0.20))  # the cool-down sees more code and mathematics
    c.data.epochs = (4.0,)  # as good as new up to four times (Muennighoff et al. 2023)
    c.data.tokenizer = "corpora/llama3/tokenizer.json"
    c.data.length = 4096
    c.data.validation = 0.0001
    c.optim.lr = 3e-4  # Dubey et al. 2024, table 3
    c.optim.schedule = "wsd"
    c.optim.warmup = 2_000
    c.optim.spike = 6.0
    c.train.steps = 38_000
    c.train.batch = 1_024  # four million tokens a step, four rows a chip on 256
    c.train.z_loss = 1e-4
    c.train.log_every = 10
    c.train.eval_every = c.train.checkpoint_every = 1_000
    c.train.eval_rows = 4_096
    return c
