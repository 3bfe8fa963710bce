"""Small points of a sweep trained side by side, as a sweep does, against the same points one after another."""

from dataclasses import replace

import jax
import numpy as np

from lm_jax import optim, update
from lm_jax.config import Config, DataConfig, OptimConfig, TrainConfig, TransformerConfig
from lm_jax.measure import timing
from lm_jax.measure.figures import Figure, duration, rate
from lm_jax.models import flops, transformer, zoo
from lm_jax.models.layers import kinds
from lm_jax.recipes import pretrain
from lm_jax.scaling import abreast

POINTS = 8
LAST = 1000  # steps of the runs, of which some are timed


def config(params: float = 1e6, *, vocab: int = 512, length: int = 128, batch: int = 8) -> Config:
    """A point of a sweep: so many parameters without embeddings, small batches."""
    model = TransformerConfig(**zoo.ladder(params=params), vocab=vocab, dtype="float32")
    return Config(model=model, data=DataConfig(length=length), train=TrainConfig(batch=batch, steps=LAST),
                  optim=OptimConfig(warmup=9))


def measured(c: Config | None = None, *, points: int = POINTS, steps: int = 4, turns: int = timing.TURNS
             ) -> list[Figure]:
    """Both ways, in turns, everything compiled: the same steps of the same points."""
    c = c or config()
    alone, (together, way) = _alone(c, points, steps), _together(c, points, steps)
    seconds = timing.interleaved({"together": together, "one after another": alone}, turns=turns)
    tokens = points * steps * c.train.batch * c.data.length
    count = flops.parameters(c.model)
    what = (f"{points} points of {count['non_embedding']:,} parameters without embeddings, {c.train.batch} rows of "
            f"{c.data.length}")
    return [*(rate(name, tokens, times, "tokens/s", what) for name, times in seconds.items()),
            *(duration(f"  a step of all, {name}", [s / steps for s in times], how)
              for (name, times), how in zip(seconds.items(), (way, "each by its own program"))),
            timing.times_as_fast("together is as fast as one after another, times", *seconds.values())]


def begun(c: Config, points: int) -> list[update.State]:
    """States of points of several seeds before their first steps."""
    models = [transformer.make(c.model, seed=seed) for seed in range(points)]
    tx = optim.make(c.optim, LAST, kinds(models[0]))
    return [update.begin(model, tx) for model in models]


def batch(c: Config, seed: int = 0) -> dict:
    """Rows of random ids, one document each."""
    rng, shape = np.random.default_rng(seed), (c.train.batch, c.data.length)
    ids = rng.integers(0, c.model.vocab, shape, np.int32)
    return {"tokens": ids, "targets": np.roll(ids, -1, 1), "weights": np.ones(shape, np.float32),
            "positions": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape).copy(),
            "segments": np.ones(shape, np.int32)}


def _alone(c: Config, points: int, steps: int):
    """As `train` runs them: one program, sent a step at a time, a point after the other."""
    states, rows = begun(c, points), jax.device_put(batch(c))
    tx, rate = optim.make(c.optim, LAST, kinds(states[0].model)), optim.schedule(c.optim, LAST)
    step, key = jax.jit(update.make_step(pretrain.loss(c), tx, rate), donate_argnums=0), jax.random.key(0)

    def run():
        for r in range(points):
            for _ in range(steps):
                states[r], _ = step(states[r], rows, key)
            jax.block_until_ready(states[r])

    return run


def _together(c: Config, points: int, steps: int):
    """As a sweep runs them: so many steps of all in one call, from rows in host memory to metrics there."""
    configs = [replace(c, seed=seed) for seed in range(points)]
    runs = abreast.begin(configs, begun(c, points), room=steps)
    rows = dict.fromkeys(range(points), jax.tree.map(lambda a: np.concatenate([a] * steps), batch(c)))
    return lambda: runs.metrics(runs.advance(rows, of=LAST, count=steps)), str(runs)
