"""Where documents come from: `read(spec)` streams them, one document or row group in memory at a time.

A spec is `kind:argument`; a corpus is specs separated by ';'. Bytes are taken as they are, no newline is translated,
and the order is that of the sorted paths, so the same spec over the same files gives the same documents.
"""

import difflib
import glob
import os
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from lm_jax.config import ConfigError


class Document(NamedTuple):
    id: str  # unique within its source, and stable: a path below the glob's fixed part, a line number
    source: str  # the spec
    text: str  # without lone surrogates: always encodes to UTF-8
    lang: str  # "" if unknown
    meta: dict  # JSON-able


def parse(sources: str) -> list[str]:
    """The specs of `config.data.sources`; raises ConfigError if there are none or one is of no known kind."""
    specs = [spec.strip() for spec in sources.split(";") if spec.strip()]
    if not specs:
        raise ConfigError("data.sources is empty: name one, such as stdlib or text:corpus/*.txt")
    for spec in specs:
        kind = spec.partition(":")[0]
        if kind not in SOURCES:
            near = difflib.get_close_matches(kind, SOURCES, n=1)
            hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(SOURCES)}"
            raise ConfigError(f"data.sources: {spec!r} is of no known kind: {hint}")
    return specs


def read(spec: str, *, invalid: str, report: Counter) -> Iterator[Document]:
    """The documents of one spec. `invalid` ("replace", "drop", "error") is what becomes of bytes that are not UTF-8.

    `report` counts documents and bytes (of what is yielded), invalid_utf8 (documents, replaced or dropped) and
    empty (documents of white space only, which are dropped). Raises ConfigError on what cannot be read.
    """
    kind, _, argument = spec.partition(":")
    for id, raw, lang, meta in SOURCES[kind](argument):
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            report["invalid_utf8"] += 1
            if invalid == "error":
                raise ConfigError(f"{spec}: document {id} is not UTF-8 ({error}): repair it, or set data.invalid to "
                                  "'replace' or 'drop'") from error
            if invalid == "drop":
                continue
            text = raw.decode(errors="replace")
        if not text.strip():
            report["empty"] += 1
            continue
        report["documents"] += 1
        report["bytes"] += len(raw)
        yield Document(id, spec, text, lang, meta)


def files(spec: str) -> list[str]:
    """The files that a spec reads, sorted; none for sources that are not files."""
    kind, _, argument = spec.partition(":")
    if kind == "stdlib":
        return list(_stdlib_paths())
    return _paths(argument.rpartition("#")[0] or argument)[1] if kind in ("text", "jsonl", "parquet") else []


Raw = tuple[str, bytes, str, dict]  # id, bytes, lang, meta


def stdlib(argument: str) -> Iterator[Raw]:
    """The running interpreter's own library: some 700 files, 12 MB of Python and English, on every machine."""
    for path in _stdlib_paths():
        with open(path, "rb") as file:
            yield os.path.relpath(path, os.path.dirname(os.__file__)), file.read(), "python", {}


def text(argument: str) -> Iterator[Raw]:
    """`text:GLOB`: each file is a document."""
    root, paths = _paths(argument)
    for path in paths:
        with open(path, "rb") as file:
            yield os.path.relpath(path, root), file.read(), "", {}


SOURCES = {"stdlib": stdlib, "text": text}

NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "turtledemo", "__pycache__"}


def _stdlib_paths() -> Iterator[str]:
    for folder, folders, names in os.walk(os.path.dirname(os.__file__)):
        folders[:] = sorted(set(folders) - NOT_LIBRARY)
        yield from (os.path.join(folder, name) for name in sorted(names) if name.endswith(".py"))


def _paths(pattern: str) -> tuple[str, list[str]]:
    """The folder before the first wildcard, and the sorted files that match."""
    pattern = os.path.abspath(os.path.expanduser(pattern))
    paths = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    if not paths:
        raise ConfigError(f"data.sources: {pattern} matches no file: is the path right?")
    fixed = pattern
    while glob.has_magic(fixed) or os.path.isfile(fixed):
        fixed = os.path.dirname(fixed)
    return fixed, paths
