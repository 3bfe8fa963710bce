"""An encoder-decoder that restores corrupted spans of the standard library: T5's objective on a laptop."""

from lm_jax import config
from lm_jax.models import zoo


def get_config():
    c = config.default()
    c.name = "tiny_t5"
    c.model.update(zoo.ladder(depth=3))
    c.model.encoder_depth = 3
    c.model.positions = "relative"  # as in T5
    c.model.dtype = "float32"  # CPUs compute bfloat16 in slow motion
    c.data.vocab = 4096
    c.data.length = 256  # of the source; the target's length follows from noise and span
    c.data.objective = "span"
    c.optim.lr = 2e-3
    c.optim.warmup = 80
    c.train.steps = 800  # a row teaches with its targets only, a quarter of its tokens
    c.train.batch = 16
    c.train.eval_every = 200
    c.train.eval_rows = 64
    c.train.checkpoint_every = 200
    return c
