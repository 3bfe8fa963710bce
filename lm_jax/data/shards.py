"""Files of a store that are proven before they are believed: arrays block by block as they are read, others whole.

Beside the arrays of a folder lies `blocks.npy`: a SHA-256 of each MiB of each of them, which stands in the manifest by
its own. A block is held against it when it is first read in a process, by the thread that makes batches, so that
training neither waits for a corpus to be hashed nor learns from a flipped bit.
"""

import hashlib
from pathlib import Path

import numpy as np

from lm_jax import disk
from lm_jax.errors import DataError

BLOCKS = "blocks.npy"
BLOCK = 1 << 20  # bytes; rows come 32 at a time from all over the corpus: of a larger one little is read


class Shard:
    """A .npy file, mapped: what is read is of blocks that were what the manifest says when first read."""

    def __init__(self, path: Path, digests: np.ndarray):
        """`digests` (uint8[blocks, 32]) are those of `of_blocks`."""
        self._path, self._digests = path, digests
        self._unproven = bytearray(b"\1" * len(digests))
        if len(digests):  # else it is empty, and no array
            self._prove(0)  # and so the header
        mapped = numbers(path)
        self._array, self._header = np.asarray(mapped), mapped.offset
        self._each = mapped.nbytes // max(1, len(mapped))

    def __len__(self):
        return len(self._array)

    def __getitem__(self, part: slice) -> np.ndarray:
        """Neighbours, as a read-only view."""
        end = (self._header + part.stop * self._each - 1) // BLOCK + 1
        block = (self._header + part.start * self._each) // BLOCK
        while (block := self._unproven.find(1, block, end)) >= 0:
            self._prove(block)
        return self._array[part]

    def take(self, items: np.ndarray) -> np.ndarray:
        """Items of any numbers, copied."""
        if 1 in self._unproven:
            begin = self._header + items * self._each
            for block in np.unique([begin // BLOCK, (begin + self._each - 1) // BLOCK]).tolist():
                if self._unproven[block]:
                    self._prove(block)
        return self._array[items]

    def _prove(self, block):
        """Read a block as a file's bytes, since of a mapped one a disk's error would end the process without a word."""
        try:
            with open(self._path, "rb") as file:
                file.seek(block * BLOCK)
                found = hashlib.sha256(file.read(BLOCK)).hexdigest()
        except OSError as error:
            raise damaged(self._path, f"cannot be read ({error})") from error
        expected = self._digests[block].tobytes().hex()
        if found != expected:
            raise damaged(self._path, f"is not what its manifest says: of bytes {block * BLOCK:,} to "
                                      f"{(block + 1) * BLOCK:,} the SHA-256 is {found}, and was {expected}")
        self._unproven[block] = 0


def seal(folder: Path):
    """Write the digests of the blocks of a folder's arrays, in the order of their names."""
    with NpyWriter(folder / BLOCKS, np.uint8, (32,)) as out:
        for path in sorted(path for path in folder.glob("*.npy") if path.name != BLOCKS):
            with open(path, "rb") as file:
                while block := file.read(BLOCK):
                    out.write(np.frombuffer(hashlib.sha256(block).digest(), np.uint8)[None])


def of_blocks(folder: Path, files: dict[str, dict]) -> dict[str, np.ndarray]:
    """Array's name -> the digests of its blocks, in a folder with these entries in the manifest."""
    digests = numbers(proven(folder / BLOCKS, files[BLOCKS]))
    names = sorted(name for name in files if name.endswith(".npy") and name != BLOCKS)
    ends = np.cumsum([-(-files[name]["bytes"] // BLOCK) for name in names])
    return dict(zip(names, np.split(digests, ends)))


def numbers(path: Path) -> np.memmap:
    """A .npy file, mapped. Objects, which only a pickle could hold, are none, whatever the manifest says."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(found, np.memmap):
            raise ValueError("it is an archive")
        return found
    except (ValueError, EOFError) as error:
        raise damaged(path, f"is no array of numbers ({error})") from error


def proven(path: Path, entry: dict) -> Path:
    """The path of a file that is what its entry in the manifest says, all of it; else DataError."""
    sized(path, entry)
    try:
        found = disk.sha256(path)
    except OSError as error:
        raise damaged(path, f"cannot be read ({error})") from error
    if found != entry["sha256"]:
        raise damaged(path, f"is not what its manifest says: its SHA-256 is {found}, and was {entry['sha256']}")
    return path


def sized(path: Path, entry: dict) -> Path:
    """The same by the file's size alone, which costs nothing."""
    if not path.exists():
        raise damaged(path, "is missing")
    if (size := path.stat().st_size) != entry["bytes"]:
        raise damaged(path, f"is not what its manifest says: it has {size:,} bytes of {entry['bytes']:,}")
    return path


def damaged(path: Path, how: str) -> DataError:
    """An error that names a store's file and the cure."""
    store = next((folder for folder in path.parents if (folder / "manifest.json").exists()), path.parent)
    return DataError(f"{path} {how}. Bring the file back, or delete {store / 'manifest.json'}: the next start then "
                     "builds this store again, and from the same sources the same one")


class NpyWriter:
    """Append arrays to a .npy file whose length is known only at the end; numpy's padded headers allow it."""

    def __init__(self, path: Path, dtype, shape: tuple = ()):
        self.path, self.dtype, self.shape, self.length = path, np.dtype(dtype), shape, 0

    def __enter__(self):
        self._file = open(self.path, "wb")
        self._header()
        return self

    def write(self, array):
        self._file.write(np.ascontiguousarray(array, self.dtype).data)
        self.length += len(array)

    def __exit__(self, *error):
        with self._file:
            if error[0] is None:
                self._file.seek(0)
                self._header()

    def _header(self):
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.length, *self.shape)}
        np.lib.format.write_array_header_1_0(self._file, header)
