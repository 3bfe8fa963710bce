"""The loader: row k is a pure function of (store, seed, k), whoever asks and whenever."""

import hashlib
import threading
import time

import numpy as np
import pytest

from lm_jax.config import ConfigError, DataConfig
from lm_jax.data import mixture
from lm_jax.data.examples import OBJECTIVES
from lm_jax.data.loader import Loader, validation
from lm_jax.data.store import prepare
from lm_jax.errors import DataError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two sources of files, of about 900 and 300 rows."""
    root, rng = tmp_path_factory.mktemp("loader"), np.random.default_rng(0)
    for name, files in (("big", 300), ("small", 100)):
        (root / name).mkdir()
        for i in range(files):
            (root / name / f"{i}.txt").write_text("".join(rng.choice(list("abcdef gh"), rng.integers(60, 140))))
    return DataConfig(sources=f"text:{root}/big/*.txt;text:{root}/small/*.txt", root=str(root / "data"),
                      tokenizer="byte", length=32, validation=0.1)


def with_(data, **changed):
    return DataConfig(**vars(data) | changed)


def loader(data, *, batch=30, seed=0, rows=6000):
    return Loader(prepare(data, say=lambda line: None), data, batch=batch, seed=seed, rows_needed=rows)


def same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        same(a[key], b[key]) if isinstance(a[key], dict) else np.testing.assert_array_equal(a[key], b[key], err_msg=key)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_row_k_is_the_same_wherever_it_is_made(data, objective):
    train = loader(with_(data, objective=objective))
    rows = [train.row(k) for k in range(60, 90)]
    for here in (np.arange(30), np.arange(10, 20), np.array([0, 7, 29])):
        got = train.batch(2, here)
        assert len(got["weights"]) == len(here)
        for place, k in enumerate(here):
            same(rows[k], take(got, place))


SETTINGS = {"concat": {}, "fit": {"strategy": "fit"}, "words": {"objective": "masked", "whole_words": True},
            "mixed": {"weights": ((0.0, 1.0, 3.0), (0.5, 2.0, 1.0))}} | {name: {"objective": name}
                                                                         for name in OBJECTIVES if name != "causal"}
RECORDED = {"concat": "e78001bd1cfaba09", "fit": "83c0b30d00165d92", "words": "963c72a043963967",
            "mixed": "02ba022b28121c00", "prefix": "8be4475323b964e2", "masked": "a9c2ff7064509ca1",
            "masked_pairs": "3079ef5522797a21", "span": "6142d35321778708", "ul2": "789c83633cbd6e5a"}


@pytest.mark.parametrize("name", SETTINGS)
def test_batches_are_those_that_earlier_versions_made(tmp_path, name):
    """A run goes on with the rows that it was begun with, whatever has been made faster since."""
    for source, files in (("one", 40), ("two", 15)):
        (tmp_path / source).mkdir()
        for i in range(files):
            text = "".join("abcdef gh"[i * k * k % 83 % 9] for k in range(20 + 29 * i * i % 150))
            (tmp_path / source / f"{i}.txt").write_text(text)
    data = DataConfig(sources=f"text:{tmp_path}/one/*.txt;text:{tmp_path}/two/*.txt", root=str(tmp_path / "data"),
                      tokenizer="byte", length=32, validation=0.1, **SETTINGS[name])
    train, found = loader(data, batch=13, rows=1300), hashlib.sha256()
    held = validation(prepare(data, say=lambda line: None), data, "one", batch=5, rows=12)
    for batch in (*map(train.batch, (0, 8, 51, 99)), train.batch(7, np.array([1, 5, 6])), *held):
        for part in (batch, batch.pop("source", {})):
            for key in sorted(part):
                found.update(f"{key}{part[key].dtype}{part[key].shape}".encode() + part[key].tobytes())
    assert found.hexdigest()[:16] == RECORDED[name]


def take(batch, b):
    return {key: take(value, b) if isinstance(value, dict) else value[b] for key, value in batch.items()}


def test_a_row_is_a_pure_function_of_the_seed_and_its_number(data):
    one, two, other = loader(data), loader(data, rows=60, batch=6), loader(data, seed=1)
    same(one.row(50), two.row(50))
    numbers = np.arange(1000)
    assert (one.locate(numbers)[1] != other.locate(numbers)[1]).mean() > 0.9


@pytest.mark.parametrize("strategy", ["concat", "fit"])
def test_each_row_is_used_exactly_once_an_epoch(data, strategy):
    train = loader(with_(data, sources=data.sources.split(";")[0], strategy=strategy))
    n = train.sizes[0]
    orders = [train.locate(np.arange(epoch * n, (epoch + 1) * n))[1] for epoch in range(3)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(n))
    assert (orders[0] != orders[1]).mean() > 0.9 and (orders[1] != orders[2]).mean() > 0.9
    tokens = sum(train.row(k)["weights"].sum() for k in range(n))
    store = prepare(with_(data, sources=data.sources.split(";")[0]), say=lambda line: None)
    assert tokens == store.manifest["splits"]["train"]["big"]["tokens"]  # and so each token is a target once


@pytest.mark.parametrize("rows", [1, 2, 31, 32, 33, 63, 64, 65, 1000, 16_383, 16_385, 40_000])
def test_the_shuffle_is_a_permutation_of_each_epoch(rows):
    order = mixture.shuffled(np.arange(3 * rows), rows, 7).reshape(3, rows)
    np.testing.assert_array_equal(np.sort(order, 1), np.tile(np.arange(rows), (3, 1)))
    if rows >= 1000:
        assert abs(np.corrcoef(order[0], np.arange(rows))[0, 1]) < 0.1
        assert abs(np.diff(order[0])).mean() > rows / 10


def test_rows_near_in_time_come_from_few_blocks_from_all_over():
    rows, pool = 500_000, mixture.BLOCK * mixture.POOL
    order = mixture.shuffled(np.arange(rows), rows, 7)
    for start in range(0, rows - pool, pool // 2):
        blocks = np.unique(order[start : start + pool] // mixture.BLOCK)
        assert len(blocks) <= 3 * mixture.POOL + 3  # of 15,625
        assert abs(blocks.mean() / (rows / mixture.BLOCK) - 0.5) < 0.1


def test_a_stream_resumes_in_mid_run_and_its_end_is_followed_by_its_beginning(data):
    train = loader(data, rows=300)
    with train.stream(0) as unbroken:
        whole = list(unbroken)
    assert len(whole) == 10
    with loader(data, rows=300).stream(6) as resumed:
        rest = list(resumed)
    assert len(rest) == 10
    for a, b in zip(whole[6:] + whole[:6], rest):
        same(a, b)


def test_without_weights_sources_are_used_by_size(data):
    train = loader(data)
    sizes = np.array(train.sizes)
    source, _ = train.locate(np.arange(1000))
    np.testing.assert_allclose(np.bincount(source) / 1000, sizes / sizes.sum(), atol=0.002)


def test_a_staged_mixture_meets_its_weights_at_all_times(data):
    train = loader(with_(data, weights=((0.0, 1.0, 3.0), (0.5, 1.0, 0.0), (0.75, 0.2, 0.8))), rows=4000)
    source, _ = train.locate(np.arange(4000))
    for start, end, share in ((0, 2000, 0.25), (2000, 3000, 1.0), (3000, 4000, 0.2)):
        first = np.cumsum(source[start:end] == 0)
        assert abs(first - share * np.arange(1, end - start + 1)).max() <= 1


def test_many_sources_take_turns_evenly():
    weights = (0.5, 0.1, 0.3, 0.05, 0.05)
    stretches = mixture.schedule([1000] * 5, weights, epochs=(), needed=100_000)
    source, index = mixture.locate(stretches, np.arange(100_000))
    for s, weight in enumerate(weights):
        np.testing.assert_array_equal(index[source == s], np.arange((source == s).sum()))  # in order, none left out
        assert abs(np.cumsum(source == s) - weight * np.arange(1, 100_001)).max() < 3


def test_a_spent_source_gives_its_weight_to_the_others(data):
    settings = with_(data, weights=(1.0, 9.0), epochs=(2.0,))
    big, small = loader(settings, rows=30).sizes
    rows = 2 * (small + big)
    source, index = loader(settings, rows=rows).locate(np.arange(rows))
    spent = np.flatnonzero(source == 1)[-1]
    assert abs(spent - 2 * small / 0.9) < 5 and (source[spent + 1 :] == 0).all()
    for s, size in enumerate((big, small)):  # each row exactly twice
        np.testing.assert_array_equal(np.bincount(index[source == s], minlength=size), 2)
    with pytest.raises(ConfigError, match=f"after row {rows:,} of .* at most {rows:,} with repeats. Raise data.epochs"):
        loader(settings, rows=rows + 30)


def test_each_source_has_a_cap_of_its_own():
    stretches = mixture.schedule([100, 100], (1.0, 1.0), epochs=(0.0, 1.5), needed=1000)
    source, _ = mixture.locate(stretches, np.arange(1000))
    assert np.bincount(source).tolist() == [850, 150]
    with pytest.raises(ConfigError, match="a number >= 0 for each of 2 sources"):
        mixture.schedule([100, 100], (), epochs=(1.0, 2.0, 3.0), needed=10)


@pytest.mark.parametrize("weights", [(1.0,), (1.0, -1.0), (0.0, 0.0), ((0.5, 1.0, 1.0),),
                                     ((0.0, 1.0, 1.0), (0.0, 1.0, 2.0))])
def test_impossible_weights_are_an_error(data, weights):
    with pytest.raises(ConfigError, match="data.weights="):
        loader(with_(data, weights=weights))


def test_validation_is_every_row_once_in_the_same_order_with_the_same_noise(data):
    settings = with_(data, objective="masked")
    store = prepare(settings, say=lambda line: None)
    count = len(store.rows("validation", "big"))
    runs = [list(validation(store, settings, "big", batch=8, rows=0)) for _ in range(2)]
    for a, b in zip(*runs):
        same(a, b)
    assert len(runs[0]) == -(-count // 8)
    rows = np.concatenate([batch["targets"] for batch in runs[0]])
    segments = np.concatenate([batch["segments"] for batch in runs[0]])
    assert (segments[:count, 0] == 1).all() and not segments[count:].any()
    assert not runs[0][-1]["weights"][count % 8 or 8 :].any()
    for i in range(count):
        raw = np.concatenate(store.rows("validation", "big")[i])
        np.testing.assert_array_equal(rows[i][: len(raw)], raw)
    few = np.concatenate([batch["targets"] for batch in validation(store, settings, "big", batch=8, rows=8)])
    assert all((row == rows).all(1).any() for row in few) and not (few == rows[:8]).all()  # spread over the split


def test_hosts_share_a_validation_batch(data):
    store = prepare(data, say=lambda line: None)
    whole = list(validation(store, data, "small", batch=6, rows=10))
    for here in (np.arange(2), np.array([0, 3, 5])):
        part = list(validation(store, data, "small", batch=6, rows=10, here=here))
        for batch, mine in zip(whole, part, strict=True):
            for key in batch:
                np.testing.assert_array_equal(batch[key][here], mine[key])


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "batches"]


def test_closing_a_stream_leaves_no_thread(data):
    for taken in (0, 1, 5):
        with loader(data).stream(0) as stream:
            for _ in range(taken):
                next(stream)
        assert not threads()
        with pytest.raises(StopIteration):
            next(stream)


def test_an_error_in_the_background_reaches_the_consumer(data, tmp_path):
    data = with_(data, root=str(tmp_path))
    train, store = loader(data), prepare(data, say=lambda line: None)
    (store.path / store.names["tokens"] / "tokens-big-train-00000.npy").unlink()
    with train.stream(0) as stream, pytest.raises(DataError, match="tokens-big-train-00000.npy cannot be read"):
        next(stream)
    assert not threads()


def test_a_stream_works_ahead(data):
    with loader(data).stream(0, depth=80) as stream:
        for _ in range(200):
            if stream._queue.qsize() == 80:
                break
            time.sleep(0.02)
        assert stream._queue.qsize() == 80


def test_rows_outside_the_run_are_an_error(data):
    with pytest.raises(IndexError, match="row 6000 of a run of 6000 rows"):
        loader(data).row(6000)


def test_a_damaged_row_ends_a_run_at_its_own_batch_and_at_no_earlier_one(data, monkeypatch):
    """Batches are made many at a time; those before the damage are given all the same."""
    train, here = loader(data), np.arange(30)
    whole = [batch for batch, _ in zip(train.batches(0, here), range(12))]
    make, bad = Loader._made, 9 * 30 + 4

    def made(self, k, source, index):
        if bad in k:
            raise DataError("a block that is not what was written")
        return make(self, k, source, index)

    monkeypatch.setattr(Loader, "_made", made)
    found = []
    with pytest.raises(DataError):
        for batch in train.batches(0, here):
            found.append(batch)
    assert len(found) == 9
    for got, expected in zip(found, whole):
        same(got, expected)
