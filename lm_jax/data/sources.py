"""Where documents come from: `read(spec)` streams them, one document or row group in memory at a time.

A spec is `kind:argument`; a corpus is specs separated by ';'. Bytes are taken as they are, no newline is translated,
and the order is that of the sorted paths, so the same spec over the same files gives the same documents.
"""

import difflib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from types import NoneType
from typing import NamedTuple

from lm_jax.data import inputs, synthetic
from lm_jax.errors import ConfigError, DataError

LARGE = 64 << 20  # bytes of a text file that is still one document
PIECE = 16 << 20  # most bytes of the documents that a larger one is cut into


class Document(NamedTuple):
    id: str  # unique within its source, and stable: a path below the glob's fixed part, a line number
    source: str  # the spec
    text: str  # without lone surrogates: always encodes to UTF-8
    lang: str  # "" if unknown
    meta: dict  # JSON-able


class Dropped(NamedTuple):
    id: str  # as the document's
    reason: str  # a key of the report
    value: float  # what was measured
    threshold: float  # and what it was held against


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


def read(spec: str, *, invalid: str, report: Counter, dropped: Callable[[Dropped], None] = lambda document: None
         ) -> Iterator[Document]:
    """The documents of one spec. `invalid` ("replace", "drop", "error") is what becomes of bytes that are not UTF-8.

    `report` counts documents and bytes (of what is yielded), invalid_utf8 (documents, replaced or dropped; the value is
    how many bytes, where 0 may be) and empty (documents of white space only, which are dropped; the value is how many
    other characters, where 1 must be), and cut (text files of more than LARGE bytes, which become several documents).
    `dropped` is told each document that is not yielded. Raises ConfigError on what cannot be read.
    """
    kind, _, argument = spec.partition(":")
    for id, raw, lang, meta in SOURCES[kind](argument):
        if meta.get("piece") == 1:
            report["cut"] += 1
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            report["invalid_utf8"] += 1
            if invalid == "error":
                raise DataError(f"{spec}: document {id} is not UTF-8 ({error}): repair it, or set data.invalid to "
                                "'replace' or 'drop'") from error
            if invalid == "drop":
                dropped(Dropped(id, "invalid_utf8", len(raw) - len(raw.decode(errors="ignore").encode()), 0))
                continue
            text = raw.decode(errors="replace")
            raw = text.encode()
        if not text.strip():
            report["empty"] += 1
            dropped(Dropped(id, "empty", 0, 1))
            continue
        report["documents"] += 1
        report["bytes"] += len(raw)
        yield Document(id, spec, text, lang, meta)


def files(spec: str) -> list[str]:
    """The files that a spec reads, sorted; none for sources that are not files."""
    kind, _, argument = spec.partition(":")
    if kind == "stdlib":
        return list(_stdlib_paths())
    pattern = argument if kind == "text" else _field(argument)[0]
    return inputs.found(pattern)[1] if kind in ("text", "jsonl", "parquet") else []


Raw = tuple[str, bytes, str, dict]  # id, bytes, lang, meta: what a kind's function yields


def stdlib(argument: str) -> Iterator[Raw]:
    """The running interpreter's own library: some 700 files, 12 MB of Python and English, on every machine."""
    if argument:
        raise ConfigError(f"data.sources: stdlib takes no argument, got {argument!r}")
    root = os.path.dirname(os.__file__)
    for path in _stdlib_paths():
        with open(path, "rb") as file:
            yield _id(path, root), file.read(), "python", {}


def text(argument: str) -> Iterator[Raw]:
    """`text:GLOB`: each file is a document; one of more than LARGE bytes is several, `path:000001` and so on."""
    root, paths = inputs.found(argument)
    for path in paths:
        try:
            with inputs.opened(path) as file:
                held = file.read(LARGE + 1)
                if len(held) <= LARGE:
                    yield _id(path, root), held, "", {}
                    continue
                for number, piece in enumerate(_pieces(held, file), 1):
                    yield f"{_id(path, root)}:{number:06d}", piece, "", {"piece": number}
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error}; repair it, or leave it out of data.sources") from error


def jsonl(argument: str) -> Iterator[Raw]:
    """`jsonl:GLOB#field`: each line is an object, a document its field (default "text"); "id" and "lang" are kept."""
    pattern, field = _field(argument)
    root, paths = inputs.found(pattern)
    for path in paths:
        for number, line in _lines(path):
            place = f"{path}:{number}"
            try:
                row = json.loads(line.decode(errors="surrogateescape"))  # bad bytes come back from _bytes as they were
            except (ValueError, RecursionError) as error:
                raise DataError(f"{place} is not JSON ({error}): mend the line or take it out") from error
            if not isinstance(row, dict):
                raise DataError(f"{place} is {type(row).__name__}, not a JSON object: mend the line or take it out")
            id, lang = row.get("id"), row.get("lang")
            id = f"{_id(path, root)}:{number}" if id is None else _printable(str(id))
            yield id, _bytes(_value(row, field, place), place), lang if isinstance(lang, str) else "", {}


def parquet(argument: str) -> Iterator[Raw]:
    """`parquet:GLOB#column`: each row is a document, its column (default "text") of strings or bytes.

    Columns "id" and "lang" are kept.
    """
    import pyarrow
    import pyarrow.parquet

    pattern, column = _field(argument)
    root, paths = inputs.found(pattern)
    for path in paths:
        number = 0
        try:
            with pyarrow.parquet.ParquetFile(path, **inputs.PARQUET) as file:
                names = file.schema_arrow.names
                _value(dict.fromkeys(names), column, path)
                kept = [name for name in ("id", "lang") if name in names and name != column]
                for batch in file.iter_batches(batch_size=256, columns=[column, *kept]):
                    values = batch[column].cast(pyarrow.large_binary()).to_pylist()  # Arrow does not check UTF-8
                    for value, row in zip(values, batch.select(kept).to_pylist() if kept else [{}] * len(values)):
                        number += 1
                        id, lang = row.get("id"), row.get("lang")
                        yield f"{_id(path, root)}:{number}" if id is None else str(id), value or b"", lang or "", {}
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path} cannot be read beyond its first {number} rows of text in {column!r}: {error}; "
                            "repair it, or leave it out of data.sources") from error


def tfds(argument: str) -> Iterator[Raw]:
    """`tfds:NAME[:SPLIT][#field]` (split "train", field "text"), without TensorFlow: array_record or parquet files.

    NAME may have a config and a version (name/config:1.2.3). The data lie in, or go to, $TFDS_DATA_DIR.
    """
    import tensorflow_datasets

    given, field = _field(argument)
    name, split = re.fullmatch(r"([^:]*(?::\d+\.\d+\.\d+)?)(?::(.*))?", given, re.DOTALL).groups()
    try:
        data = tensorflow_datasets.data_source(name, split=split or "train", data_dir=os.environ.get("TFDS_DATA_DIR"))
    except tensorflow_datasets.core.DatasetNotFoundError as error:  # whose text is a list of all there are
        names = tensorflow_datasets.list_builders(with_community_datasets=False)  # those are on the network
        near = difflib.get_close_matches(re.split("[/:]", name)[0], names)
        hint = f"did you mean {' or '.join(near)}?" if near else "is it in $TFDS_DATA_DIR?"
        raise ConfigError(f"data.sources: tfds:{given} names no data set: {hint}") from error
    except Exception as error:  # whatever else TFDS raises: no network, files in a format that it cannot index
        raise ConfigError(f"data.sources: tfds:{given} cannot be opened: {_cause(error)}") from error
    for number in range(len(data)):
        place = f"tfds:{given} record {number}"
        try:
            row = data[number]
        except Exception as error:  # of the format's own library, which checks sums
            raise DataError(f"{place} cannot be read: {_cause(error)}; repair or prepare the set again") from error
        yield f"{name}:{split or 'train'}:{number}", _bytes(_value(row, field, place), place), "", {}


def known(kind: str) -> Callable[[str], Iterator[Raw]]:
    """A synthetic source, whose documents carry their true cost in meta["nats"]."""

    def documents(argument: str) -> Iterator[Raw]:
        for number, (text, nats) in enumerate(synthetic.read(f"{kind}:{argument}")):
            yield f"{kind}:{number}", text.encode(), "", {"nats": nats}

    return documents


SOURCES = {"stdlib": stdlib, "text": text, "jsonl": jsonl, "parquet": parquet, "tfds": tfds,
           **{kind: known(kind) for kind in synthetic.LAWS}}

NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "turtledemo", "__pycache__"}


def _stdlib_paths() -> Iterator[str]:
    for folder, folders, names in os.walk(os.path.dirname(os.__file__)):
        folders[:] = sorted(set(folders) - NOT_LIBRARY)
        yield from (os.path.join(folder, name) for name in sorted(names) if name.endswith(".py"))


def _pieces(held: bytes, file) -> Iterator[bytes]:
    """What was read of a file and what is left of it, cut at line ends, or between characters in longer lines."""
    start = 0
    while start < len(held):
        if len(held) - start <= PIECE:
            held, start = held[start:] + file.read(PIECE), 0
        end = start + PIECE
        if end < len(held):
            line = held.rfind(b"\n", start, end) + 1
            while not line and end > start + PIECE - 4 and held[end] & 0xC0 == 0x80:  # a byte inside a character
                end -= 1
            end = line or end
        yield held[start:end]
        start = end


def _lines(path: str) -> Iterator[tuple[int, bytes]]:
    """Numbered lines from 1, blank ones left out."""
    number = 0
    try:
        with inputs.opened(path) as file:
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    yield number, line
    except OSError as error:
        raise DataError(f"{path} cannot be read beyond its first {number} lines: {error}; repair it, or leave it out "
                        "of data.sources") from error


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _field(argument: str) -> tuple[str, str]:
    """The parts of `GLOB#field`."""
    pattern, mark, field = argument.rpartition("#")
    return (pattern, field) if mark else (argument, "text")


def _value(row: dict, field: str, place: str):
    if field not in row:
        raise ConfigError(f"{place} has no field {field!r}: name one of {', '.join(map(repr, row))} after '#'")
    return row[field]


def _bytes(value, place: str) -> bytes:
    """The bytes of a text field. Lone surrogates, which JSON can spell and UTF-8 cannot, become invalid bytes."""
    if not isinstance(value, (str, bytes, NoneType)):
        raise ConfigError(f"{place}: the field is {type(value).__name__}, not text; name another one after '#'")
    if not isinstance(value, str):
        return value or b""
    try:
        return value.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        return value.encode(errors="surrogatepass")


def _id(path: str, root: str) -> str:
    return _printable(os.path.relpath(path, root).replace(os.sep, "/"))


def _printable(id: str) -> str:
    """The same id with what UTF-8 cannot write (a file name may hold any bytes) spelled as escapes."""
    return id.encode(errors="backslashreplace").decode()
