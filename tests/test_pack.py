"""Packing: every position once, rows never over-full, best fit as the textbook has it."""

import itertools

import numpy as np
import pytest

from lm_jax.data.pack import best_fit, pack, utilisation


def documents(shards=3, each=200, longest=90, seed=0):
    rng = np.random.default_rng(seed)
    return [np.append(0, np.cumsum(rng.integers(3, longest, each))) for _ in range(shards)]


def rows_of(shards, **how):
    """Rows as lists of (shard, start, length)."""
    rows = []
    for segments, starts in pack(shards, **how):
        starts = set(starts.tolist())
        for i, segment in enumerate(segments.tolist()):
            if i in starts:
                rows.append([])
            rows[-1].append(segment)
    return rows


@pytest.mark.parametrize("strategy", ["concat", "fit"])
@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("window", [7, 32, 500])
def test_every_position_is_in_exactly_one_row(strategy, overlap, window):
    shards = documents()
    seen = [np.zeros(offsets[-1], int) for offsets in shards]
    for row in rows_of(shards, window=window, overlap=overlap, strategy=strategy):
        assert 0 < sum(length - overlap for _, _, length in row) <= window
        for shard, start, length in row:
            seen[shard][start : start + length - overlap] += 1
            document = np.searchsorted(shards[shard], start, side="right")
            assert start + length <= shards[shard][document]  # never past the document's end
    for counted, offsets in zip(seen, shards):
        expected = np.ones(offsets[-1], int)
        expected[offsets[1:] - 1] = 1 - overlap  # with overlap 1 the last token is only ever a target
        np.testing.assert_array_equal(counted, expected)


def test_concat_fills_all_rows_but_the_last_and_crosses_shards():
    rows = rows_of(documents(), window=32, overlap=1, strategy="concat")
    filled = [sum(length - 1 for _, _, length in row) for row in rows]
    assert set(filled[:-1]) == {32}
    assert any(len({shard for shard, _, _ in row}) == 2 for row in rows)


def test_fit_cuts_no_document_that_fits_a_row():
    shards = documents(longest=60)
    starts = {(s, start) for row in rows_of(shards, window=64, overlap=1, strategy="fit") for s, start, _ in row}
    assert starts == {(s, start) for s, offsets in enumerate(shards) for start in offsets[:-1].tolist()}


def test_best_fit_is_the_textbook_algorithm():
    rng = np.random.default_rng(1)
    for window, n in itertools.product((5, 17, 64), (0, 1, 30, 300)):
        lengths = rng.integers(1, window + 1, n)
        rows = best_fit(lengths, window)
        used = np.bincount(rows, weights=lengths) if n else np.zeros(0)
        left = []  # reference: longest first into the fullest row that takes it
        for length in sorted(lengths.tolist(), reverse=True):
            able = [i for i, space in enumerate(left) if space >= length]
            best = min(able, key=lambda i: left[i], default=None)
            if best is None:
                left.append(window - length)
            else:
                left[best] -= length
        assert sorted(used.tolist()) == sorted(window - space for space in left)


def test_utilisation_is_reported_and_high():
    lengths = np.random.default_rng(0).lognormal(5, 1, 20_000).astype(int) + 3
    offsets = [np.append(0, np.cumsum(lengths))]
    for strategy, least in (("concat", 0.999), ("fit", 0.99)):
        rows = rows_of(offsets, window=512, overlap=1, strategy=strategy)
        assert utilisation((lengths - 1).sum(), len(rows), 512) > least
