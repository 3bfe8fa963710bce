"""The first stage of a store: every source is read once into Parquet parts, split into train and validation.

A document's split follows from a hash of its id, so it does not move when other documents come or go.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from lm_jax.data import sources
from lm_jax.errors import ConfigError, DataError

SPLITS = ("train", "validation")
GROUP = 4 << 20  # bytes of text held in memory, a Parquet row group
ROWS = 1 << 16  # and its most rows, for documents of a few bytes
PART = 64 << 20  # bytes of text in a file, and so in a shard of tokens


def write(folder: Path, data, specs: dict[str, str], say) -> dict:
    """Parts of all sources, and in folder/dropped those of what is not kept: together they are the whole input.

    Returns the record of the stage: files, documents and bytes a split, what was read.
    """
    record = {"files": {}, "dropped": {}, "splits": {split: {} for split in SPLITS}, "read": {}}
    for tag, spec in specs.items():
        parts, dropped, report = _split(folder, tag, spec, data, say)
        record["read"][tag] = dict(report)
        record["dropped"] |= dropped.files
        for split, part in parts.items():
            record["splits"][split][tag] = {"docs": part.docs, "bytes": part.bytes, "nats": part.nats}
            record["files"] |= part.files
    return record


def groups(path: Path, column: str = "text") -> Iterator[list[str]]:
    """A column of a part, one row group at a time. DataError where the part is damaged."""
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for i in range(file.num_row_groups):
                yield file.read_row_group(i, columns=[column])[column].to_pylist()
    except (pyarrow.ArrowException, OSError, KeyError) as error:
        raise DataError(f"{path} cannot be read: {error}; delete the store's manifest.json to build it "
                        "again") from error


def texts(paths) -> Iterator[str]:
    for path in paths:
        for group in groups(path):
            yield from group


class Parts:
    """Rows of one kind appended to part after part, `key` naming the files; memory is one row group."""

    def __init__(self, folder: Path, kind: type, **key: str):
        self.folder, self.key = folder, key
        self.files, self.docs, self.bytes, self.nats = {}, 0, 0, 0.0
        self._columns = kind.__annotations__
        self._rows, self._held, self._written, self._writer = [], 0, 0, None

    def add(self, row: tuple, *, size: int = 0, nats: float | None = None):
        """Append a row that stands for `size` bytes of text, whose true cost is `nats` if it is known."""
        self._rows.append(row)
        self._held, self.docs, self.bytes = self._held + size, self.docs + 1, self.bytes + size
        self.nats = None if nats is None or self.nats is None else self.nats + nats
        if self._held >= GROUP or len(self._rows) >= ROWS:
            self._flush()

    def close(self):
        self._flush()
        self._end()

    def _flush(self):
        import pyarrow

        if not self._rows:
            return
        if self._writer is None:
            self._begin()
        arrays = map(pyarrow.array, zip(*self._rows), self._schema.types)
        self._writer.write_table(pyarrow.Table.from_arrays(list(arrays), schema=self._schema))
        self.files[self._name]["docs"] += len(self._rows)
        self._written += self._held
        self._rows, self._held = [], 0
        if self._written >= PART:
            self._end()

    def _begin(self):
        import pyarrow
        import pyarrow.parquet

        number = len(self.files)
        self._name = "-".join(("part", *self.key.values(), f"{number:05d}.parquet"))
        self.files[self._name] = self.key | {"number": number, "docs": 0}
        self._schema = pyarrow.schema([(name, pyarrow.float64() if type is float else pyarrow.large_string())
                                       for name, type in self._columns.items()])
        self.folder.mkdir(exist_ok=True)
        self._file = open(self.folder / self._name, "wb")
        self._writer = pyarrow.parquet.ParquetWriter(self._file, self._schema, compression="zstd")

    def _end(self):
        if self._writer is not None:
            self._writer.close()
            self._file.close()
            self._writer, self._written = None, 0


def _split(folder, tag, spec, data, say):
    """(parts by split, parts of what was dropped, counts of what was read) of one source; neither split is empty.

    If all of a few documents hash to one side, the line between the sides moves and the source is read again.
    """
    line, halve = int(data.validation * 2.0**64), False
    for _ in range(2):
        report, hashes = Counter(), [1 << 64, -1]
        parts = {split: Parts(folder, sources.Document, tag=tag, split=split) for split in SPLITS}
        dropped = Parts(folder / "dropped", sources.Dropped, tag=tag)
        told = time.monotonic()
        for document in sources.read(spec, invalid=data.invalid, report=report, dropped=dropped.add):
            if time.monotonic() - told > 5:
                told = time.monotonic()
                say(f"{tag}: {report['documents']:,} documents, {report['bytes'] / 1e6:,.0f} MB")
            h = int.from_bytes(hashlib.sha256(document.id.encode()).digest()[:8])
            hashes = [min(hashes[0], h), max(hashes[1], h)]
            if halve:
                for split, half in zip(SPLITS, _halves(document, data.validation)):
                    _keep(half, parts[split])
            else:
                _keep(document, parts["validation" if h < line else "train"])
        for part in (*parts.values(), dropped):
            part.close()
        if report["cut"]:
            say(f"{tag}: {report['cut']:,} files of more than {sources.LARGE / 1e6:,.0f} MB are cut at line ends into "
                f"documents of at most {sources.PIECE / 1e6:,.0f} MB")
        if not report["documents"]:
            raise ConfigError(f"data.sources: {spec} has no document with text ({report['empty']:,} of white space "
                              f"only, {report['invalid_utf8']:,} not UTF-8): is it the right source?")
        if all(part.docs for part in parts.values()):
            return parts, dropped, report
        halve = report["documents"] == 1
        line = hashes[1] if parts["validation"].docs else hashes[0] + 1
        say(f"{tag}: a single document, whose end is held out for validation" if halve else
            f"{tag}: {report['documents']} documents, one moved so that both train and validation have text")
    raise ConfigError(f"data.sources: {spec} cannot be split into train and validation: give it another document")


def _keep(document, part):
    row = document._replace(meta=json.dumps(document.meta))
    part.add(row, size=len(document.text.encode()), nats=document.meta.get("nats"))  # of sources of known entropy


def _halves(document, share):
    """A document cut at the line that ends nearest before the validation share."""
    at = document.text.rfind("\n", 0, int(len(document.text) * (1 - share))) + 1
    at = at or max(1, int(len(document.text) * (1 - share)))
    halves = ((document.id + "#train", document.text[:at]), (document.id + "#validation", document.text[at:]))
    return [document._replace(id=id, text=text, meta={}) for id, text in halves if text.strip()]
