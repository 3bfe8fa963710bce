"""GPT-2 small's shape on 2.5B tokens, 20 a parameter: a first serious run."""

from lm_jax import config
from lm_jax.models import zoo


def get_config():
    c = config.default()
    c.name = "125m"
    c.model.update(zoo.get("gpt2-small"))
    c.model.vocab = 0  # the tokenizer trained here
    c.data.sources = "parquet:corpora/fineweb-edu/*.parquet#text"
    c.data.vocab = 50_304  # a multiple of 128 next to the published 50257
    c.data.length = 1024
    c.data.validation = 0.001
    c.optim.lr = 6e-4  # Brown et al. 2020, table 2.1
    c.optim.warmup = 250
    c.train.steps = 4_800
    c.train.batch = 512  # half a million tokens a step
    c.train.microbatches = 8  # 64 rows at a time; more memory or more devices need fewer parts
    c.train.z_loss = 1e-4  # keeps bfloat16 logits from drifting (PaLM)
    c.train.log_every = 10
    c.train.eval_rows = 2_048
    return c
