"""BERT base, as published, with both of its objectives, at the full length from the start.

The `tfds:` set must already lie prepared in $TFDS_DATA_DIR: making it needs TensorFlow or Beam."""

from lm_jax import config
from lm_jax.models import zoo


def get_config():
    c = config.default()
    c.name = "bert_base"
    c.model.update(zoo.get("bert-base"))
    c.model.vocab = 0  # the tokenizer trained here
    c.data.sources = "tfds:wikipedia/20230601.en:train#text"
    c.data.vocab = 30_522
    c.data.objective = "masked_pairs"
    c.data.validation = 0.005
    c.optim.lr = 1e-4  # Devlin et al. 2019, A.2, to the end of this block
    c.optim.schedule = "linear"
    c.optim.floor = 0.0
    c.optim.warmup = 10_000
    c.optim.betas = (0.9, 0.999)
    c.optim.eps = 1e-6
    c.optim.weight_decay = 0.01
    c.train.steps = 1_000_000
    c.train.batch = 256
    c.train.log_every = 100
    c.train.eval_every = c.train.checkpoint_every = 5_000
    c.train.eval_rows = 2_048
    return c
