"""1.1B parameters on 23B tokens, 20 a parameter, for a slice of TPUs or a node of GPUs."""

from lm_jax import config
from lm_jax.models import zoo


def get_config():
    c = config.default()
    c.name = "1b"
    c.model.update(zoo.get("llama-1b"))
    c.model.heads, c.model.head_size = 16, 128  # the published 32 x 64 fill half of a 128-wide matrix unit
    c.model.vocab = 0  # the tokenizer trained here
    c.model.qk_norm = True  # allows the larger learning rate (Wortsman et al. 2023)
    c.model.remat = "dots"
    c.data.sources = "parquet:corpora/fineweb-edu/*.parquet#text"
    c.data.vocab = 32_000
    c.data.length = 2048
    c.data.validation = 0.0005
    c.optim.lr = 1e-3
    c.optim.schedule = "wsd"  # at the peak until the last fifth of the steps, which cools down
    c.optim.warmup = 1_000
    c.optim.spike = 6.0
    c.train.steps = 11_000
    c.train.batch = 1_024  # two million tokens a step
    c.train.z_loss = 1e-4
    c.train.log_every = 10
    c.train.eval_rows = 4_096
    return c
