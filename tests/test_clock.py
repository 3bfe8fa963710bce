"""Where the time went adds up, whatever was killed; and what hangs ends, and says where."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from lm_jax import clock, faults, lease, peers
from lm_jax.clock import Clock

TRAIN = """
import threading
from lm_jax import clock, errors, train
from lm_jax.data import loader
clock.LEAST, clock.TICK = 2.0, 0.1
batches = loader.Loader.batches
def stuck(self, step, here):
    for step, batch in enumerate(batches(self, step, here), step):
        if step >= 12:
            threading.Event().wait()
        yield batch
loader.Loader.batches = stuck
errors.run(train.main)
"""
SETTINGS = ["--config=configs/tiny.py", "--config.model.width=16", "--config.model.depth=1", "--config.data.length=16",
            "--config.data.sources=markov:documents=300,length=15", "--config.data.tokenizer=byte",
            "--config.train.steps=20", "--config.train.batch=8", "--config.train.checkpoint_every=5"]


def test_phases_add_up_to_the_wall_clock_however_they_nest():
    timer, begun = Clock(age=2.0), time.monotonic()
    with timer.phase("step"):
        time.sleep(0.2)
        with timer.phase("wait"):
            time.sleep(0.3)
        with timer.phase("save"), timer.phase("evaluation"):
            time.sleep(0.1)
        time.sleep(0.1)
    timer.replayed(0.1)
    found = timer.account()
    assert sum(found["phases"].values()) == pytest.approx(2 + time.monotonic() - begun, rel=0.01)
    expected = {"start": 2.0, "step": 0.2, "replay": 0.1, "wait": 0.3, "save": 0.0, "evaluation": 0.1}
    assert found["phases"] == pytest.approx(expected, abs=0.05)
    assert found["goodput"] == pytest.approx(0.2 / 2.7, abs=0.03)


def test_the_account_survives_kill_9_and_knows_what_it_cost(tmp_path):
    code = f"""
import pathlib, time
from lm_jax import clock
clock.TICK = clock.RECORD = 0.05
timer = clock.Clock()
timer.watch(pathlib.Path({str(tmp_path)!r}), writes=True, patience=1.0)
with timer.phase("step"):
    print("steps", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], text=True, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "steps\n"
    begun = time.time()
    time.sleep(1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.5)
    with Clock() as again:
        again.watch(tmp_path, writes=True, patience=1.0)
        found = again.account()["phases"]
    assert found["step"] == pytest.approx(1.0, abs=0.25) and found["idle"] == pytest.approx(0.5, abs=0.25)
    assert found["step"] + found["idle"] == pytest.approx(time.time() - begun, abs=0.25)
    assert json.loads((tmp_path / "phases.json").read_text())["seconds"]["idle"] == pytest.approx(found["idle"])


def test_a_clock_that_was_put_back_and_a_damaged_account_make_no_time(tmp_path):
    for text in (json.dumps({"until": time.time() + 3600, "seconds": {"step": 5.0}}), "{", "[]"):
        (tmp_path / "phases.json").write_text(text)
        with Clock() as timer:
            timer.watch(tmp_path, writes=True, patience=0.0)
            assert timer.account()["phases"].get("idle", 0.0) == 0


def test_a_clock_that_was_put_on_makes_no_time_but_after_a_boot(tmp_path):
    for host, idle in ((lease.HOST, 0.0), ("another boot", 3600.0)):
        moment = clock._moment() | {"until": time.time() - 3600, "host": host}
        (tmp_path / "phases.json").write_text(json.dumps(moment | {"seconds": {"step": 5.0}}))
        with Clock() as timer:
            timer.watch(tmp_path, writes=True, patience=0.0)
            assert timer.account()["phases"]["idle"] == pytest.approx(idle, abs=5)


HANGS = """
import os, pathlib, sys, threading
from lm_jax import clock
clock.RECORD, clock.TICK, clock.SHOWN, clock.LAST = 0.05, 0.1, 0.2, 2.0
folder, full = pathlib.Path(sys.argv[1]), sys.argv[2] == "full"
timer = clock.Clock()
timer.watch(folder, writes=True, patience=1e-3)
for name in () if full else (".building-phases.json", "stacks.txt"):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)  # who opens it waits for one who reads
os.set_blocking(2, not full)
try:
    while full:
        os.write(2, b"x")
except BlockingIOError:
    os.set_blocking(2, True)
print("full", flush=True)
with timer.phase("wait"):
    threading.Event().wait()
"""


@pytest.mark.parametrize("what", ["disk", "full"])
def test_what_hangs_ends_also_where_that_is_the_disk_or_who_reads_its_errors(tmp_path, what):
    process = subprocess.Popen([sys.executable, "-c", HANGS, str(tmp_path), what], text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    try:
        assert process.stdout.readline() == "full\n"
        assert process.wait(timeout=30) == clock.HUNG
        said = process.stderr.read()
        assert what == "full" or "in phase 'wait': this process hangs" in said and "in <module>" in said
    finally:
        process.kill()
        process.communicate()
    assert what == "disk" or "in <module>" in (tmp_path / "stacks.txt").read_text()


def test_each_phase_has_a_limit_and_those_of_checkpoints_are_what_the_others_wait():
    phases = {place for place in faults.PLACES if "/" not in place} | {"start"}  # held to the sources by test_faults
    assert clock.LIMITS.keys() == phases
    assert clock.LIMITS["save"] == clock.LIMITS["restore"] == peers.LONG


def test_a_run_whose_loader_hangs_ends_with_the_stacks_of_its_threads(tmp_path):
    argv = [*SETTINGS, f"--workdir={tmp_path}/run", f"--config.data.root={tmp_path}/data"]
    found = subprocess.run([sys.executable, "-c", TRAIN, *argv], text=True, capture_output=True, timeout=300)
    assert found.returncode == clock.HUNG == 76, found.stderr
    assert "in phase 'wait': this process hangs" in found.stderr and "in stuck" in found.stderr
    assert "in stuck" in (tmp_path / "run" / "stacks.txt").read_text()
    again = subprocess.run([sys.executable, "-m", "lm_jax.train", *argv], text=True, capture_output=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert "resumed at step 10" in again.stdout
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    phases = summary["phases"]
    assert 2 <= phases["wait"] < 8 and phases["replay"] > 0 and 0 < summary["goodput"] < 1
    assert all(seconds >= 0 for seconds in phases.values()), phases


def test_the_watchdog_sleeps_where_it_is_told_to(tmp_path, monkeypatch):
    monkeypatch.setitem(clock.LIMITS, "wait", 0.1)
    monkeypatch.setattr(clock, "TICK", 0.02)
    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail("it ended the process"))
    for patience, phase in ((0.0, "wait"), (100.0, "wait"), (1.0, "data")):
        with Clock() as timer:
            timer.watch(tmp_path, writes=False, patience=patience)
            with timer.phase(phase):
                time.sleep(0.3)
    assert not (tmp_path / "phases.json").exists()


def test_steps_that_differ_fivefold_are_no_alarm_and_one_that_hangs_is(tmp_path, monkeypatch):
    """The rule at a thousandth of its length: a step may take ten times the median."""
    ended = []
    monkeypatch.setattr(clock, "LEAST", 0.0)
    monkeypatch.setattr(clock, "TICK", 0.01)
    monkeypatch.setattr(Clock, "_end", lambda self, phase, late: ended.append((phase, late)))
    rng = np.random.default_rng(0)
    with Clock() as timer:
        timer.watch(tmp_path, writes=False, patience=1.0)
        with timer.phase("step"):
            for seconds in rng.uniform(0.02, 0.1, 60):
                time.sleep(seconds)
                timer.step()
            assert not ended
            time.sleep(1.5)
    assert ended and {phase for phase, _ in ended} == {"step"} and ended[0][1] > 0.4
