"""Which row of which source is the k-th: pure functions of k that need no state and no table of the corpus.

A mixture is cut into stretches of constant weights: a stretch ends where a stage of the config ends, or where a source
has been repeated as often as it may. Within a stretch, sources take turns so evenly that after any number of rows each
is within a row or so of its share.
"""

from typing import NamedTuple

import numpy as np

from lm_jax import checks
from lm_jax.errors import ConfigError

ONE = 1 << 24  # weights are integers in units of 1/ONE, so that counts are exact for 2^39 rows
BLOCK, POOL = 32, 512  # rows read in one go; blocks that are shuffled together: the page cache holds one pool


class Stretch(NamedTuple):
    start: int  # first k
    spent: np.ndarray  # rows that each source gave before
    shares: np.ndarray  # of each source among itself and those after it, in units of 1/ONE


def schedule(rows: list[int], weights: tuple, *, epochs: tuple, needed: int) -> list[Stretch]:
    """Stretches for k < needed, over sources of so many rows.

    `weights` is a number per source, or rows (start fraction of the run, number per source), or () for shares by size.
    A source is given at most its epochs x its rows (one number for all, or one each; 0 or (): no cap); what it would
    have had then goes to the others.
    Raises ConfigError on weights that make no sense, and if the sources are spent before `needed` rows.
    """
    caps = _caps(epochs, rows)
    stages = _stages(weights, rows)
    stretches, spent = [], np.zeros(len(rows), np.int64)
    for (start, weight), (end, _) in zip(stages, [*stages[1:], (1.0, None)]):
        k, stop = round(start * needed), round(end * needed)
        while k < stop:
            able = np.where(spent < caps, weight, 0)
            if not able.any():
                raise ConfigError(
                    f"data.epochs={epochs} leaves no text after row {k:,} of the {needed:,} that train.steps x "
                    f"train.batch needs: {len(rows)} sources have {sum(rows):,} rows, at most "
                    f"{caps[weight > 0].sum():,} with repeats. Raise data.epochs, add text, or train for fewer steps")
            stretch = Stretch(k, spent, _shares(able))
            k = min(stop, k + _until(stretch, caps - spent, stop - k))
            stretches.append(stretch)
            spent = spent + counts(stretch, np.array([k - stretch.start]))[0]
    return stretches


def rows(stretches: list[Stretch], k: np.ndarray, *, sizes: list[int], keys: list[int]
         ) -> tuple[np.ndarray, np.ndarray]:
    """(source, row of that source) of the rows k; of each source its rows and the key of its shuffle."""
    source, index = locate(stretches, k)
    for s, (size, key) in enumerate(zip(sizes, keys)):
        here = source == s
        if here.any():
            index[here] = shuffled(index[here], size, key)
    return source, index


def locate(stretches: list[Stretch], k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(source, how many of its rows came before) of the rows k."""
    source, index = np.empty(len(k), np.int64), np.empty(len(k), np.int64)
    which = np.searchsorted([stretch.start for stretch in stretches], k, side="right") - 1
    for i in np.unique(which):
        here, stretch = which == i, stretches[i]
        before, after = (counts(stretch, k[here] - stretch.start + more) for more in (0, 1))
        source[here] = (after - before).argmax(1)
        index[here] = (before + stretch.spent)[np.arange(here.sum()), source[here]]
    return source, index


def counts(stretch: Stretch, n: np.ndarray) -> np.ndarray:
    """[len(n), sources]: rows of each source among a stretch's first n.

    The first source takes its even share, the next its share of what that leaves, and so on.
    """
    left, columns = n.astype(np.int64), []
    for share in stretch.shares:
        taken = (left * share + ONE // 2) // ONE
        columns.append(taken)
        left = left - taken
    return np.stack(columns, 1)


def shuffled(index: np.ndarray, rows: int, key: int) -> np.ndarray:
    """The row that a source of `rows` rows gives as its `index`-th: another permutation each epoch.

    Blocks of neighbours are shuffled over the whole source, then rows within a pool of blocks. A random turn of the
    circle first gives the last, short block a new place.
    """
    epoch, i = np.divmod(index, rows)
    keys = _mix(np.uint64(key) ^ _mix(epoch.astype(np.uint64)))
    i = (i + (keys % np.uint64(rows)).astype(np.int64)) % rows
    whole = rows // BLOCK
    pool = np.minimum(i // (BLOCK * POOL), max(0, whole - 1) // POOL)  # the short block belongs to the last pool
    first = pool * POOL
    size = np.where(pool == max(0, whole - 1) // POOL, rows - first * BLOCK, BLOCK * POOL)
    within = permuted(i - first * BLOCK, size, _mix(keys ^ (pool + 1).astype(np.uint64)))
    block = first + within // BLOCK
    if whole > 1:
        full = block < whole
        block[full] = permuted(block[full], np.full(full.sum(), whole), keys[full])
    return block * BLOCK + within % BLOCK


def permuted(i: np.ndarray, size: np.ndarray, key: np.ndarray) -> np.ndarray:
    """A permutation of range(size) at i: a Feistel network on enough bits, walked until it is back in range."""
    half = (np.maximum(1, np.ceil(np.log2(np.maximum(size, 2)))).astype(np.uint64) + np.uint64(1)) // np.uint64(2)
    low = (np.uint64(1) << half) - np.uint64(1)
    out, todo = i.astype(np.uint64), np.arange(len(i))
    while len(todo):
        left, right = out[todo] >> half[todo], out[todo] & low[todo]
        for turn in range(4):
            left, right = right, left ^ (_mix(right ^ key[todo] ^ np.uint64(turn << 60)) & low[todo])
        out[todo] = left << half[todo] | right
        todo = todo[out[todo] >= size[todo].astype(np.uint64)]
    return out.astype(np.int64)


def _mix(x):
    """splitmix64's finaliser: each bit of the result hangs on each bit of x."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _caps(epochs, rows):
    """Most rows of each source."""
    for problem in checks.epochs(epochs, len(rows)):
        raise ConfigError(problem)
    each = epochs * len(rows) if len(epochs) == 1 else epochs or (0,) * len(rows)
    return np.array([int(most * n) if most else np.iinfo(np.int64).max for most, n in zip(each, rows)])


def _stages(weights, rows):
    """[(start fraction, weight of each source)]."""
    for problem in checks.weights(weights, len(rows)):
        raise ConfigError(problem)
    if not weights:
        return [(0.0, np.array(rows, float))]
    stages = weights if isinstance(weights[0], tuple) else ((0.0, *weights),)
    return [(stage[0], np.array(stage[1:], float)) for stage in stages]


def _shares(weight):
    """Each weight over the sum of itself and those after it; never so small that a source is forgotten."""
    rest = np.cumsum(weight[::-1])[::-1]
    share = np.round(np.divide(weight, rest, out=np.zeros(len(weight)), where=rest > 0) * ONE).astype(np.int64)
    return np.where(weight > 0, np.maximum(share, 1), 0)


def _until(stretch, room, most):
    """Rows until the first source has none left of its `room`, at most `most`."""
    low, high = 0, most  # no source is beyond its room after `low` rows
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if (counts(stretch, np.array([middle]))[0] <= room).all() else (low, middle - 1)
    return low
