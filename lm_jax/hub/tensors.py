"""safetensors: a header that says where every tensor lies, read piece by piece and written tensor by tensor.

    8 bytes, the header's length; the header, JSON: {name: {dtype, shape, data_offsets}}; the numbers, end to end

The format holds numbers only, so that opening a file runs nothing; the header is held against the file before a number
is believed. https://huggingface.co/docs/safetensors
"""

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from lm_jax import disk
from lm_jax.errors import DataError

DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
LONGEST = 100_000_000  # bytes of a header, as in the format's own library
BLOCK = 128  # rows and columns that share a scale where weights are 8 bits wide (DeepSeek-V3)


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file; nothing of it is read until `rows` are asked for."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    at: int  # byte of the file

    def rows(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Its rows from `start` to `stop`: all that is in memory is what is asked for."""
        first, *rest = self.shape or (1,)
        stop, width = first if stop is None else stop, math.prod(rest)
        count, at = (stop - start) * width, self.at + start * width * self.dtype.itemsize
        found = np.fromfile(self.file, np.dtype(f"u{self.dtype.itemsize}"), count, offset=at)  # of any kind of number
        if found.size != count:
            raise DataError(f"{self.file} is truncated: fetch it again")
        return found.view(self.dtype).reshape(stop - start, *rest) if self.shape else found.view(self.dtype)[0]


@dataclass(frozen=True)
class Scaled:
    """A tensor of 8 bits a number and the scale of each block of it, read as the bfloat16 that it stands for."""

    numbers: Tensor
    scales: Tensor
    dtype = np.dtype(ml_dtypes.bfloat16)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.numbers.shape

    def rows(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        numbers = self.numbers.rows(start, stop).astype(np.float32)
        scales = self.scales.rows()[np.arange(start, start + len(numbers)) // BLOCK]
        return (numbers * scales.repeat(BLOCK, 1)[:, :numbers.shape[1]]).astype(self.dtype)


def read(file: Path) -> dict[str, Tensor]:
    """Name -> tensor of a file. DataError where the header is damaged, or says more or less than is there."""
    if not file.is_file():
        raise DataError(f"{file} is no file: fetch it again")
    there = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if there < 8 or length > min(there - 8, LONGEST):
            raise DataError(f"{file} is truncated, or no safetensors file: its header is to have {length:,} bytes and "
                            f"the file has {there:,}: fetch it again")
        try:
            header = disk.parse_json(stream.read(length))
            header.pop("__metadata__", None)
            tensors = {name: _tensor(file, entry, 8 + length) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{file} has a damaged header ({error}): fetch it again") from error
    _end_to_end(file, tensors, 8 + length, there)
    return tensors


def write(file: Path, entries: dict[str, tuple[np.dtype, tuple[int, ...]]], arrays: Iterable[np.ndarray]):
    """Write tensors to a new file, whole or not at all; `entries` say the names, types and shapes of `arrays`."""
    header, at = {"__metadata__": {"format": "pt"}}, 0  # transformers asks for this word
    for name, (dtype, shape) in entries.items():
        end = at + size(dtype, shape)
        header[name] = {"dtype": NAMES[np.dtype(dtype)], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # numbers begin at a multiple of 8, as readers that map files expect
    hidden = file.with_name(f".building-{file.name}")
    try:
        with open(hidden, "wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for (dtype, shape), array in zip(entries.values(), arrays, strict=True):
                assert array.dtype == dtype and array.shape == shape, f"{array.dtype}{array.shape} for {dtype}{shape}"
                np.ascontiguousarray(array).view(np.uint8).tofile(stream)
            stream.flush()
            os.fsync(stream.fileno())
        hidden.replace(file)
    except BaseException:
        hidden.unlink(missing_ok=True)
        raise


def size(dtype, shape) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * np.dtype(dtype).itemsize


def ordered(entries: dict) -> dict:
    """Entries as the format's own library lays them out: wide types first, then by name."""
    key = lambda item: (-np.dtype(item[1][0]).itemsize, item[0])
    return dict(sorted(entries.items(), key=key))


def shards(entries: dict, most: int) -> Iterator[dict]:
    """Entries cut into files of at most `most` bytes each, or one tensor."""
    part, held = {}, 0
    for name, (dtype, shape) in entries.items():
        if part and held + size(dtype, shape) > most:
            yield part
            part, held = {}, 0
        part[name] = (dtype, shape)
        held += size(dtype, shape)
    yield part


def _tensor(file, entry, data):
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"dtype {entry['dtype']!r} is none of {', '.join(DTYPES)}")
    dtype, shape, (start, end) = np.dtype(DTYPES[entry["dtype"]]), tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, start, end)):
        raise ValueError(f"sizes {shape} at {start} to {end}")
    if end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{end - start} bytes for {entry['dtype']}{list(shape)}")
    return Tensor(file, dtype, shape, data + start)


def _end_to_end(file, tensors, data, length):
    """Refuse a file whose tensors overlap, leave gaps, or end elsewhere than the file does."""
    at = data
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].at, math.prod(item[1].shape))):
        if tensor.at != at:
            raise DataError(f"{file} has a damaged header: {name!r} begins at byte {tensor.at:,} and what is before it "
                            f"ends at {at:,}: fetch it again")
        at += size(tensor.dtype, tensor.shape)
    if at != length:
        kind = "is truncated" if at > length else "has bytes that no tensor owns"
        raise DataError(f"{file} {kind}: its header says {at:,} bytes and there are {length:,}: fetch it again")
