"""The order of the data: one sequence of rows, however many processes make it and wherever they go on."""

import itertools
import json

import numpy as np
import pytest
from test_processes import ended, launch

from lm_jax.config import DataConfig
from lm_jax.data import mixture
from lm_jax.data.loader import Loader
from lm_jax.data.store import prepare

BATCH = 12  # divided by 1, 2, 3 and 4
COUNTS = (1, 2, 4, 3)  # of processes, one after another


def test_any_processes_from_any_cursor_make_one_sequence_in_which_each_row_is_once_an_epoch():
    """A thousand mixtures, each gone through by changing numbers of processes that are stopped at random."""
    for seed in range(1000):
        rng = np.random.default_rng(seed)
        sizes, weights, epochs, batch, steps = mixed(rng)
        stretches = mixture.schedule(sizes, weights, epochs=epochs, needed=batch * steps)
        keys = [int(key) for key in rng.integers(0, 2**63, len(sizes))]

        def rows(k):
            return np.stack(mixture.rows(stretches, k, sizes=sizes, keys=keys), 1)

        whole = rows(np.arange(batch * steps))
        made, counts = np.full_like(whole, -1), itertools.cycle(rng.permutation(COUNTS))
        for start, stop in itertools.pairwise([0, *np.sort(rng.integers(0, steps, 2)), steps]):
            for here in shared(batch, next(counts), rng):
                mine = (np.arange(start, stop)[:, None] * batch + here).ravel()
                made[mine] = rows(mine)
        np.testing.assert_array_equal(made, whole, err_msg=f"seed {seed}")
        for s, size in enumerate(sizes):
            once_an_epoch(whole[whole[:, 0] == s, 1], size)


def mixed(rng):
    """Sources' sizes, weights, caps; rows of a step, and steps enough for about three passes over all sources."""
    sizes = rng.integers(1, rng.choice([5, 50, 500]), rng.integers(1, 4)).tolist()
    batch, epochs = BATCH * int(rng.integers(1, 3)), ()
    steps = max(1, 3 * sum(sizes) // batch)
    kind = rng.choice(["by size", "capped", "weights", "stages"])
    if kind == "by size":
        return sizes, (), epochs, batch, steps
    weights = rng.uniform(0.1, 1, (3, len(sizes))).tolist()
    if kind == "stages":
        starts = (0.0, *np.sort(rng.uniform(0.1, 0.9, 2)).tolist())
        return sizes, tuple((start, *row) for start, row in zip(starts, weights)), epochs, batch, steps
    if kind == "capped":
        epochs = (float(batch * steps / sum(sizes) + 1),)  # sources are spent one after another
    return sizes, tuple(weights[0]), epochs, batch, steps


def shared(batch, processes, rng):
    """A batch's rows as processes hold them: neighbours, every n-th, or all over."""
    order = {"neighbours": np.arange(batch), "dealt": np.arange(batch).reshape(-1, processes).T.ravel(),
             "all over": rng.permutation(batch)}[rng.choice(["neighbours", "dealt", "all over"])]
    return [np.sort(part) for part in np.split(order, processes)]


def once_an_epoch(rows, size):
    whole, rest = np.split(rows, [len(rows) // size * size])
    every = np.sort(whole.reshape(-1, size), 1)
    np.testing.assert_array_equal(every, np.broadcast_to(np.arange(size), every.shape))
    assert len(np.unique(rest)) == len(rest)


def sources(root, **changed):
    """Three sources of about 130, 60 and 25 rows of 32 tokens."""
    specs = ";".join(f"markov:documents={n},length=27,seed={n}" for n in (150, 70, 30))
    return DataConfig(**dict(sources=specs, root=str(root), tokenizer="byte", length=32, validation=0.05) | changed)


def loader(data, steps):
    return Loader(prepare(data, say=lambda line: None), data, batch=BATCH, seed=1, rows_needed=BATCH * steps)


@pytest.mark.parametrize("strategy", ["concat", "fit"])
def test_packed_rows_of_weighted_sources_in_stages_go_on_in_order_from_every_step(strategy, tmp_path):
    """Steps lie across the ends of epochs and of stages; a new loader knows the step alone."""
    stages = ((0.0, 0.5, 0.3, 0.2), (0.4, 0.2, 0.6, 0.2), (0.75, 0.1, 0.1, 0.8))
    data = sources(tmp_path, strategy=strategy, weights=stages)
    train = loader(data, 50)
    with train.stream(0) as stream:
        whole = list(itertools.islice(stream, 50))
    source, index = train.locate(np.arange(50 * BATCH))
    turns = [np.flatnonzero(source == s)[size::size] for s, size in enumerate(train.sizes)]  # first rows of epochs
    assert all(map(len, turns)) and any((np.concatenate(turns) % BATCH) > 0), "epochs end within steps"
    for step in range(50):
        with loader(data, 50).stream(step) as stream:
            same(next(stream), whole[step])
    for step in {0, 20, 37, 38, *(turn[0] // BATCH for turn in turns), *(turn[0] // BATCH + 1 for turn in turns)}:
        with loader(data, 50).stream(step) as stream:
            for a, b in zip(whole[step:], stream):
                same(a, b)


def same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


READ = """
import json, sys
import numpy as np
from lm_jax import config, hosts, parallel
from lm_jax.data.loader import Loader
from lm_jax.data.store import prepare

root, batch, steps, cursors, *flags = sys.argv[1:]
hosts.start(*(flag.partition("=")[2] for flag in flags))
data = config.DataConfig(**json.loads(root))
train = Loader(prepare(data), data, batch=int(batch), seed=1, rows_needed=int(batch) * int(steps))
with hosts.jax.set_mesh(parallel.make_mesh(config.MeshConfig())):
    here = hosts.rows_here(int(batch))
found = {"here": here}
for cursor in json.loads(cursors):
    with train.stream(cursor, here) as stream:
        found[str(cursor)] = np.stack([next(stream)["tokens"] for _ in range(cursor, int(steps))])
np.savez(f"{data.root}/{hosts.jax.process_count()}-{hosts.jax.process_index()}.npz", **found)
"""


def test_one_process_then_two_then_four_then_three_read_the_same_rows_for_three_epochs(tmp_path):
    """Real processes: what they hold of each step from each of some cursors, and then every pair of their numbers."""
    data = sources(tmp_path, sources="markov:documents=60,length=31")
    size = loader(data, 0).sizes[0]
    steps = -(-3 * size // BATCH)
    cursors = (0, 1, size // BATCH, 2 * size // BATCH + 1, steps - 1)
    told = (json.dumps(vars(data)), str(BATCH), str(steps), json.dumps(cursors))
    running = [launch(n, "-c", READ, *told) for n in COUNTS]
    for processes in running:
        codes, outputs = ended(processes)
        assert set(codes) == {0}, outputs
    train, read = loader(data, steps), {n: joined(tmp_path.glob(f"{n}-*.npz"), n) for n in COUNTS}
    whole = train.rows(np.arange(steps * BATCH))["tokens"]
    once_an_epoch(train.locate(np.arange(steps * BATCH))[1], size)
    assert len(np.unique(whole[:size], axis=0)) == size > 4 * BATCH, "rows can be told apart"
    for before, after, cursor in itertools.product(COUNTS, COUNTS, cursors):
        through = np.concatenate([read[before]["0"][: cursor * BATCH], read[after][str(cursor)]])
        np.testing.assert_array_equal(through, whole, err_msg=f"{before}, then {after} from step {cursor}")


def joined(files, count) -> dict:
    """What the processes of one run hold together, row after row."""
    parts = [np.load(file) for file in files]
    places = np.concatenate([part["here"] for part in parts])
    assert len(parts) == count and np.array_equal(np.sort(places), np.arange(BATCH))
    rows = lambda key: np.concatenate([part[key] for part in parts], 1)[:, np.argsort(places)]
    return {key: rows(key).reshape(-1, rows(key).shape[-1]) for key in parts[0].files if key != "here"}
