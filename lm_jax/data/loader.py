"""Batches for training and evaluation. Row k is a pure function of (store digest, seed, k).

So the data position is one integer: a run resumes at any step, on any number of hosts, each of which makes the rows it
needs, and any batch can be made again years later. A background thread keeps a few batches ready; small ones it makes
many at a time, since numpy takes as long for a few rows as for a hundred.
"""

import hashlib
import queue
import threading
from collections.abc import Iterator

import numpy as np

from lm_jax.config import DataConfig
from lm_jax.data import examples, mixture
from lm_jax.data.store import Store
from lm_jax.errors import DataError

AT_ONCE = 1 << 16  # positions that are made at a time: arrays that stay in a core's cache
LOCATED = 1 << 12  # rows whose places are found at a time, which takes numpy hundreds of small steps


class Loader:
    """Rows 0 .. rows_needed - 1 of a run over all sources of a store, mixed, shuffled and made into examples.

    Where `data.weights` has stages they are fractions of `rows_needed`; otherwise row k does not depend on it.
    Raises ConfigError if the sources, each repeated at most `data.epochs` times, have fewer rows.
    """

    def __init__(self, store: Store, data: DataConfig, *, batch: int, seed: int, rows_needed: int):
        self.batch_size, self.rows_needed = batch, rows_needed
        self._sources = [store.rows("train", tag) for tag in store.tags]
        self.sizes = [len(rows) for rows in self._sources]  # of each source, in the order of store.tags
        self._stretches = mixture.schedule(self.sizes, data.weights, epochs=data.epochs, needed=rows_needed)
        self._key = _key(store.digest, str(seed))
        self._keys = [_key(store.digest, str(seed), tag) for tag in store.tags]
        self._data, self._tokenizer = data, store.tokenizer

    def row(self, k: int) -> dict:
        """Row k, without a batch axis."""
        return examples.part(self.rows(np.array([k])), 0)

    def batch(self, step: int, here: np.ndarray | None = None) -> dict:
        """A step's batch, or of its B rows those `here`: rows step x B + here."""
        return self.rows(step * self.batch_size + (np.arange(self.batch_size) if here is None else here))

    def stream(self, step: int, here: np.ndarray | None = None, *, depth: int = 2) -> "Stream":
        """`batches`, made `depth` or more ahead by a thread; use it in a `with`."""
        here = np.arange(self.batch_size) if here is None else here
        return Stream(self.batches(step, here), max(depth, self._most(len(here))))

    def batches(self, step: int, here: np.ndarray) -> Iterator[dict]:
        """As many batches as a run has, from `step` on. After the run's last one its first ones come again, in place
        of those that a run skipped. One is made first, then more at a time, so that the first step waits for little.
        """
        steps, rows, done = self.rows_needed // self.batch_size, len(here), 0
        most = self._most(rows)
        while done < steps:
            at = np.arange(step + done, step + min(steps, done + max(most, LOCATED // max(1, rows)), 2 * done + 1))
            k = (at[:, None] % steps * self.batch_size + here).ravel()
            source, index = self.locate(k)
            for start in range(0, len(at), most):
                some = slice(start * rows, (start + most) * rows)
                try:
                    made = self._made(k[some], source[some], index[some])
                except DataError:  # the batches before the damaged one are good
                    yield from (self.batch(one, here) for one in (at[start:start + most] % steps).tolist())
                    raise
                for i in range(min(most, len(at) - start)):
                    yield examples.part(made, slice(i * rows, (i + 1) * rows))
            done += len(at)

    def _most(self, rows: int) -> int:
        """Batches of so many rows that are made at a time."""
        return max(1, AT_ONCE // max(1, rows * self._data.length))

    def rows(self, k: np.ndarray) -> dict:
        """Rows of any numbers, as a batch."""
        return self._made(k, *self.locate(k))

    def _made(self, k: np.ndarray, source: np.ndarray, index: np.ndarray) -> dict:
        """The rows k, which are these of these sources."""

        def other(b, rng):
            return _other(self._sources[source[b]], index[b], rng)

        pieces = [[]] * len(k)
        for s in np.unique(source).tolist():
            here = np.flatnonzero(source == s)
            for b, row in zip(here.tolist(), self._sources[s].take(index[here])):
                pieces[b] = row
        spec = examples.Spec(self._data, self._tokenizer, other)
        return examples.batch(pieces, _generators(self._key, k), spec)

    def locate(self, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(number of the source, row of that source) of each row of the run."""
        if len(k) and not (0 <= k.min() and k.max() < self.rows_needed):
            raise IndexError(f"row {k.max() if k.min() >= 0 else k.min()} of a run of {self.rows_needed} rows")
        return mixture.rows(self._stretches, k, sizes=self.sizes, keys=self._keys)


def validation(store: Store, data: DataConfig, tag: str, *, batch: int, rows: int,
               here: np.ndarray | None = None) -> Iterator[dict]:
    """`rows` rows (0: all) of a source's validation split, spread evenly over it: the same rows and noise every time.

    Of the `batch` rows of each batch those `here`, or all. The last is filled up with rows of padding, whose segments
    and weights are 0.
    """
    held = store.rows("validation", tag)
    count = min(rows, len(held)) if rows else len(held)
    key = _key(store.digest, "validation", tag)
    for start in range(0, count, batch):
        k = start + (np.arange(batch) if here is None else here)
        index = np.where(k < count, k * len(held) // count, 0)
        some = int((k < count).sum())  # of those here, which come in order; what follows is padding

        def other(b, rng):
            return _other(held, index[b], rng)

        spec = examples.Spec(data, store.tokenizer, other)
        pieces = held.take(index[:some]) + [[]] * (len(k) - some)
        yield examples.batch(pieces, _generators(key, index), spec)


class Stream:
    """An iterator run ahead by a thread, whose exceptions reach the consumer; closing waits for the thread."""

    def __init__(self, batches: Iterator[dict], depth: int):
        self._queue, self._stop = queue.Queue(max(1, depth)), threading.Event()
        self._thread = threading.Thread(target=self._run, args=(batches,), name="batches", daemon=True)
        self._thread.start()

    def __iter__(self):
        return self

    def __next__(self) -> dict:
        if self._stop.is_set():
            raise StopIteration
        batch, error = self._queue.get()
        if error is not None:
            self.close()
            raise error
        return batch

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def close(self):
        self._stop.set()
        while self._thread.is_alive():
            self._drain()  # the thread may be waiting for room
            self._thread.join(0.01)
        self._drain()

    def _drain(self):
        while not self._queue.empty():
            self._queue.get_nowait()

    def _run(self, batches):
        try:
            for batch in batches:
                self._queue.put((batch, None))
                if self._stop.is_set():
                    return
            self._queue.put((None, StopIteration()))
        except BaseException as error:
            self._queue.put((None, error))


def _other(rows, row: int, rng) -> list:
    """The pieces of any row but this one, where there are more."""
    return rows[(int(row) + 1 + int(rng.integers(max(1, len(rows) - 1)))) % len(rows)]


def _key(*parts: str) -> int:
    return int.from_bytes(hashlib.sha256("\0".join(parts).encode()).digest()[:8])


def _generators(key: int, rows: np.ndarray) -> Iterator[np.random.Generator]:
    """Each row's own random numbers, the same in whatever batch it is made; each until the next is asked for, since
    it is one generator that is set anew: to make one costs as much as a row."""
    bits = np.random.Philox(key=0)
    begin, one = bits.state, np.random.Generator(bits)
    for row in rows:
        begin["state"]["key"] = np.array([key, row], np.uint64)
        bits.state = begin
        yield one
