"""An encoder that fills in masked tokens of the standard library: BERT's objective on a laptop."""

from lm_jax import config
from lm_jax.models import zoo


def get_config():
    c = config.default()
    c.name = "tiny_bert"
    c.model.update(zoo.ladder(depth=3))
    c.model.causal = False
    c.model.head = "mlm"
    c.model.dtype = "float32"  # CPUs compute bfloat16 in slow motion
    c.data.vocab = 4096
    c.data.length = 256
    c.data.objective = "masked"
    c.data.noise = 0.3  # more targets a row; 0.4 beats 0.15 at BERT large's size (Wettig et al. 2023)
    c.optim.lr = 2e-3
    c.optim.warmup = 80
    c.train.steps = 800  # a masked row teaches with a third of its tokens
    c.train.batch = 16
    c.train.eval_every = 200
    c.train.eval_rows = 64
    c.train.checkpoint_every = 200
    return c
