"""What is done at length by tests/torture.py, done briefly; and what it found, which must not come back."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SETTINGS = ["--config=configs/tiny.py", "--config.model.width=16", "--config.model.depth=1", "--config.data.length=64",
            "--config.data.sources=markov:documents=300,length=63", "--config.data.tokenizer=byte",
            "--config.optim.name=adamw", "--config.train.steps=6", "--config.train.batch=8",
            "--config.train.checkpoint_every=3"]
FULL = """
mount -t tmpfs -o size=40m none "$1" || exit 99
head -c 39000000 /dev/zero > "$1/ballast"
shift; "$@"; echo "code $?"; ls "$0/run/checkpoints"
rm "$0/ballast"; "$@"; echo "code $?"
"""


def trained(folder, faults=""):
    """A start of the run in `folder`, with faults."""
    argv = command(folder / "run", folder / "data")
    return subprocess.run(argv, env=os.environ | {"LM_JAX_FAULTS": faults}, text=True, capture_output=True, timeout=200,
                          cwd=ROOT)


def command(run, data) -> list[str]:
    return [sys.executable, "-m", "lm_jax.train", *SETTINGS, f"--config.data.root={data}", f"--workdir={run}"]


def test_kills_at_random_and_in_each_part_of_a_save_flips_and_a_hopeless_folder_lose_nothing():
    argv = [sys.executable, "tests/torture.py", "--runs=2", "--faults=kills,saves,flips,nothing"]
    found = subprocess.run(argv, text=True, capture_output=True, timeout=600, cwd=ROOT, env=os.environ | {
        "PYTHONPATH": str(ROOT)})
    assert found.returncode == 0, found.stdout + found.stderr
    rows = {row[1]: row.groups()[1:] for row in re.finditer(r"^(\S.*?) +(\d+) +(\d+) +(\d+) +\d+$", found.stdout, re.M)}
    assert rows["SIGKILL"] == rows["flipped bits"] == ("2", "2", "0")
    assert len([what for what in rows if what.startswith("SIGKILL at save/")]) == 5
    assert rows["no checkpoint intact"] == ("1", "1", "0")


def test_an_error_amid_a_save_lets_it_end_and_the_restart_goes_on_from_it(tmp_path):
    """Python's end took the event loops of orbax away: the checkpoint was lost, or the process waited for ever."""
    found = trained(tmp_path, "error@step=4")
    assert found.returncode == 1 and "injected: error@step=4" in found.stderr
    assert "Event loop" not in found.stderr and os.listdir(tmp_path / "run" / "checkpoints") == ["3"]
    again = trained(tmp_path)
    assert again.returncode == 0 and "resumed at step 3" in again.stdout, again.stderr


def test_stalls_are_time_of_the_phase_they_happen_in_and_all_adds_up_to_the_wall_clock(tmp_path):
    stalls = {"data": 1, "restore": 1, "compile": 1, "wait": 3, "step": 4, "record": 2, "save": 1, "evaluation": 1,
              "end": 1}
    begun = time.time()
    found = trained(tmp_path, ",".join(f"stall@{place}={number}:seconds=2" for place, number in stalls.items()))
    assert found.returncode == 0 and found.stderr.count("fault: stall@") == len(stalls), found.stderr
    account = json.loads((tmp_path / "run" / "phases.json").read_text())
    assert sum(account["seconds"].values()) == pytest.approx(account["until"] - begun, rel=0.01, abs=0.1)
    assert all(account["seconds"][phase] >= 2 for phase in stalls), account
    idle = {phase: account["seconds"][phase] for phase in ("restore", "wait", "record")}  # of nothing else to speak of
    assert idle == pytest.approx(dict.fromkeys(idle, 2.0), abs=0.5)


def test_a_disk_that_is_full_ends_a_run_with_all_that_was_saved_and_room_lets_it_go_on(tmp_path):
    """A real one, of 40 MB, with room for two checkpoints."""
    disk = tmp_path / "disk"
    disk.mkdir()
    argv = command(disk / "run", tmp_path / "data") + ["--config.train.checkpoint_every=1", "--config.train.keep=9"]
    if not shutil.which("unshare"):
        pytest.skip("no disk can be mounted here: there is no unshare")
    found = subprocess.run(["unshare", "-rm", "sh", "-c", FULL, str(disk), str(disk), *argv], text=True, timeout=300,
                           capture_output=True, cwd=ROOT)
    if found.returncode == 99 or found.stderr.startswith("unshare:"):
        pytest.skip(f"no disk can be mounted here: {found.stderr}")
    full, _, after = found.stdout.partition("code 74\n")
    saved = re.findall(r"^[0-9]+$", after, re.M)
    assert "No space left on device" in full and saved and "saving" not in after, found.stdout + found.stderr
    assert f"resumed at step {saved[-1]}" in after and after.endswith("code 0\n")
