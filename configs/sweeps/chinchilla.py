"""IsoFLOP profiles of Hoffmann et al. 2022 (approach 2, and with 3 the same runs), at sizes for one host or slice.

Ten sizes from 1.6M to 400M parameters outside the tables, at five budgets; at each those with 3 to 300 tokens a
parameter, so that every valley has sizes on both sides of its bottom. Rates transfer by muP from the base; find the
base's own first, with `grid.rates` around it.
"""

from lm_jax import config
from lm_jax.scaling import grid, ladder


def get_config():
    c = config.default()
    c.name = "chinchilla"
    c.model.base_width, c.model.base_depth, c.model.head_size = 512, 8, 64
    c.model.update(ladder.shape(c, 8))
    c.model.remat = "full"
    c.model.qk_norm = True  # allows the larger learning rate (Wortsman et al. 2023)
    c.data.sources = "parquet:corpora/fineweb-edu/*.parquet#text"
    c.data.vocab = 32_000
    c.data.length = 1024
    c.data.validation = 0.001
    c.optim.lr = 3e-3
    c.optim.warmup = 100
    c.optim.floor = 0.0  # a run is charged for all it can reach
    c.train.steps = 4_000
    c.train.batch = 256  # a quarter of a million tokens
    c.train.z_loss = 1e-4
    c.train.log_every = 10
    c.train.eval_rows = 2_048
    return c


def get_points(c):
    models = [ladder.shape(c, depth) for depth in (3, 4, 5, 6, 8, 10, 12, 14, 17, 20)]
    return grid.isoflop(c, models, (1e17, 3e17, 1e18, 3e18, 1e19), between=(3, 300))
