"""A first sweep, for a laptop: three sizes on three amounts of the interpreter's own standard library, in minutes."""

from lm_jax import config
from lm_jax.scaling import grid, ladder


def get_config():
    c = config.default()
    c.name = "tiny"
    c.model.update(ladder.shape(c, 2))  # 128 wide: the size whose learning rate this is
    c.model.dtype = "float32"  # CPUs compute bfloat16 in slow motion
    c.data.tokenizer = "byte"  # the loss of one size can be compared with that of another's on any text
    c.data.length = 128
    c.data.validation = 0.005  # every run ends with all of it
    c.optim.lr = 4e-3
    c.optim.warmup = 25
    c.train.steps = 250
    c.train.batch = 8  # a thousand bytes, a quarter of a million in all
    c.train.eval_every = c.train.checkpoint_every = 1000
    return c


def get_points(c):
    models = [ladder.shape(c, depth) for depth in (1, 2, 3)]
    return grid.tokens(c, models, (100e3, 200e3, 400e3))
