"""A folder as transformers saves it: config.json, safetensors whole or in shards, and a tokenizer's files."""

import json
import os
import re
import shutil
from pathlib import Path

import lm_jax.hub.tensors as tensors
from lm_jax import disk
from lm_jax.errors import ConfigError, DataError
from lm_jax.hub.tensors import Scaled, Tensor

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = 5 * 10**9  # bytes of a file
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack")
# What travels with a model besides its weights: what is needed to read text as it does, and to talk with it.
COPIED = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
          "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "generation_config.json",
          "chat_template.jinja", "chat_template.json")
LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE")  # under which it may be passed on
OLD_WORDS = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}  # of files from TensorFlow


def config(folder: Path) -> dict:
    """Its config.json, which is a model's."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder: pass one with a config.json, as transformers saves it")
    if not (found := read_json(folder / "config.json")):
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        raise ConfigError(f"{folder} has no config.json ({there} is in it): pass a folder as transformers saves it")
    _no_links_out(folder.resolve())
    if "train" in found:
        raise ConfigError(f"{folder} is a run's folder: `python -m lm_jax.convert {folder} OUT` writes one that can be "
                          "opened")
    return found


def read_json(file: Path) -> dict:
    """What a JSON file of a folder says; {} where there is none."""
    try:
        found = disk.read_json(file)
    except (ValueError, OSError) as error:
        raise DataError(f"{file} is no JSON ({error}): fetch it again") from error
    if found is not None and not isinstance(found, dict):
        raise DataError(f"{file} has a {type(found).__name__} where names and values are wanted: fetch it again")
    return found or {}


def whole(folder: Path) -> bool:
    """Whether a model's config.json and every file of its weights are here."""
    try:
        files = [*_shards(folder / INDEX)] if (folder / INDEX).exists() else [folder / WHOLE]
    except DataError:  # one is not there, or the index is cut off
        return False
    return all(file.is_file() for file in [folder / "config.json", *files])


def read(folder: Path) -> dict[str, Tensor]:
    """Name -> tensor of all its safetensors; nothing but headers is read. Numbers of 8 bits come with their scales."""
    index = folder / INDEX
    found = {}
    for file in _shards(index) if index.exists() else _alone(folder):
        more = tensors.read(file)
        if twice := found.keys() & more.keys():
            raise DataError(f"{file} has {min(twice)!r}, which another file of {folder} has too")
        found |= more
    if index.exists() and (gone := set(_index(index)) - found.keys()):
        raise DataError(f"{index} names {min(gone)!r}, which no file has: fetch the folder again")
    for old, new in OLD_WORDS.items():
        found = {re.sub(rf"{re.escape(old)}$", new, name): tensor for name, tensor in found.items()}
    scaled = {name: Scaled(tensor, found[f"{name}_scale_inv"]) for name, tensor in found.items()
              if f"{name}_scale_inv" in found}
    return {name: tensor for name, tensor in (found | scaled).items() if not name.endswith("_scale_inv")}


def write(folder: Path, hf: dict, entries: dict, tensor, *, shard: int = SHARD):
    """Write config.json and the tensors that `tensor(name)` gives, replacing a model that was there."""
    if shard < 1:
        raise ConfigError(f"files of at most {shard} bytes: at least 1")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(f"{folder} cannot be a folder, a file has that name: pass another to write to") from error
    if "train" in read_json(folder / "config.json"):
        raise ConfigError(f"{folder} is a run's folder, whose config.json would be lost: pass another to write to")
    parts = list(tensors.shards(tensors.ordered(entries), shard))
    files = [WHOLE] if len(parts) == 1 else [f"model-{i + 1:05}-of-{len(parts):05}.safetensors"
                                             for i in range(len(parts))]
    for name, part in zip(files, parts):
        tensors.write(folder / name, part, map(tensor, part))
    if len(parts) > 1:
        disk.replace(folder / INDEX, [json.dumps(_map(files, parts), indent=2), "\n"])
    for stale in {path.name for path in folder.glob("model*.safetensors*")} - {*files, *[INDEX] * (len(parts) > 1)}:
        (folder / stale).unlink()
    disk.replace(folder / "config.json", [json.dumps(hf, indent=2, sort_keys=True), "\n"])


def copy(source: Path | None, target: Path, *, replaces: bool):
    """Copy what travels with a model besides its weights; what another model has left there goes. A licence that is
    there without a model may be of other things, and stays."""
    if source and source.resolve() == target.resolve():
        return
    for name in (*COPIED, *LICENCES):
        if source and (source / name).is_file():
            shutil.copyfile(source / name, target / name)
        elif replaces or name in COPIED:
            (target / name).unlink(missing_ok=True)


def tokens(folder: Path) -> int:
    """How many ids its tokenizer has, special ones that were added behind them aside; 0 where there is none."""
    for name, count in COUNTS.items():
        if (folder / name).is_file():
            try:
                return count((folder / name).read_bytes())
            except (ValueError, KeyError, AttributeError, TypeError, RuntimeError) as error:  # and RecursionError
                raise DataError(f"{folder / name} is no tokenizer ({error!r}): fetch it again") from error
    return 0


def _listed(file: bytes) -> int:
    """Of a tokenizer.json: a vocabulary is a table, or a list in unigram models."""
    vocabulary = json.loads(file)["model"].get("vocab") or {}
    return len(vocabulary) if isinstance(vocabulary, list) else 1 + max(vocabulary.values(), default=-1)


def _pieces(file: bytes) -> int:
    import sentencepiece

    return len(sentencepiece.SentencePieceProcessor(model_proto=file))


COUNTS = {"tokenizer.json": _listed, "tokenizer.model": _pieces, "spiece.model": _pieces,
          "vocab.json": lambda file: 1 + max(json.loads(file).values()),
          "vocab.txt": lambda file: len(file.splitlines())}


def _no_links_out(folder: Path):
    """Refuse links to files elsewhere: what is copied or sent with a model is its own. A hub's snapshot is of links to
    its blobs."""
    homes = [folder, *([folder.parents[1] / "blobs"] if folder.parent.name == "snapshots" else [])]
    for path in folder.rglob("*"):
        if path.is_symlink() and not any(path.resolve().is_relative_to(home) for home in homes):
            raise DataError(f"{path} is a link to {os.readlink(path)}, outside its folder: refused; put the file "
                            "itself there if it is meant")


def _alone(folder):
    if (folder / WHOLE).exists():
        return [folder / WHOLE]
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES or ".bin." in path.name)
    if pickles:
        raise ConfigError(f"{folder} has no safetensors, only {pickles[0]}: opening such a file can run whatever is in "
                          "it, so it is refused. Save the model with safe_serialization=True, or fetch it with "
                          f"{WHOLE}")
    raise ConfigError(f"{folder} has neither {WHOLE} nor {INDEX}: fetch the model's weights too")


def _index(file) -> dict[str, str]:
    found = read_json(file).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise DataError(f"{file} is no index of weights: its weight_map names no file for each tensor: fetch it again")
    return found


def _shards(index):
    """The files that an index names, each in the index's own folder."""
    for name in sorted(set(_index(index).values())):
        file = disk.inside(index.parent, name)
        if file.suffix != ".safetensors":
            raise DataError(f"{index} names {name!r}: only safetensors are read")
        if not file.is_file():
            raise DataError(f"{index} names {name!r}, which is not there: fetch it too")
        yield file


def _map(files, parts):
    """The index of several files."""
    sizes = [tensors.size(*entry) for part in parts for entry in part.values()]
    where = {name: file for file, part in zip(files, parts) for name in part}
    return {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(where.items()))}
