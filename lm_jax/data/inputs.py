"""Files that sources read: found by a pattern, opened whatever they are compressed with.

What is flipped in a gzip file, a zstd file with its sum, a Parquet page with its own or an ArrayRecord is an error;
plain text, JSON lines and Parquet without sums have nothing to be held against.
"""

import glob
import io
import os

from lm_jax.errors import ConfigError

PARQUET = dict(pre_buffer=False,  # else Arrow holds the whole file
               page_checksum_verification=True)  # where the writer gave pages one (write_page_checksum=True)


def found(pattern: str) -> tuple[str, list[str]]:
    """The folder before the first wildcard, and the sorted files that match."""
    pattern = os.path.abspath(os.path.expanduser(pattern))
    paths = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    if not paths:
        raise ConfigError(f"data.sources: {pattern} matches no file: is the path right?")
    fixed = pattern
    while glob.has_magic(fixed) or os.path.isfile(fixed):
        fixed = os.path.dirname(fixed)
    return fixed, paths


def opened(path: str):
    """A binary file, decompressed if its name ends in .gz or .zst; OSError where the compressed stream breaks off."""
    compression = {".gz": "gzip", ".zst": "zstd"}.get(os.path.splitext(path)[1])
    if compression is None:
        return open(path, "rb")
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(path, compression=compression))
