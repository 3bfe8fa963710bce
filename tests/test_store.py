"""The store: found again, built whole or not at all, and never taken for what it is not."""

import json
import os
import re
import resource
import subprocess
import sys

import numpy as np
import pyarrow.parquet
import pytest

from lm_jax import config
from lm_jax.config import ConfigError, DataConfig
from lm_jax.data import build, shards
from lm_jax.data.store import prepare, tags
from lm_jax.errors import DataError

WORDS = "the model reads a page and then another page of plain words about nothing in particular".split()


@pytest.fixture
def corpus(tmp_path):
    """40 files of words."""
    rng, folder = np.random.default_rng(0), tmp_path / "corpus"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i:02d}.txt").write_text(" ".join(rng.choice(WORDS, rng.integers(5, 200))))
    return folder


def settings(corpus, **changed):
    defaults = {"sources": f"text:{corpus}/*.txt", "root": str(corpus.parent / "data"), "tokenizer": "byte",
                "length": 32, "validation": 0.2}
    return DataConfig(**defaults | changed)


def quiet(line):
    pass


def stages(told):
    """Names of the stages that were built."""
    return [line.partition(":")[0] for line in told if " files, " in line]


def test_a_second_run_finds_the_store_and_builds_nothing(corpus):
    told = []
    first = prepare(settings(corpus), say=told.append)
    assert [name.split("/")[0] for name in stages(told)] == ["docs", "tokenizer", "tokens", "packs"]
    told.clear()
    second = prepare(settings(corpus), say=told.append)
    assert not told and (second.path, second.digest) == (first.path, first.digest)


def test_another_length_or_tokenizer_reuses_what_it_can(corpus):
    prepare(settings(corpus), say=quiet)
    told = []
    prepare(settings(corpus, length=16), say=told.append)
    assert [name.split("/")[0] for name in stages(told)] == ["packs"]
    told.clear()
    prepare(settings(corpus, tokenizer="bpe", vocab=420), say=told.append)
    assert [name.split("/")[0] for name in stages(told)] == ["tokenizer", "tokens", "packs"]


def test_rows_hold_every_token_of_every_document_once(corpus):
    store = prepare(settings(corpus), say=quiet)
    texts = []
    for split in ("train", "validation"):
        rows = store.rows(split, "corpus")
        flat = np.concatenate([piece[:-1] for i in range(len(rows)) for piece in rows[i]])  # the overlap is seen twice
        targets = np.concatenate([piece[1:] for i in range(len(rows)) for piece in rows[i]])
        ends, begins = targets == store.tokenizer.eos, flat == store.tokenizer.bos
        np.testing.assert_array_equal(np.flatnonzero(ends) + 1, [*np.flatnonzero(begins)[1:], len(flat)])
        documents = np.split(flat, np.flatnonzero(flat == store.tokenizer.bos))[1:]
        texts += [store.tokenizer.decode(document) for document in documents]
        counted = store.manifest["splits"][split]["corpus"]
        assert counted["tokens"] == len(flat) and counted["rows"] == len(rows) and counted["docs"] == len(documents)
        assert counted["bytes"] == len(flat) - len(documents)
    assert sorted(texts) == sorted(path.read_text() for path in corpus.iterdir())
    assert sorted(store.held_out("corpus")) == sorted(texts[-len(list(store.held_out("corpus"))):])


def test_kept_and_dropped_are_all_that_was_there(corpus):
    for i in range(5):
        (corpus / f"blank{i}.txt").write_text(" \n\t\n")
    for i in range(3):
        (corpus / f"latin{i}.txt").write_bytes("déjà vu".encode("latin-1"))
    store = prepare(settings(corpus, invalid="drop"), say=quiet)
    kept = sum(store.manifest["splits"][split]["corpus"]["docs"] for split in ("train", "validation"))
    read = store.manifest["read"]["corpus"]
    assert (kept, read["empty"], read["invalid_utf8"]) == (40, 5, 3)
    assert kept + read["empty"] + read["invalid_utf8"] == len(list(corpus.iterdir()))
    ids = lambda folder: pyarrow.parquet.read_table(sorted((store.path / folder).iterdir())).to_pydict()["id"]
    assert sorted(ids("docs") + ids("dropped/docs")) == sorted(path.name for path in corpus.iterdir())
    listed = pyarrow.parquet.read_table(store.path / "dropped/docs/part-corpus-00000.parquet").to_pydict()
    why = set(zip(listed["reason"], listed["value"], listed["threshold"]))
    assert why == {("empty", 0.0, 1.0), ("invalid_utf8", 2.0, 0.0)}
    assert store.manifest["stages"]["docs"]["dropped"]["part-corpus-00000.parquet"]["docs"] == 8


def test_where_nothing_is_dropped_nothing_is_listed(corpus):
    store = prepare(settings(corpus), say=quiet)
    assert not (store.path / "dropped").exists() and not list(store.path.rglob("dropped"))


def test_the_split_of_a_document_does_not_move_when_others_come(corpus):
    def held():
        store = prepare(settings(corpus), say=quiet)
        return set(store.held_out("corpus"))

    before = held()
    for i in range(30):
        (corpus / f"new{i}.txt").write_text(f"new {i}")
    after = held()
    assert before == {text for text in after if not text.startswith("new")} and len(after) > len(before)


def test_a_changed_corpus_is_noticed_and_the_same_text_gives_the_same_digest(corpus):
    first = prepare(settings(corpus), say=quiet)
    path = corpus / "00.txt"
    text = path.read_text()
    path.write_text(text[::-1])  # same size
    changed = prepare(settings(corpus), say=quiet)
    assert changed.path != first.path and changed.digest != first.digest
    path.write_text(text)
    again = prepare(settings(corpus), say=quiet)
    assert again.digest == first.digest


@pytest.mark.parametrize("lost", ["manifest", "entry", "killed"])
def test_a_crash_costs_the_unfinished_stage_only(corpus, lost):
    whole = prepare(settings(corpus), say=quiet)
    manifest = whole.path / "manifest.json"
    if lost == "manifest":
        manifest.unlink()
        (whole.path / "docs" / "part-stray.parquet").write_bytes(b"half")
    elif lost == "entry":  # renamed, but the manifest was not written
        saved = json.loads(manifest.read_text())
        del saved["stages"][whole.names["packs"]]
        build.write_manifest(whole.path, saved)
        (whole.path / whole.names["packs"] / "stray.npy").write_bytes(b"half")
    (whole.path / ".building-tokens-x").mkdir()
    (whole.path / ".building-tokens-x" / "tokens.npy").write_bytes(b"half")
    told = []
    again = prepare(settings(corpus), say=told.append)
    assert len(stages(told)) == {"manifest": 4, "entry": 1, "killed": 0}[lost]
    assert again.digest == whole.digest
    again.verify()
    assert not list(again.path.rglob("*stray*"))
    assert lost == "killed" or not list(again.path.glob(".building*"))


def test_a_full_disk_leaves_nothing_half_taken(corpus):
    (corpus / "big.txt").write_text("".join(np.random.default_rng(0).choice(list("abcdefgh"), 400_000)))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    finished = []
    for limit in (20_000, 200_000):  # full while documents are written, then while tokens are
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(ConfigError, match="no room under data.root"):
                prepare(settings(corpus), say=finished.append)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        store = next((corpus.parent / "data").glob("*/*"))
        assert {path.name for path in store.iterdir()} - {".lock", "manifest.json", "card.md"} == (
            {name.split("/")[0] for name in stages(finished)})
    assert "docs" in stages(finished) and len(stages(finished)) == 2
    prepare(settings(corpus), say=finished.append).verify()
    assert len(stages(finished)) == 4


def test_two_prepares_at_once_build_one_store(corpus):
    program = (f"from lm_jax.data.store import prepare; from lm_jax.config import DataConfig; "
               f"print('digest', prepare({settings(corpus)!r}).digest)")
    both = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0].splitlines() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert outputs[0][-1] == outputs[1][-1] and outputs[0][-1].startswith("digest")
    assert len(stages(outputs[0] + outputs[1])) == 4


def test_a_shard_that_is_not_the_manifests_is_refused(corpus):
    store = prepare(settings(corpus), say=quiet)
    shard = next((store.path / store.names["tokens"]).glob("tokens-*train*"))
    whole = shard.read_bytes()
    flip(shard, len(whole) - 2)
    with pytest.raises(DataError, match=f"{shard.name} is not what its manifest says: its SHA-256 is .* delete"):
        prepare(settings(corpus), say=quiet).verify()
    shard.write_bytes(whole[:-2])
    with pytest.raises(DataError, match="is not what its manifest says: it has"):  # a size is compared at each opening
        prepare(settings(corpus), say=quiet)
    shard.unlink()
    with pytest.raises(DataError, match=f"{shard.name} is missing"):
        prepare(settings(corpus), say=quiet)
    (store.path / "manifest.json").unlink()  # the cure that the message names
    again = prepare(settings(corpus), say=quiet)
    again.verify()
    assert again.digest == store.digest and shard.read_bytes() == whole


def flip(path, at, bit=0):
    """Invert a bit of a file."""
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))


def test_no_flipped_bit_of_a_store_is_read_in_silence(corpus, rng, monkeypatch):
    """Of all that training and evaluation read: each file is hit, most of them often."""
    monkeypatch.setattr(shards, "BLOCK", 512)  # so that there are many
    whole = prepare(settings(corpus), say=quiet)
    expected = everything(whole)
    files = sorted(path for path in whole.path.rglob("*") if path.is_file() and path.suffix in (".npy", ".json"))
    files += sorted((whole.path / "docs").glob("*validation*"))  # the others only a build reads
    files = [path for path in files if not path.name.startswith("offsets-")]  # as these
    assert len(files) >= 10
    for trial in range(120):
        path = files[trial % len(files)]
        at, bit = int(rng.integers(path.stat().st_size)), int(rng.integers(8))
        flip(path, at, bit)
        with pytest.raises(DataError, match=f"{path.name} is not what"):
            if everything(prepare(settings(corpus), say=quiet)) == expected:
                raise AssertionError(f"bit {bit} of byte {at} of {path} was not seen")
        flip(path, at, bit)
    assert everything(prepare(settings(corpus), say=quiet)) == expected


def everything(store):
    """All that is ever read of a store: rows, held-out texts, what the tokenizer makes of a text, counts."""
    rows = [store.rows(split, tag) for split in ("train", "validation") for tag in store.tags]
    texts = [text for tag in store.tags for text in store.held_out(tag)]
    pieces = [[piece.tolist() for i in range(len(part)) for piece in part[i]] for part in rows]
    return pieces, texts, [ids.tolist() for ids in store.tokenizer.encode_batch(texts)], store.manifest["splits"]


def test_a_damaged_block_is_named_when_its_first_row_is_read_and_not_before(corpus, monkeypatch):
    monkeypatch.setattr(shards, "BLOCK", 512)
    store = prepare(settings(corpus), say=quiet)
    shard = next((store.path / store.names["tokens"]).glob("tokens-*train*"))
    flip(shard, 5 * 512 + 7)
    rows = prepare(settings(corpus), say=quiet).rows("train", "corpus")
    read, error = 0, None
    for i in range(len(rows)):
        try:
            read += bool(rows[i])
        except DataError as e:
            error = error or str(e)
    assert f"{shard} is not what its manifest says: of bytes 2,560 to 3,072 the SHA-256 is " in error
    assert f"delete {store.path / 'manifest.json'}" in error and len(re.findall("[0-9a-f]{64}", error)) == 2
    each = 2 * 32  # bytes of a row
    assert 0 < len(rows) - read <= 512 / each + 2, "other blocks are as good as before"
    assert rows[0] and len(store.rows("train", "corpus")[0][0]), "a process reads a block's proof once"


def test_documents_that_were_damaged_are_not_made_into_tokens(corpus):
    store = prepare(settings(corpus), say=quiet)
    flip(next((store.path / "docs").glob("*train*")), 300)
    for changed in ({"tokenizer": "bpe", "vocab": 420}, {"tokenizer": "unigram", "vocab": 300}):
        with pytest.raises(DataError, match="part-corpus-train-00000.parquet is not what its manifest says"):
            prepare(settings(corpus, **changed), say=quiet)
    flip(next((store.path / store.names["tokens"]).glob("offsets-*train*")), 300)
    with pytest.raises(DataError, match="offsets-corpus-train-00000.npy is not what its manifest says"):
        prepare(settings(corpus, length=16), say=quiet)


def test_no_text_is_an_error(corpus):
    for path in corpus.iterdir():
        path.write_text(" \n")
    with pytest.raises(ConfigError, match="no document with text .40 of white space only"):
        prepare(settings(corpus), say=quiet)
    with pytest.raises(ConfigError):
        prepare(settings(corpus, sources=f"text:{corpus}/*.md"), say=quiet)


@pytest.mark.parametrize("files", [1, 2, 3])
def test_the_smallest_corpus_has_both_splits(corpus, files):
    for path in sorted(corpus.iterdir())[files:]:
        path.unlink()
    (corpus / "00.txt").write_text("".join(f"line {i}\n" for i in range(100)))
    store = prepare(settings(corpus, validation=0.1), say=quiet)
    splits = store.manifest["splits"]
    assert splits["train"]["corpus"]["rows"] and splits["validation"]["corpus"]["docs"] == 1
    assert sum(splits[s]["corpus"]["bytes"] for s in splits) == sum(p.stat().st_size for p in corpus.iterdir())
    if files == 1:
        assert next(store.held_out("corpus")).startswith("line 9")  # cut at a line


def test_documents_are_kept_with_their_origin_and_a_true_cost_is_summed(tmp_path):
    data = DataConfig(sources="markov:order=1,symbols=4,documents=60,length=15,seed=0", root=str(tmp_path),
                      tokenizer="byte", length=16)
    store = prepare(data, say=quiet)
    table = pyarrow.parquet.read_table(sorted((store.path / "docs").iterdir())).to_pydict()
    assert len(set(table["id"])) == 60 and set(table["source"]) == {data.sources}
    nats = [store.manifest["splits"][split]["markov"]["nats"] for split in ("train", "validation")]
    assert sum(nats) == pytest.approx(sum(json.loads(meta)["nats"] for meta in table["meta"]))
    assert (store.path / "card.md").read_text().startswith("# markov")


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """Peak resident memory of preparing 6 MB and 48 MB, with parts and groups made small."""
    program = """
import re, sys
from lm_jax.config import DataConfig
from lm_jax.data import documents, store
documents.GROUP, documents.PART = 1 << 18, 1 << 20
data = DataConfig(sources=f"jsonl:{sys.argv[1]}", root=sys.argv[2], tokenizer="byte", length=64)
store.prepare(data, say=lambda line: None)
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024)
"""
    peak = {}
    for megabytes in (6, 48):
        path = tmp_path / f"{megabytes}.jsonl"
        with open(path, "w") as file:
            file.writelines(json.dumps({"text": f"{i} " + "some words " * 90}) + "\n" for i in range(megabytes * 1000))
        run = [sys.executable, "-c", program, str(path), str(tmp_path / f"data{megabytes}")]
        peak[megabytes] = float(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
    assert peak[48] - peak[6] < 20, peak


def test_tags_are_short_and_unique():
    specs = ["stdlib", "text:/a/poems.txt", "text:/b/*.txt", "jsonl:/c/poems.jsonl.gz#body", "markov:order=1",
             "markov:order=2", "tfds:wiki40b/en:1.3.0#text"]
    assert tags(specs) == ["stdlib", "poems", "b", "poems-2", "markov", "markov-2", "wiki40b-en"]
    assert len(set(tags(["text:/x/a-2.txt", "text:/a.txt", "text:/y/a.txt"]))) == 3


def test_prepare_as_a_user_runs_it(corpus):
    file = corpus.parent / "small.py"
    file.write_text("from lm_jax import config\n\n\ndef get_config():\n    return config.default()\n")
    run = [sys.executable, "-m", "lm_jax.prepare", f"--config={file}"]
    keys = ("sources", "root", "tokenizer", "length")
    run += [f"--config.data.{key}={getattr(settings(corpus), key)}" for key in keys]
    done = subprocess.run(run, capture_output=True, text=True, env=os.environ | {"COLUMNS": "80"})
    assert done.returncode == 0, done.stderr
    for wanted in ("train", "validation", "corpus", "B/token", "dropped"):
        assert wanted in done.stdout
    empty = subprocess.run(run + ["--config.data.sources=text:/no/such/*"], capture_output=True, text=True)
    assert empty.returncode == 2 and "matches no file" in empty.stderr and "Traceback" not in empty.stderr


def test_the_identity_is_json(corpus):
    store = prepare(settings(corpus), say=quiet)
    assert store.path.name == config.digest(store.manifest["identity"])
