"""Files that are whole or absent: written under a hidden name, synced, hashed, renamed; and one builder at a time."""

import contextlib
import fcntl
import hashlib
import os
import shutil
from pathlib import Path

import numpy as np

from lm_jax.errors import FULL, REFUSED, ConfigError


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


def write_text(path: Path, text: str):
    """Replace a small file at once: readers see the old one or the new one, never a part."""
    hidden = path.with_name(f".building-{path.name}")
    hidden.write_text(text, encoding="utf-8")
    seal(hidden)
    hidden.replace(path)
    sync(path.parent)


def seal(path: Path) -> str:
    """Force a file to disk; returns its SHA-256."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return sha256(path)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(folder: Path):
    """Force a folder's names to disk: a rename is safe only then."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def lock(folder: Path, say):
    """One builder at a time; the others wait, and then find the work done. Leftovers of killed builders are removed."""
    with open(folder / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process is preparing {folder}: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        for leftover in folder.glob(".building-*"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        yield


@contextlib.contextmanager
def explained(root):
    """A full disk, quota or file-size limit, or a place that takes no files, as a ConfigError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in REFUSED:
            raise ConfigError(f"data.root={str(root)!r} cannot be used: {error}. Choose a folder that takes "
                              "files") from error
        if error.errno not in FULL:
            raise
        free = shutil.disk_usage(root).free / 1e6
        raise ConfigError(f"no room under data.root={str(root)!r} ({free:,.0f} MB free): {error}. Make room or set "
                          "data.root to a larger disk and run again; finished stages are kept, others not") from error
