"""A prepared corpus on disk: found by digest, built where it is missing, read through memory maps.

    <root>/<sources>/<identity>/manifest.json card.md
        docs/part-<source>-<split>-*.parquet                  id source text lang meta
        dropped/<stage>/part-<source>-*.parquet               id reason value threshold; kept and dropped are the input
        tokenizer/<kind>-<size>/                              trained on the training split
        tokens/<tokenizer>/tokens-*.npy offsets-*.npy         a shard a part, uint16 or uint32
        packs/<tokenizer>/<window>+<overlap>-<strategy>/      rows-*.npy segments-*.npy

The identity is that of the input: the specs, and for files their paths, sizes and times of change, which a corpus of
any size gives at once (a touched file costs a rebuild, a changed one is noticed); a TFDS data set is known by its name,
so pin its version. `Store.digest` is of the content: the same text elsewhere trains the same rows.
"""

import contextlib
import fcntl
import os
import platform
import re
import shutil
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from lm_jax import config, disk
from lm_jax.config import DataConfig
from lm_jax.data import build, documents, sources
from lm_jax.data import tokenizer as tokenizers
from lm_jax.errors import FULL, REFUSED, ConfigError, DataError

FORMAT = 3  # raise it when the stages write something else: older stores are then left alone


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
                for name, file in self.stages[kind]["files"].items()]
        self.digest = config.digest([self.tags, self.stages["tokenizer"]["digest"], read])
        self._check(lambda file, entry: os.path.getsize(file) == entry["bytes"])

    @cached_property
    def tokenizer(self) -> tokenizers.Tokenizer:
        return tokenizers.load(str(self.path / self.names["tokenizer"]))

    def rows(self, split: str, tag: str) -> "Rows":
        """The packed rows of one source, memory-mapped."""
        packs, shards = self.path / self.names["packs"], self.path / self.names["tokens"]
        files = build.shard_files(self.stages["tokens"], split, tag)
        return Rows(np.load(packs / f"rows-{tag}-{split}.npy", mmap_mode="r"),
                    np.load(packs / f"segments-{tag}-{split}.npy", mmap_mode="r"),
                    [shards / f"tokens-{build.shard_name(tag, split, file['number'])}" for file in files])

    def held_out(self, tag: str) -> Iterator[str]:
        """The texts of the validation documents, in order."""
        files = self.stages["docs"]["files"].items()
        return documents.texts(self.path / self.names["docs"] / name for name, file in files
                               if (file["split"], file["tag"]) == ("validation", tag))

    def verify(self):
        """Read every file and compare its digest with the manifest's; sizes are compared at each opening."""
        self._check(lambda file, entry: disk.sha256(file) == entry["sha256"])

    def _check(self, right):
        for kind, name in self.names.items():
            for file, entry in self.stages[kind]["files"].items():
                path = self.path / name / file
                if not path.exists() or not right(path, entry):
                    wrong = "is not what its manifest says" if path.exists() else "is missing"
                    raise DataError(f"{path} {wrong}: delete {self.path / 'manifest.json'} to build this store again")


class Rows:
    """rows[i] is a list of pieces: windows of one document each, as read-only views of the mapped shards."""

    def __init__(self, starts, segments, shards: list[Path]):
        self._starts, self._segments = np.asarray(starts), np.asarray(segments)
        self._paths, self._shards = shards, [None] * len(shards)

    def __len__(self):
        return len(self._starts) - 1

    def __getitem__(self, i):
        return [self._shard(shard)[start : start + length]
                for shard, start, length in self._segments[self._starts[i] : self._starts[i + 1]].tolist()]

    def _shard(self, number):
        if self._shards[number] is None:
            self._shards[number] = np.asarray(np.load(self._paths[number], mmap_mode="r"))
        return self._shards[number]


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
    try:
        return disk.read_json(path / "manifest.json")
    except ValueError as error:
        raise DataError(f"{path / 'manifest.json'} is no JSON ({error}): delete it to build a new store") from error


def _whole(data, manifest):
    names = build.stage_names(data, manifest)
    return names is not None and all(name in manifest["stages"] for name in names.values())
