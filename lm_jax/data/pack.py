"""Packing: which window of which document goes into which row, decided once, offline, one shard at a time.

A document of N stored tokens offers N - overlap positions, and a row has `window` of them. A segment is
[shard, start, length]: `length` tokens, that is length - overlap positions, from `start` of a token shard.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np


class Packed(NamedTuple):
    segments: np.ndarray  # int32[n, 3]: shard, start, length
    starts: np.ndarray  # int64[rows that begin here]: index into segments


def pack(shards: Iterable[np.ndarray], *, window: int, overlap: int, strategy: str) -> Iterator[Packed]:
    """One Packed a shard, from the shards' document offsets (int64[documents + 1]); memory is that of one shard.

    "concat" cuts the stream of all documents every `window` positions: each row is full but the last.
    "fit" keeps documents whole where they fit and puts each into the row that it fills best; rows stay within a shard.
    """
    return STRATEGIES[strategy](shards, window, overlap)


def utilisation(positions, rows, window):
    """Share of the rows' positions that hold text."""
    return positions / max(1, rows * window)


def concat(shards, window, overlap):
    """Concat-and-split; a row may begin in one shard and end in the next."""
    done = 0  # positions of all earlier shards
    for shard, offsets in enumerate(shards):
        sizes = np.diff(offsets) - overlap
        starts = done + np.cumsum(sizes) - sizes
        end = done + int(sizes.sum())
        cuts = np.union1d(starts, np.arange(-(-done // window) * window, end, window))
        document = np.searchsorted(starts, cuts, side="right") - 1
        begins = offsets[document] + cuts - starts[document]
        yield Packed(_segments(shard, begins, np.diff(cuts, append=end) + overlap), np.flatnonzero(cuts % window == 0))
        done = end


def fit(shards, window, overlap):
    """Best-fit decreasing (Ding et al. 2024, "Fewer truncations"); documents longer than a row are cut first."""
    for shard, offsets in enumerate(shards):
        sizes = np.diff(offsets) - overlap
        parts = -(-sizes // window)
        document = np.repeat(np.arange(len(sizes)), parts)
        nth = np.arange(len(document)) - np.repeat(np.cumsum(parts) - parts, parts)
        lengths = np.minimum(window, sizes[document] - nth * window)
        rows = best_fit(lengths, window)
        _, first, rows = np.unique(rows, return_index=True, return_inverse=True)
        rows = np.argsort(np.argsort(first))[rows]  # by first document: near on disk, near in order
        order = np.argsort(rows, kind="stable")
        begins = offsets[document] + nth * window
        segments = _segments(shard, begins[order], lengths[order] + overlap)
        yield Packed(segments, np.flatnonzero(np.diff(rows[order], prepend=-1)))


def best_fit(lengths, window):
    """The row of each length: longest first, each into the fullest row that still takes it, else into a new one.

    Equal lengths go together: a row with r left, the fullest that takes s, takes r // s of them at once. So the work
    grows with the number of different lengths, not with the number of documents.
    """
    order = np.argsort(-lengths, kind="stable")
    values, counts = np.unique(-lengths, return_counts=True)
    left = [[] for _ in range(window + 1)]  # rows by the positions they have left, as arrays
    some = np.zeros(window + 1, bool)
    taken, rows = [], 0
    for size, count in zip((-values).tolist(), counts.tolist()):
        while count:
            ahead = some[size:]
            room = size + int(ahead.argmax())
            if some[room]:
                open_rows = np.concatenate(left[room])
                left[room], some[room] = [], False
            else:
                room = window
                open_rows = np.arange(rows, rows + -(-count // (window // size)))
                rows += len(open_rows)
            each = room // size
            full = min(len(open_rows), count // each)
            rest = count % each if full < len(open_rows) else 0
            taken += [np.repeat(open_rows[:full], each), open_rows[full : full + 1].repeat(rest)]
            untouched = full + (rest > 0)
            for group, space in ((open_rows[:full], room - each * size), (open_rows[untouched:], room),
                                 (open_rows[full:untouched], room - rest * size)):
                if len(group):
                    left[space].append(group)
                    some[space] = True
            count -= full * each + rest
    placed = np.empty(len(lengths), np.int64)
    placed[order] = np.concatenate(taken or [np.empty(0, np.int64)])
    return placed


def _segments(shard, begins, lengths):
    if len(begins) and begins[-1] > np.iinfo(np.int32).max:
        raise ValueError(f"token shard {shard} has {begins[-1]} tokens: more than 2^31 fit no int32 offset")
    return np.stack([np.full(len(begins), shard), begins, lengths], 1).astype(np.int32)


STRATEGIES = {"concat": concat, "fit": fit}
