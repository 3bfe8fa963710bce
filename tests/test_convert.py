"""A run becomes a folder that transformers reads, with its tokenizer and a card; folders go into the local hub."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import types

import jax
import pytest
import speakers
from checkpoints import TOKENS, close, same_tensors

from lm_jax import config, convert, hub
from lm_jax.config import ConfigError
from lm_jax.errors import DataError
from lm_jax.hub import store
from lm_jax.inference import load

ROOT = pathlib.Path(__file__).parent.parent
COMMON = ["--config.train.steps=2", "--config.train.batch=8", "--config.data.length=32", "--config.data.vocab=420",
          "--config.model.width=32", "--config.model.depth=2", "--config.train.eval_rows=8",
          "--config.model.dtype=float32"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder of its own, a local hub in it, and no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def test_a_run_becomes_a_folder_with_tokenizer_and_card_that_says_the_same(here):
    (here / "texts").mkdir()
    (here / "texts/a.txt").write_text("\n\n".join(f"the {i} red foxes and {i * 7} blue ones\tran" for i in range(3000)))
    command = [sys.executable, "-m", "lm_jax.train", f"--config={ROOT}/configs/tiny.py", "--workdir=run", *COMMON,
               "--config.data.sources=text:texts/*.txt"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert convert.main(["convert", "run", "hub:me/foxes@v1"]) == 0
    model = hub.load("me/foxes@v1")
    c = config.from_dict(json.loads((here / "run/config.json").read_text()))
    step, trained, tokenizer = load.run(here / "run", c)
    assert step == 2
    text = "the 5 red foxes\n and  äßé 漢字 🙂 \t\x00 unheard"
    ids = tokenizer.encode(text)
    close(hub.logits(model, [ids]), hub.logits(trained, [ids]), 1e-6)
    import tokenizers

    folder = hub.path("me/foxes@v1")
    read = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert read.encode(text, add_special_tokens=False).ids == ids.tolist()
    assert read.encode(text).ids == [tokenizer.bos, *ids.tolist()], "as documents began"
    assert read.decode(ids.tolist()) == text
    ran, there, asked = load.load(here / "run"), load.load(folder), [{"role": "user", "content": "which foxes ?"}]
    assert (there.before, there.after, there.stops) == (ran.before, ran.after, ran.stops)
    assert there.template.ids(asked) == ran.template.ids(asked)
    said = json.loads((folder / "config.json").read_text())
    assert said["architectures"] == ["LlamaForCausalLM"] and said["bos_token_id"] == tokenizer.bos
    card = (folder / "README.md").read_text()
    import huggingface_hub

    assert huggingface_hub.ModelCard(card).data.pipeline_tag == "text-generation"
    manifest = json.loads((here / "run/manifest.json").read_text())
    assert manifest["data_digest"] in card and manifest["code_revision"] in card and "nats a token" in card
    assert convert.main(["convert", "run", "small", "--dtype=bfloat16", "--shard=50000"]) == 0
    assert {leaf.dtype.name for leaf in jax.tree.leaves(hub.load(here / "small"))} == {"bfloat16"}


def test_a_folder_goes_through_as_it_is(folder, here, capsys):
    (folder("qwen3") / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 98}}}))
    assert convert.main(["convert", str(folder("qwen3")), "out"]) == 0
    same_tensors(folder("qwen3"), here / "out")
    for name in ("config.json", "tokenizer.json"):
        assert json.loads((here / "out" / name).read_text()) == json.loads((folder("qwen3") / name).read_text())
    assert "out: " in capsys.readouterr().out
    with pytest.raises(ConfigError, match="pass another folder"):
        convert.main(["convert", "out", "out"])
    (here / "run").mkdir()
    (here / "run/config.json").write_text('{"train": {}}')
    with pytest.raises(ConfigError, match="is a run's folder, whose config.json would be lost"):
        convert.main(["convert", "out", "run"])
    with pytest.raises(ConfigError, match="cannot be uploaded: HF_HUB_OFFLINE"):
        convert.main(["convert", "out", "again", "--upload=me/out"])


def test_card_and_licence_go_where_the_model_goes(folder, here):
    for name in ("README.md", "LICENSE", "NOTICE"):
        (folder("qwen3") / name).write_text(f"{name} of qwen3")
    (here / "out").mkdir()
    (here / "out/LICENSE").write_text("mine")
    hub.save(hub.load(folder("gpt2")), "out")
    assert (here / "out/LICENSE").read_text() == "mine", "of what was there without a model"
    for target in ("out", "hub:me/qwen3"):
        assert convert.main(["convert", str(folder("qwen3")), target]) == 0
    for place in (here / "out", hub.path("me/qwen3")):
        for name in ("README.md", "LICENSE", "NOTICE"):
            assert (place / name).read_text() == f"{name} of qwen3"
    hub.save(hub.load(folder("gpt2")), "out")
    assert not (here / "out/LICENSE").exists(), "another model's"


def test_the_local_hub_keeps_each_content_once_and_finds_it_by_name(folder, here):
    first = store.add(folder("gpt2"), "me/gpt2")
    again = store.add(folder("gpt2"), "me/gpt2@same")
    assert first == again, "a revision is a digest of its content"
    assert store.add(folder("gpt2"), "gpt2").name == first.name
    assert hub.path("gpt2").parent.parent.name == "models--gpt2", "the oldest names have no owner"
    place = here / "hub/models--me--gpt2"
    assert len(list((place / "blobs").iterdir())) == 2
    assert (first / "model.safetensors").is_symlink() and (place / "refs/main").read_text() == first.name
    model = hub.load("me/gpt2")
    hub.save(model, here / "more")
    (here / "more/generation_config.json").write_text("{}")
    second = store.add(here / "more", "me/gpt2@later")
    assert second != first
    blobs = sorted((place / "blobs").iterdir())
    assert len([blob for blob in blobs if blob.stat().st_size > 10_000]) == 1, "the same weights are there once"
    for name in ("me/gpt2", "me/gpt2@same", f"me/gpt2@{first.name}", f"me/gpt2@{first.name[:8]}"):
        assert hub.path(name) == first
    assert hub.path("me/gpt2@later") == second
    assert set(store.names()) == {"gpt2", "me/gpt2", "me/gpt2@later", "me/gpt2@same"}
    close(hub.logits(hub.load("me/gpt2@later"), [TOKENS]), hub.logits(model, [TOKENS]), 1e-7)


def test_huggingface_hub_reads_what_the_local_hub_holds(folder, here):
    import huggingface_hub

    store.add(folder("bert"), "me/bert@v2")
    found = huggingface_hub.snapshot_download("me/bert", revision="v2", cache_dir=here / "hub", local_files_only=True)
    assert found == str(hub.path("me/bert@v2"))
    info = huggingface_hub.scan_cache_dir(here / "hub")
    assert not info.warnings and [repo.repo_id for repo in info.repos] == ["me/bert"]


@pytest.mark.parametrize("name, said", [
    ("me/bart", "nearest is 'me/bert'"), ("me/bert@v9", "nearest is 'me/bert'"),
    ("bert", "nearest is 'me/bert'"), ("me/../bert", "neither a folder nor a name"),
    ("me/bert@../main", "neither a folder nor a name"), ("/me/bert", "neither a folder nor a name")])
def test_a_name_that_is_not_here_is_told_the_nearest(name, said, folder):
    store.add(folder("bert"), "me/bert")
    with pytest.raises(ConfigError, match=said):
        hub.load(name)


def test_only_what_a_hub_keeps_is_put_into_the_local_one(folder, here):
    source = shutil.copytree(folder("gpt2"), here / "model")
    (source / ".git").mkdir()
    (source / "onnx").mkdir()
    for name in ("x.pkl", ".git/index.json", ".hidden.json", "merges.txt", "onnx/config.json", "consolidated.json"):
        (source / name).write_text("#")
    found = store.add(source, "me/gpt2")
    assert sorted(path.relative_to(found).as_posix() for path in found.rglob("*")) == [
        "config.json", "merges.txt", "model.safetensors"]


def test_a_run_is_not_put_into_the_hub_nor_one_without_its_records_written(here):
    c = speakers.settings()
    run = speakers.run(here / "run", c, {10: {"params": speakers.parameters(c)}})
    with pytest.raises(ConfigError, match="is a run's folder: `python -m lm_jax.convert"):
        store.add(run, "me/run")
    with pytest.raises(DataError, match="lacks what a card tells .KeyError..config"):
        convert.main(["convert", "run", "out"])
    assert not (here / "out").exists()


def test_a_broken_config_is_damage_and_no_traceback(here):
    (here / "broken").mkdir()
    (here / "broken/config.json").write_text("{")
    with pytest.raises(DataError, match="config.json is no JSON"):
        convert.main(["convert", "broken", "out"])


@pytest.mark.parametrize("more, said", [
    (["--shard=-5"], "at most -5 bytes: at least 1"), (["--shard=0"], "at most 0 bytes"), ([], "a file has that name")])
def test_where_nothing_can_be_written_it_is_said(more, said, folder, here):
    out = here / "out"
    if not more:
        out.write_text("mine")
    with pytest.raises(ConfigError, match=said):
        convert.main(["convert", str(folder("gpt2")), "out", *more])
    assert out.read_text() == "mine" if not more else not out.exists()


@pytest.fixture
def network(folder, monkeypatch):
    """A hub on the network that has one model, with what such a repository holds besides; its list of downloads."""
    import huggingface_hub

    def download(repo, *, revision, cache_dir, **patterns):
        asked.append(f"{repo}@{revision}")
        place = cache_dir / f"models--{repo.replace('/', '--')}"
        snapshot = place / "snapshots" / ("5" * 40)
        names = [path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()]
        for name in huggingface_hub.utils.filter_repo_objects(names, **patterns):
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, snapshot / name)
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / revision).write_text(snapshot.name)
        return str(snapshot)

    source, asked = folder("gpt2"), []
    hub.save(hub.load(source), source, shard=100_000)
    for name in ("consolidated.safetensors", "fp16/model.safetensors", "onnx/config.json", "pytorch_model.bin",
                 "README.md"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("{}")
    monkeypatch.setattr(store, "library", lambda: types.SimpleNamespace(snapshot_download=download))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    return asked


def test_a_name_is_fetched_once_and_each_weight_of_it_once(network):
    place = hub.path("me/far@v2")
    assert hub.path("me/far@v2") == place and network == ["me/far@v2"]
    names = sorted(path.relative_to(place).as_posix() for path in place.rglob("*"))
    assert names[:2] == ["README.md", "config.json"] and len(names) > 4
    assert all(name.startswith("model-0") for name in names[2:-1]) and names[-1] == "model.safetensors.index.json"
    assert hub.load("me/far@v2").cfg.width == 32


@pytest.mark.parametrize("gone", ["config.json", "model-00002*", "model*"])
def test_what_is_in_the_cache_in_part_is_completed(gone, network, monkeypatch):
    """As a tokenizer leaves it that transformers has fetched alone, or a download that was cut off."""
    place = hub.path("me/far")
    for file in place.glob(gone):
        file.unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises((ConfigError, DataError), match="fetch|has no config.json"):
        hub.load("me/far")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert hub.load("me/far").cfg.width == 32 and len(network) == 2
    for file in place.glob(gone):
        file.unlink()
    monkeypatch.setattr(store, "library", lambda: types.SimpleNamespace())
    with pytest.raises(ConfigError, match="'me/far' is here in part only .*5555., and could not be fetched: "):
        hub.load("me/far")


@pytest.mark.parametrize("name, branches", [("me/x", []), ("me/x@v1", ["v1"])])
def test_an_upload_to_a_word_makes_its_branch(name, branches, folder, monkeypatch):
    made, sent = [], []
    api = types.SimpleNamespace(
        create_repo=lambda repo, **how: "there", create_branch=lambda repo, *, branch, exist_ok: made.append(branch),
        upload_folder=lambda *, revision, **what: sent.append((revision, list(made))))
    monkeypatch.setattr(store, "library", lambda: types.SimpleNamespace(get_token=lambda: "x", HfApi=lambda: api))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert store.upload(folder("gpt2"), name) == "there"
    assert sent == [(store.parse(name)[1], branches)]


def test_what_is_no_model_is_not_put_into_the_hub(here):
    (here / "empty").mkdir()
    with pytest.raises(ConfigError, match="has no config.json"):
        store.add(here / "empty", "me/empty")
