"""The stages of a store: documents -> tokenizer -> tokens -> packs. Each is written whole or not at all.

A stage works in a hidden folder; what it drops is listed in a folder `dropped` in there, which becomes dropped/<stage>.
Its files are synced and hashed, the folder is renamed, and only then the manifest names it. What the manifest does not
name is built again. Memory is that of one group of documents, or of the offsets of one shard, however large the corpus.
"""

import json
import shutil
import time
from collections import Counter
from importlib import metadata
from pathlib import Path

import numpy as np

import lm_jax
from lm_jax import config, disk
from lm_jax.data import documents, examples, pack, shards
from lm_jax.data import tokenizer as tokenizers
from lm_jax.data.documents import SPLITS
from lm_jax.data.shards import NpyWriter, proven

SAMPLED = 32  # parts of each source that a tokenizer is trained on, evenly spread: 2 GB, of which it takes a sample


def build(store: Path, manifest: dict, data, say) -> dict[str, str]:
    """Make what `manifest` lacks of the stages that `data` asks for; returns their names by kind."""

    def stage(name, write):
        return _ensure(store, manifest, name, write, say)

    docs = stage("docs", lambda folder: documents.write(folder, data, manifest["sources"], say))
    trained = stage(tokenizer_name(data), lambda folder: _tokenizer(folder, store / "docs", data, docs))
    names = stage_names(data, manifest)
    encoder = tokenizer(store / names["tokenizer"], trained)
    tokens = stage(names["tokens"], lambda folder: _tokens(folder, store / "docs", encoder, docs, say))
    stage(names["packs"], lambda folder: _packs(folder, store / names["tokens"], data, tokens))
    return names


def stage_names(data, manifest: dict) -> dict[str, str] | None:
    """The folders of the four stages; None before the tokenizer exists, whose digest names the last two."""
    tokenizer = tokenizer_name(data)
    if tokenizer not in manifest["stages"]:
        return None
    digest = manifest["stages"][tokenizer]["digest"]
    overlap = examples.OBJECTIVES[data.objective].overlap
    return {"docs": "docs", "tokenizer": tokenizer, "tokens": f"tokens/{digest}",
            "packs": f"packs/{digest}/{examples.window(data)}+{overlap}-{data.strategy}"}


def tokenizer(folder: Path, record: dict) -> tokenizers.Tokenizer:
    """The tokenizer that a stage has written."""
    for name, file in record["files"].items():
        proven(folder / name, file)
    return tokenizers.load(str(folder))


def tokenizer_name(data) -> str:
    """What is trained is named by kind and size; a tokenizer from a file by the file's content."""
    if data.tokenizer in tokenizers.TRAINED:
        return f"tokenizer/{data.tokenizer}-{data.vocab}"
    path = Path(data.tokenizer)
    return "tokenizer/" + (f"file-{disk.sha256(path)[:12]}" if path.is_file() else path.name)


def _ensure(store, manifest, name, write, say):
    """The manifest's record of a stage; if it has none, `write(folder)` makes the files and returns the record."""
    if name in manifest["stages"]:
        return manifest["stages"][name]
    final, hidden = store / name, store / f".building-{name.replace('/', '-')}"
    dropped = store / "dropped" / name
    for old in (final, dropped):
        shutil.rmtree(old, ignore_errors=True)  # of a builder that ended between the rename and the manifest
    hidden.mkdir()
    began = time.monotonic()
    try:
        record = write(hidden)
        if record.get("dropped"):
            _finish(hidden / "dropped", dropped, record["dropped"])
        _finish(hidden, final, record["files"])
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise
    record |= {"seconds": round(time.monotonic() - began, 3), "code": _versions()}
    manifest["stages"][name] = record
    disk.replace(store / "card.md", [card(manifest)])
    write_manifest(store, manifest)
    size = sum(file["bytes"] for file in record["files"].values()) / 1e6
    say(f"{name}: {len(record['files'])} files, {size:,.1f} MB, {record['seconds']:.1f} s")
    return record


def write_manifest(store: Path, manifest: dict):
    """Put the manifest in place, with a digest of its own: by it all else is judged."""
    body = {key: value for key, value in manifest.items() if key != "digest"}
    disk.replace(store / "manifest.json", [json.dumps(body | {"digest": config.digest(body)}, indent=1)])


def _finish(hidden, final, files):
    """Force a folder's files to disk, note their sizes and digests, and give the folder its name."""
    for path in sorted(hidden.iterdir()):
        disk.sync(path)
        files.setdefault(path.name, {}).update(bytes=path.stat().st_size, sha256=disk.sha256(path))
    disk.sync(hidden)
    final.parent.mkdir(parents=True, exist_ok=True)
    hidden.rename(final)
    disk.sync(final.parent)


def _tokenizer(folder, docs, data, record):
    """Trained on the documents of the training split alone, or taken from a file."""
    paths = []
    for tag in record["splits"]["train"]:
        names = [name for name, file in record["files"].items() if (file["tag"], file["split"]) == (tag, "train")]
        paths += [proven(docs / name, record["files"][name]) for name in names[:: -(-len(names) // SAMPLED)]]
    made = tokenizers.make(data.tokenizer, documents.texts(paths), vocab=data.vocab)
    made.save(str(folder))
    return {"files": {}, "digest": made.digest, "vocab": made.vocab}


def _tokens(folder, docs, encoder, record, say):
    """A shard of ids for each part of documents, [bos] t1 .. tn [eos] each, and the offsets at which they begin."""
    dtype = np.uint16 if encoder.vocab <= 1 << 16 else np.uint32
    files, predicted, told = {}, {split: Counter() for split in SPLITS}, time.monotonic()
    for done, (part, file) in enumerate(record["files"].items()):
        if time.monotonic() - told > 5:
            told = time.monotonic()
            say(f"tokens: {done} of {len(record['files'])} parts")
        key = {name: file[name] for name in ("tag", "split", "number")}
        shard, sizes = shard_name(**key), []
        with NpyWriter(folder / f"tokens-{shard}", dtype) as out:
            for group in documents.groups(proven(docs / part, file)):
                encoded = encoder.encode_batch(group)
                sizes += [len(ids) + 2 for ids in encoded]
                out.write(np.concatenate([span for ids in encoded for span in ([encoder.bos], ids, [encoder.eos])]))
        with NpyWriter(folder / f"offsets-{shard}", np.int64) as offsets:
            offsets.write(np.append(0, np.cumsum(sizes)))
        files[f"tokens-{shard}"] = key | {"docs": len(sizes), "tokens": out.length}
        predicted[file["split"]][file["tag"]] += out.length - len(sizes)  # all but bos
    shards.seal(folder)
    return {"files": files, "splits": {split: {tag: {"tokens": n} for tag, n in tags.items()}
                                       for split, tags in predicted.items()}}


def _packs(folder, tokens, data, record):
    """Which windows of which shard make a row: segments [shard, start, length] and where each row's segments begin."""
    window, overlap = examples.window(data), examples.OBJECTIVES[data.objective].overlap
    splits = {split: {} for split in SPLITS}
    for split in SPLITS:
        for tag, counts in record["splits"][split].items():
            files = shard_files(record, split, tag)
            names = [f"offsets-{shard_name(tag, split, file['number'])}" for file in files]
            offsets = (shards.numbers(proven(tokens / name, record["files"][name])) for name in names)
            with (NpyWriter(folder / f"segments-{tag}-{split}.npy", np.int32, (3,)) as segments,
                  NpyWriter(folder / f"rows-{tag}-{split}.npy", np.int64) as starts):
                for packed in pack.pack(offsets, window=window, overlap=overlap, strategy=data.strategy):
                    starts.write(packed.starts + segments.length)
                    segments.write(packed.segments)
                rows = starts.length
                starts.write([segments.length])
            positions = counts["tokens"] + (1 - overlap) * sum(file["docs"] for file in files)
            splits[split][tag] = {"rows": rows, "utilisation": round(pack.utilisation(positions, rows, window), 6)}
    shards.seal(folder)
    return {"files": {}, "splits": splits}


def shard_name(tag, split, number):
    return f"{tag}-{split}-{number:05d}.npy"


def shard_files(record, split, tag):
    """Entries of the token shards of one split and source, in order; offsets have no tag."""
    return [file for file in record["files"].values() if (file.get("split"), file.get("tag")) == (split, tag)]


def card(manifest: dict) -> str:
    """What a person wants to know of a store, as Markdown."""
    docs = manifest["stages"]["docs"]
    lines = [f"# {manifest['name']}", "", "Built by `python -m lm_jax.prepare`; numbers are in `manifest.json`.", ""]
    lines += [f"- `{tag}`: `{spec}`; read: {docs['read'][tag]}" for tag, spec in manifest["sources"].items()]
    lines += ["", "| split | source | documents | bytes |", "| --- | --- | ---: | ---: |"]
    lines += [f"| {split} | {tag} | {row['docs']:,} | {row['bytes']:,} |"
              for split, tags in docs["splits"].items() for tag, row in tags.items()]
    return "\n".join(lines + ["", "Stages: " + ", ".join(f"`{name}`" for name in manifest["stages"]), ""])


def _versions():
    libraries = ("numpy", "pyarrow", "sentencepiece")
    return {"lm_jax": lm_jax.__version__} | {name: metadata.version(name) for name in libraries}
