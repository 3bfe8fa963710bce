"""`python -m lm_jax.train` as its user meets it: what a run leaves, how it stops and goes on, and what it refuses."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from lm_jax import errors, seal, train
from lm_jax.checkpoint import Checkpoints
from lm_jax.workdir import Workdir

STEPS = 300
SMALL = """
from lm_jax import config


def get_config():
    c = config.default()
    c.name = "small"
    c.model.update(width=16, depth=1, heads=2, dtype="float32")
    c.data.update(sources="text:{home}/corpus/*.txt", root="{home}/data", tokenizer="byte", length=32, validation=0.2)
    c.optim.update(warmup=2, ema=0.9)
    c.train.update(steps=300, batch=8, eval_every=200, eval_rows=8, checkpoint_every=250)
    return c
"""
TIMED = {"seconds", "goodput", "tokens_per_second", "flops_per_second", "data_wait", "data_wait_fraction",
         "host_memory_peak"}
ENCODER = ("--config.model.causal=False", "--config.model.positions=learned")
BOTH = ("--config.model.encoder_depth=1", "--config.model.positions=relative")
OBJECTIVES = {
    "prefix": (), "masked": (*ENCODER, "--config.model.head=mlm"),
    "masked_pairs": (*ENCODER, "--config.model.head=mlm_pairs", "--config.model.types=2"), "span": BOTH, "ul2": BOTH,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a corpus of 40 files of words, and a config that trains on it."""
    home = tmp_path_factory.mktemp("home")
    rng, words = np.random.default_rng(0), "the model reads a page and then another page of plain words".split()
    (home / "corpus").mkdir()
    for i in range(40):
        (home / "corpus" / f"{i:02d}.txt").write_text(" ".join(rng.choice(words, rng.integers(20, 60))))
    (home / "small.py").write_text(SMALL.format(home=home))
    return home


@pytest.fixture(scope="module")
def whole(home):
    """An unbroken run: its folder and what it printed."""
    done = finished(start(home, "--workdir=whole"))
    assert done.returncode == 0, done.stderr
    return home / "whole", done.stdout


def start(home, *argv, devices=1):
    """The main in a process of its own."""
    return launch(home, "-m", "lm_jax.train", "--config=small.py", *argv, devices=devices)


def launch(home, *argv, devices=1):
    paths = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "PYTHONPATH": paths}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, *argv], cwd=home, env=env, **pipes)


def finished(process):
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def lasting(folder):
    """The rows without what a clock or the operating system says."""
    return [{key: value for key, value in row.items() if key not in TIMED} for row in rows(folder)]


def arrays(folder):
    """Name -> value of all that the newest checkpoint holds."""
    saved = Checkpoints(folder / "checkpoints")
    signatures = seal.read(saved.folder / str(saved.steps()[-1]))["leaves"]
    like = {}
    for name, signature in signatures.items():
        dtype, shape = re.fullmatch(r"(\w+)\[(.*)\]", signature).groups()
        like[name] = jax.ShapeDtypeStruct(tuple(map(int, filter(None, shape.split(", ")))), dtype)
    return saved.restore(like)[1]


def same_outcome(one, other):
    """Assert that two runs recorded the same numbers and hold the same state, to the bit."""
    assert lasting(one) == lasting(other)
    for (name, a), b in zip(arrays(one).items(), arrays(other).values(), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


def test_a_run_leaves_its_records_checkpoints_and_picture(whole):
    folder, out = whole
    asked, manifest, summary = (json.loads((folder / f"{name}.json").read_text())
                                for name in ("config", "manifest", "summary"))
    assert asked["optim"]["ema"] == 0.9 and asked["train"]["steps"] == STEPS and manifest["config"] == asked
    assert manifest["parameters"]["total"] > 0 and manifest["data_digest"] and manifest["seed"] == asked["seed"]
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"250", "300"}
    assert (folder / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert summary["status"] == "ok" and summary["steps"] == STEPS and summary["tokens"] == STEPS * 8 * 32
    assert summary["flops"] > 0 < summary["seconds"]
    assert 0 < summary["val_loss"] < 3.5 and 0 < summary["val_loss_stderr"] < 1
    assert 0 < summary["val_bits_per_byte"] < 5 and 0 < summary["xz_bits_per_byte"] < 8
    training = [row for row in rows(folder) if "loss" in row]
    evaluations = [row for row in rows(folder) if "val_loss" in row]
    assert [row["step"] for row in training] == list(range(1, STEPS + 1))
    assert not any("val_loss" in row for row in training)
    assert [row["step"] for row in evaluations] == [200, STEPS] and evaluations[-1]["val_loss"] == summary["val_loss"]
    assert training[-1]["loss"] < training[0]["loss"]
    for said in ("bits per byte", "xz -9", "sample", "next:", "--config.train.steps=600"):
        assert said in out


def test_a_run_stopped_by_sigterm_goes_on_as_if_it_had_not_been(home, whole):
    process = start(home, "--workdir=stopped")
    metrics = home / "stopped" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") > 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    done = finished(process)
    assert done.returncode == 75, done.stderr
    summary = json.loads((home / "stopped" / "summary.json").read_text())
    assert summary["status"] == "stopped" and 3 < summary["steps"] < STEPS and "val_loss" not in summary
    assert f"goes on at step {summary['steps']}" in done.stdout
    again = finished(start(home, "--workdir=stopped"))
    assert again.returncode == 0 and f"resumed at step {summary['steps']}" in again.stdout, again.stderr
    same_outcome(home / "stopped", whole[0])


def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_goes_on(home, whole):
    folder = home / "damaged"
    shutil.copytree(whole[0], folder)
    victim = max((folder / "checkpoints" / "300").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    done = finished(start(home, "--workdir=damaged"))
    assert done.returncode == 0, done.stderr
    assert re.search("warning: checkpoint .*300 is damaged: .*SHA-256", done.stdout)
    assert "resumed at step 250" in done.stdout
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"250", "300", "300.bad"}
    same_outcome(folder, whole[0])


def test_where_every_checkpoint_is_damaged_nothing_starts_afresh(home, whole):
    folder = home / "lost"
    shutil.copytree(whole[0], folder)
    for step in ("250", "300"):
        (folder / "checkpoints" / step / seal.NAME).unlink()
    before = (folder / "metrics.jsonl").read_bytes()
    done = finished(start(home, "--workdir=lost"))
    assert done.returncode == 79 and "no intact checkpoint" in done.stderr and "Traceback" not in done.stderr
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_a_damaged_shard_ends_the_run_and_its_cure_goes_on_as_if_nothing_had_been(home, whole):
    shutil.copytree(whole[0], home / "hurt")
    shutil.rmtree(home / "hurt" / "checkpoints" / "300")
    shutil.copytree(home / "data", home / "other")
    shard = next((home / "other").rglob("tokens-*train*"))
    data = bytearray(shard.read_bytes())
    data[-5] ^= 4
    shard.write_bytes(data)
    again = ("--workdir=hurt", "--config.data.root=other")
    done = finished(start(home, *again))
    assert done.returncode == 77 and f"{shard.name} is not what its manifest says" in done.stderr, done.stderr
    next((home / "other").rglob("manifest.json")).unlink()  # as the message says
    done = finished(start(home, *again))
    assert done.returncode == 0 and "resumed at step 250" in done.stdout, done.stderr
    same_outcome(home / "hurt", whole[0])


COMMANDS = (  # exit code, what is said, arguments
    (0, "--config.optim.lr=3e-4", ["--help"]),
    (0, '"lr": 0.5', ["--config=small.py", "--print_config", "--config.optim.lr=0.5"]),
    (2, "Pass --config=configs/tiny.py", []),
    (2, "no config file 'nosuch.py'", ["--config=nosuch.py"]),
    (2, "as in --config.train.steps=100", ["--config=small.py", "300"]),
    (2, "unknown key model.haeds: did you mean model.heads?", ["--config=small.py", "--config.model.haeds=2"]),
    (2, "int", ["--config=small.py", "--config.train.steps=many"]),
    (2, "optim.lr=nan: wanted a finite number", ["--config=small.py", "--config.optim.lr=nan"]),
    (2, "make it a multiple, or set model.head_size", ["--config=small.py", "--config.model.heads=3"]),
)


@pytest.mark.parametrize("code, said, argv", COMMANDS, ids=[" ".join(argv) for _, _, argv in COMMANDS])
def test_a_command_that_cannot_be_run_is_answered_at_once(home, monkeypatch, capsys, code, said, argv):
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, "argv", ["train", *argv])
    with pytest.raises(SystemExit) as end:
        errors.run(train.main)
    out, err = capsys.readouterr()
    assert end.value.code == code and said in (err if code else out)
    assert not code or err.startswith("error: ") and len(err.splitlines()) <= 2
    assert not (home / "runs").exists(), "nothing has begun"


def test_what_cannot_run_is_refused_in_a_line_that_names_the_cure(home, whole):
    holder = Workdir(home / "held")
    holder.open({})
    cases = (
        ("unknown key model.haeds: did you mean model.heads?", ["--config.model.haeds=2"], 1),
        ("matches no file", ["--config.data.sources=text:nosuch/*.txt"], 1),
        ("optim.lr: 0.003 -> 0.001", ["--workdir=whole", "--config.optim.lr=0.001"], 1),
        (f"in use by process {os.getpid()}", ["--workdir=held"], 1),
        ("use a multiple of 8", ["--workdir=uneven", "--config.train.batch=12"], 8),
    )
    processes = [start(home, *argv, devices=devices) for _, argv, devices in cases]
    for (said, argv, _), process in zip(cases, processes):
        done = finished(process)
        assert done.returncode == 2 and said in done.stderr, (argv, done.stderr)
        assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) <= 3, (argv, done.stderr)
    holder.close()
    assert not list(home.glob("runs/*/metrics.jsonl")) and not (home / "uneven" / "metrics.jsonl").exists()
    mended = finished(start(home, "--config.train.steps=1", "--config.optim.warmup=0"))
    assert mended.returncode == 0, "what was refused before its first step has not bound the folder"


def test_every_objective_trains_through_the_main(home):
    code = "import json, sys; from lm_jax import train; sys.exit(any(map(train.main, json.loads(sys.argv[1]))))"

    def argv(name):
        return ["train", "--config=small.py", f"--workdir={name}", f"--config.data.objective={name}",
                "--config.train.steps=2", "--config.optim.warmup=1", *OBJECTIVES[name]]

    names = list(OBJECTIVES)
    halves = names[::2], names[1::2]
    processes = [launch(home, "-c", code, json.dumps([argv(name) for name in half])) for half in halves]
    for process in processes:
        done = finished(process)
        assert done.returncode == 0, done.stderr
    for name in names:
        summary = json.loads((home / name / "summary.json").read_text())
        assert summary["status"] == "ok" and summary["steps"] == 2 and 0 < summary["val_loss"] < 8, name
        assert [row["step"] for row in rows(home / name) if "loss" in row] == [1, 2], name
