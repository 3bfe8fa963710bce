"""A signal is honoured whatever a run is doing: exit 75, nothing lost, and the same command goes on."""

import json
import signal
import subprocess
import sys
import time

from test_clock import SETTINGS

from lm_jax import signals

# A run that tells when it has come to a function, and stays there for a while.
PAUSED = """
import sys, time
from lm_jax import checkpoint, errors, train
from lm_jax.data import store
from lm_jax.models import transformer
from lm_jax.recipes import pretrain, report
place, name = {place}, {name!r}
whole = getattr(place, name)
def paused(*args, **more):
    print("here", flush=True)
    time.sleep(30)
    return whole(*args, **more)
setattr(place, name, paused)
errors.run(train.main)
"""
PHASES = [("store", "prepare", signal.SIGTERM), ("transformer", "make", signal.SIGINT),
          ("checkpoint.Checkpoints", "restore", signal.SIGTERM), ("pretrain.Evaluation", "_sum", signal.SIGTERM),
          ("report", "sampled", signal.SIGINT)]


def test_every_phase_ends_with_75_and_the_same_command_goes_on(tmp_path):
    argv = [*SETTINGS, f"--workdir={tmp_path}/run", f"--config.data.root={tmp_path}/data"]
    for place, name, sent in PHASES:
        process = subprocess.Popen([sys.executable, "-c", PAUSED.format(place=place, name=name), *argv], text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while (line := process.stdout.readline()) != "here\n":
            assert line, process.stderr.read()
        process.send_signal(sent)
        _, said = process.communicate(timeout=20)
        assert process.returncode == 75, (name, said)
        assert "the same command goes on" in said and "Traceback" not in said, name
    again = subprocess.run([sys.executable, "-m", "lm_jax.train", *argv], text=True, capture_output=True)
    assert again.returncode == 0, again.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "ok" and summary["steps"] == 20
    steps = [row["step"] for row in map(json.loads, (tmp_path / "run" / "metrics.jsonl").open()) if "loss" in row]
    assert steps == list(range(1, 21)), "every step is there once"


def python(code):
    """A process of its own that says "here" when it is told to."""
    process = subprocess.Popen([sys.executable, "-c", code], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == "here\n", process.stderr.read()
    return process


def test_a_main_thread_that_comes_back_too_late_is_not_waited_for(tmp_path):
    """As in a long compilation: no Python runs in it, and the folder is let go of all the same."""
    stuck = python(f"""
import hashlib
from lm_jax import errors, signals
from lm_jax.workdir import Workdir
def main(argv):
    with signals.ending():
        Workdir({str(tmp_path)!r}).open({{}})
        print("here", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
errors.run(main)
""")
    assert (tmp_path / "lease").exists()
    stuck.send_signal(signal.SIGTERM)
    _, said = stuck.communicate(timeout=60)
    assert stuck.returncode == 75 and "stopped by SIGTERM; the same command" in said, said
    assert not (tmp_path / "lease").exists()


LOOP = """
import time
from lm_jax import errors, signals
def main(argv):
    with signals.caught():
        signals.agreed()  # until it is first asked, there is nothing to save
        print("here", flush=True)
        while not signals.agreed():
            time.sleep(0.01)
        print("saving", flush=True)
        time.sleep({seconds})
        print("saved", flush=True)
    return 75
errors.run(main)
"""


def test_a_loop_is_told_once_and_a_second_signal_is_not_waited_for():
    loop = python(LOOP.format(seconds=60))
    loop.send_signal(signal.SIGINT)
    assert loop.stdout.readline() == "saving\n"
    time.sleep(signals.TWICE + 1)
    loop.send_signal(signal.SIGTERM)
    _, said = loop.communicate(timeout=60)
    assert loop.returncode == 128 + signal.SIGTERM and "a second signal, SIGTERM" in said


def test_a_signal_that_comes_to_a_process_and_then_to_its_group_is_one():
    """As GNU `timeout` sends it, microseconds apart."""
    loop = python(LOOP.format(seconds=1))
    loop.send_signal(signal.SIGTERM)
    assert loop.stdout.readline() == "saving\n"
    loop.send_signal(signal.SIGTERM)
    out, said = loop.communicate(timeout=60)
    assert (loop.returncode, out) == (75, "saved\n"), said
