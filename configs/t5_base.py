"""T5 base, as published: span corruption on C4 with Adafactor and an inverse square root schedule.

The `tfds:` set must already lie prepared in $TFDS_DATA_DIR: making it needs TensorFlow or Beam."""

from lm_jax import config
from lm_jax.models import zoo


def get_config():
    c = config.default()
    c.name = "t5_base"
    c.model.update(zoo.get("t5-base"))
    c.model.vocab = 0  # the tokenizer trained here
    c.data.sources = "tfds:c4/en:train#text"
    c.data.tokenizer = "unigram"
    c.data.vocab = 32_128
    c.data.objective = "span"
    c.data.validation = 0.0005
    c.optim.name = "adafactor"
    c.optim.lr = 1e-2  # 1 / sqrt(step) from the end of the warm-up on (Raffel et al. 2020, 3.1.2)
    c.optim.schedule = "rsqrt"
    c.optim.warmup = 10_000
    c.optim.weight_decay = 0.0
    c.optim.clip = 0.0  # Adafactor clips each update by itself
    c.train.steps = 524_288  # 34B tokens
    c.train.batch = 128
    c.train.z_loss = 1e-4
    c.train.log_every = 100
    c.train.eval_every = c.train.checkpoint_every = 5_000
    c.train.eval_rows = 2_048
    return c
