"""A prepared corpus on disk: found by digest, built where it is missing, read through memory maps.

    <root>/<sources>/<identity>/manifest.json card.md
        docs/part-<source>-<split>-*.parquet                  id source text lang meta
        dropped/<stage>/part-<source>-*.parquet               id reason value threshold; kept and dropped are the input
        tokenizer/<kind>-<size>/                              trained on the training split
        tokens/<tokenizer>/tokens-*.npy offsets-*.npy         a shard a part, uint16 or uint32; blocks.npy
        packs/<tokenizer>/<window>+<overlap>-<strategy>/      rows-*.npy segments-*.npy; blocks.npy

The identity is that of the input: the specs, and for files their paths, sizes and times of change, which a corpus of
any size gives at once (a touched file costs a rebuild, a changed one is noticed); a TFDS data set is known by its name,
so pin its version. `Store.digest` is of the content: the same text elsewhere trains the same rows.
"""

import contextlib
import fcntl
import itertools
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from lm_jax import config, disk
from lm_jax.config import DataConfig
from lm_jax.data import build, documents, shards, sources
from lm_jax.data import tokenizer as tokenizers
from lm_jax.errors import FULL, REFUSED, ConfigError, DataError

FORMAT = 4  # raise it when the stages write something else: older stores are then left alone


def prepare(data: DataConfig, *, say=print) -> "Store":
    """The store of `data`; whatever stage is missing is built first, and `say` is told.

    Raises ConfigError on an empty source or a full disk, DataError on a source that cannot be read and on a file that
    is not what the manifest says.
    """
    specs = sources.parse(data.sources)
    named = dict(zip(tags(specs), specs))
    identity = {"format": FORMAT, "sources": [_identity(spec) for spec in specs], "invalid": data.invalid,
                "validation": data.validation}
    path = Path(data.root) / "+".join(named)[:64] / config.digest(identity)
    manifest = _manifest(path) or {"name": "+".join(named), "identity": identity, "sources": named, "stages": {}}
    if not _whole(data, manifest):
        with _explained(data.root):
            path.mkdir(parents=True, exist_ok=True)
            with _lock(path, say):
                manifest = _manifest(path) or manifest  # another builder may have been here
                build.build(path, manifest, data, say)
    return Store(path, manifest, build.stage_names(data, manifest))


def tags(specs: list[str]) -> list[str]:
    """A short name for each source, unique, fit for files and metrics: text:/a/poems.txt is "poems"."""
    names = []
    for spec in specs:
        kind, _, argument = spec.partition(":")
        name = kind
        if kind in ("text", "jsonl", "parquet"):
            parts = Path(argument.rpartition("#")[0] or argument).parts
            words = [re.sub(r"[^\w]+", "-", part.split(".")[0]).strip("-") for part in parts]
            name = next((word for word in reversed(words) if word), kind)
        elif kind == "tfds":
            name = re.sub(r"[^\w]+", "-", argument.split(":")[0].split("#")[0]).strip("-") or kind
        choices = [name, *(f"{name}-{n}" for n in range(2, len(specs) + 2))]
        names.append(next(tag for tag in choices if tag not in names))
    return names


class Store:
    """What training reads: rows, a tokenizer, counts.

    manifest["splits"][split][tag]: docs, bytes, tokens (predicted ones: all but bos), rows, utilisation, nats (the
    documents' true cost, None where unknown). manifest["read"][tag] counts what a source held, the dropped too.
    """

    def __init__(self, path: Path, manifest: dict, names: dict[str, str]):
        self.path, self.names = path, names
        self.stages = {kind: manifest["stages"][name] for kind, name in names.items()}
        splits = {split: {tag: {key: value for kind in ("docs", "tokens", "packs")
                                for key, value in self.stages[kind]["splits"][split][tag].items()}
                          for tag in manifest["sources"]} for split in documents.SPLITS}
        self.manifest = {key: manifest[key] for key in ("name", "identity", "sources")}
        self.manifest |= {"stages": {name: self.stages[kind] for kind, name in names.items()}, "splits": splits,
                          "read": self.stages["docs"]["read"]}
        self.tags = list(manifest["sources"])
        read = [(name, file["sha256"]) for kind in ("tokens", "packs")
                for name, file in self.stages[kind]["files"].items() if name != shards.BLOCKS]
        self.digest = config.digest([self.tags, self.stages["tokenizer"]["digest"], read])
        self._each(shards.sized)

    @cached_property
    def tokenizer(self) -> tokenizers.Tokenizer:
        return build.tokenizer(self.path / self.names["tokenizer"], self.stages["tokenizer"])

    def rows(self, split: str, tag: str) -> "Rows":
        """The packed rows of one source, memory-mapped; what of them is damaged is a DataError when it is read."""
        def opened(kind, name):
            return shards.Shard(self.path / self.names[kind] / name, self._digests[kind][name])

        files = build.shard_files(self.stages["tokens"], split, tag)
        names = [f"tokens-{build.shard_name(tag, split, file['number'])}" for file in files]
        return Rows(opened("packs", f"rows-{tag}-{split}.npy"), opened("packs", f"segments-{tag}-{split}.npy"),
                    [partial(opened, "tokens", name) for name in names])

    def held_out(self, tag: str) -> Iterator[str]:
        """The texts of the validation documents, in order."""
        files = self.stages["docs"]["files"].items()
        return documents.texts(shards.proven(self.path / self.names["docs"] / name, file) for name, file in files
                               if (file["split"], file["tag"]) == ("validation", tag))

    def verify(self):
        """Hold every file against its digest; training does so with what it reads, when it first reads it."""
        self._each(shards.proven)

    @cached_property
    def _digests(self) -> dict[str, dict]:
        """Of the blocks of each array: kind of stage -> file -> digests."""
        return {kind: shards.of_blocks(self.path / self.names[kind], self.stages[kind]["files"])
                for kind in ("tokens", "packs")}

    def _each(self, check):
        for kind, name in self.names.items():
            for file, entry in self.stages[kind]["files"].items():
                check(self.path / name / file, entry)


class Rows:
    """rows[i] is a list of pieces: windows of one document each, as read-only views of the mapped shards. Many rows
    are found at once in a tenth of the time."""

    def __init__(self, starts: shards.Shard, segments: shards.Shard, tokens: list[Callable[[], shards.Shard]]):
        self._starts, self._segments = starts, segments
        self._open, self._tokens = tokens, [None] * len(tokens)  # files of a large corpus are opened when needed

    def __len__(self):
        return len(self._starts) - 1

    def __getitem__(self, i: int) -> list[np.ndarray]:
        return self.take(np.array([i]))[0]

    def take(self, rows: np.ndarray) -> list[list[np.ndarray]]:
        """The pieces of each of these rows."""
        first, end = self._starts.take(np.stack([rows, rows + 1]))
        ends = np.cumsum(end - first)
        segments = self._segments.take(np.arange(len(rows) and ends[-1]) + np.repeat(end - ends, end - first))
        pieces = [self._shard(shard)[start : start + length] for shard, start, length in segments.tolist()]
        return [pieces[a:b] for a, b in itertools.pairwise([0, *ends.tolist()])]

    def _shard(self, number):
        if self._tokens[number] is None:
            self._tokens[number] = self._open[number]()
        return self._tokens[number]


@contextlib.contextmanager
def _lock(folder: Path, say):
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
def _explained(root):
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


def _identity(spec):
    """What decides the documents of a spec; a file by path, size and time of change."""
    files = [(path, (stat := os.stat(path)).st_size, stat.st_mtime_ns) for path in sources.files(spec)]
    return [spec, files, platform.python_version() if spec == "stdlib" else ""]


def _manifest(path):
    """What the manifest says, if there is one and it is as it was written."""
    file = path / "manifest.json"
    try:
        manifest = disk.read_json(file)
        whole = manifest is None or manifest.pop("digest") == config.digest(manifest)
        for stage, record in (manifest["stages"] if manifest else {}).items():
            for name in record["files"]:
                disk.inside(disk.inside(path, stage), name)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise DataError(f"{file} is not what was written ({error!r}): delete it to build a new store") from error
    if not whole:
        raise DataError(f"{file} is not what was written (its digest is another): delete it to build a new store")
    return manifest


def _whole(data, manifest):
    names = build.stage_names(data, manifest)
    return names is not None and all(name in manifest["stages"] for name in names.values())
