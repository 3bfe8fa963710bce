"""How fast rows leave the packed store, by the one thread that makes a run's batches, on one core."""

import collections
import itertools
import math
import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from lm_jax.config import Config, DataConfig
from lm_jax.data import store
from lm_jax.data.loader import Loader
from lm_jax.measure import subject, timing
from lm_jax.measure.figures import Figure, rate
from lm_jax.recipes.pretrain import row_lengths

PRETRAINING = 64, 512  # rows of a batch and their length, which are measured beside the config's own
TOKENS = 2**22  # that are made in a turn, at least


def measured(c: Config, *, turns: int = timing.TURNS) -> list[Figure]:
    """Tokens a second that a run's loader makes of a config's rows, and of its rows in a shape of pretraining.

    In a process of its own, which has one core; the store was just written, so that it is in the system's memory.
    """
    batch, length = PRETRAINING
    larger = replace(c, data=replace(c.data, length=length), train=replace(c.train, batch=batch))
    return [figure for shape in (c, larger) for figure in _figures(shape, turns)]


def _figures(c: Config, turns: int) -> list[Figure]:
    tokens = c.train.batch * sum(row_lengths(c))
    count = math.ceil(TOKENS / tokens)
    with tempfile.TemporaryDirectory() as place:
        data = subject.over_bytes(c, Path(place)).data
        store.prepare(data, say=subject.tell)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
            seconds = alone.submit(_seconds, data, batch=c.train.batch, count=count, turns=turns).result()
    shape = f"{c.train.batch} rows of {c.data.length}"
    how = f"{c.data.strategy}, {c.data.objective}; one thread on one core"
    return [rate(f"loader, {shape}", count * tokens, seconds, "tokens/s", how),
            rate("  batches", count, seconds, "batches/s", f"{tokens:,} tokens each")]


def _seconds(data: DataConfig, *, batch: int, count: int, turns: int) -> list[float]:
    """Seconds of so many batches, one after another."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    packed = store.prepare(data, say=subject.tell)
    steps = count * (turns + timing.WARM)
    batches = Loader(packed, data, batch=batch, seed=0, rows_needed=batch * steps).batches(0, np.arange(batch))
    return timing.alone(lambda: collections.deque(itertools.islice(batches, count), maxlen=0), turns=turns)
