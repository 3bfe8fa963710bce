"""How fast rows leave the packed store, by the one thread that makes a run's batches."""

import itertools
import tempfile
from pathlib import Path

from lm_jax.config import Config
from lm_jax.data import store
from lm_jax.data.loader import Loader
from lm_jax.measure import subject, timing
from lm_jax.measure.figures import Figure, rate
from lm_jax.recipes.pretrain import row_lengths


def measured(c: Config, *, turns: int = timing.TURNS) -> list[Figure]:
    """Tokens a second that the loader makes of a config's rows, each time others; the store was just written, so that
    it is in the system's memory."""
    with tempfile.TemporaryDirectory() as place:
        planned = subject.over_bytes(c, Path(place))
        packed = store.prepare(planned.data, say=subject.tell)
        size = c.train.batch
        loader = Loader(packed, planned.data, batch=size, seed=c.seed, rows_needed=size * planned.train.steps)
        tokens, count = size * sum(row_lengths(planned)), timing.calls(timing.once(lambda: loader.batch(0)))
        steps = itertools.count()
        seconds = timing.alone(lambda: [loader.batch(next(steps)) for _ in range(count)], turns=turns)
    how = f"{size} rows of {c.data.length}, {c.data.strategy}, {c.data.objective}; one thread"
    return [rate("loader", count * tokens, seconds, "tokens/s", how),
            rate("  batches", count, seconds, "batches/s", f"{tokens:,} tokens each")]
