"""What a run says at its end can be typed as it stands."""

import pathlib
import shlex

import jax
import pytest

import tiny
from lm_jax import config, faults, parallel
from lm_jax.data import store
from lm_jax.recipes import pretrain, report
from lm_jax.workdir import Workdir

OUTCOME = dict(steps=30, tokens=1000, flops=1e9, seconds=2.0)
SOURCES = "--config.data.sources=text:my poems/*.txt; stdlib"


def commands(status, *arguments):
    """The commands that the last lines offer, split as a shell splits them."""
    text = report.closing(OUTCOME | {"status": status}, Workdir(pathlib.Path.cwd() / "runs" / "x"), ["train", *arguments])
    return [shlex.split(line, comments=True) for line in text.splitlines() if "lm_jax.train" in line]


def test_a_longer_run_reads_the_same_text_and_another_text_replaces_it():
    given = ("--config=configs/tiny.py", SOURCES, "--config.data.weights=(1,1)", "--workdir", "runs/x", "--config.train.steps=30")
    longer, other, _ = commands("ok", *given)
    assert longer[3:] == ["--config=configs/tiny.py", SOURCES, "--config.data.weights=(1,1)", "--workdir=runs/x-long",
                          "--config.train.steps=60"]
    assert other[3:] == ["--config=configs/tiny.py", "--config.train.steps=30", "--workdir=runs/x-own",
                         "--config.data.sources=text:my/*.txt"]


def test_a_stopped_run_goes_on_with_the_very_same_command():
    given = ["--config=configs/tiny.py", SOURCES, "--workdir=runs/x"]
    assert commands("stopped", *given) == [["python", "-m", "lm_jax.train", *given]]


@pytest.mark.parametrize("status", ["ok", "stopped", "diverged"])
def test_the_outcome_is_said_first(status):
    text = report.closing(OUTCOME | {"status": status}, Workdir("runs/x"), ["train", "--config=configs/tiny.py"])
    assert text.startswith(f"{status}: 30 steps, 1,000 tokens, 1e+09 FLOPs")


@pytest.fixture
def recipe(tmp_path):
    data = config.DataConfig(sources="markov:documents=60,length=35", root=str(tmp_path), tokenizer="byte", length=36)
    c = config.Config(model=tiny.settings(vocab=0, depth=1, kv_heads=2), data=data,
                      train=config.TrainConfig(batch=8, steps=2), optim=config.OptimConfig(warmup=1))
    return pretrain.Pretraining(c, store.prepare(c.data, say=lambda line: None))


def test_what_a_mesh_does_not_divide_is_said(recipe):
    """Sizes of weights, and rows of 36 tokens over a sequence of 8, by the same words that a plan has."""
    for sizes, said in ((dict(model=8), "K (2 key heads) over model 8, N (4 query heads) over model 8"),
                        (dict(sequence=8), "T (36 tokens of a row) over sequence 8")):
        mesh = parallel.make_mesh(config.MeshConfig(fsdp=1, **sizes))
        with jax.set_mesh(mesh):
            assert report.headline(recipe, dict(mesh.shape)).endswith(f"kept whole on each device: {said}")
    assert "kept whole" not in report.headline(recipe, {}), "without a mesh there is nothing to divide"


def test_faults_on_demand_are_said_and_recorded_with_their_start(recipe, monkeypatch):
    monkeypatch.setenv(faults.VARIABLE, "nan@step=2")
    first = report.manifest(recipe, {}, None)
    assert report.headline(recipe, {}).endswith("\nfaults will be done to this run: LM_JAX_FAULTS=nan@step=2")
    monkeypatch.delenv(faults.VARIABLE)
    assert "faults" not in report.headline(recipe, {})
    assert [start["faults"] for start in report.manifest(recipe, {}, first)["starts"]] == ["nan@step=2", ""]
