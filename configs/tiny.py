"""The first run: a decoder learns the interpreter's own standard library, in minutes on two CPU cores."""

from lm_jax import config
from lm_jax.models import zoo


def get_config():
    c = config.default()
    c.name = "tiny"
    c.model.update(zoo.ladder(depth=3))  # 1.3M parameters and a table
    c.model.dtype = "float32"  # CPUs compute bfloat16 in slow motion
    c.data.vocab = 4096  # half of the default, whose table would outweigh the rest
    c.data.length = 256
    c.model.heads, c.model.head_size = 3, 64  # half the attention of six heads, and no worse here
    c.optim.name = "muon"  # at equal steps 14 % fewer bits per byte than AdamW
    c.optim.lr = 1e-2
    c.optim.warmup = 40
    c.train.steps = 300
    c.train.batch = 8  # many small steps, of 2048 tokens each
    c.train.eval_every = 100
    c.train.eval_rows = 64
    c.train.checkpoint_every = 100
    return c
