"""A folder that hosts share belongs to one trainer, who is believed for as long as it is seen to live."""

import json
import subprocess
import sys
import threading

import pytest

from lm_jax import lease
from lm_jax.errors import ConfigError
from lm_jax.workdir import Workdir


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lease, "BEAT", 0.1)
    monkeypatch.setattr(lease, "STALE", 1.0)


def left(folder, host="elsewhere 1", beats=0):
    """The lease of a process of another host."""
    folder.mkdir(exist_ok=True)
    (folder / "lease").write_text(json.dumps({"host": host, "name": "elsewhere", "process": 7, "beats": beats}))


def test_a_trainer_of_another_host_that_lives_keeps_the_folder(tmp_path):
    left(tmp_path)
    over = threading.Event()

    def beat():
        for beats in range(1, 1000):
            if over.wait(0.3):
                return
            left(tmp_path, beats=beats)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(ConfigError, match="in use by process 7 on elsewhere: wait until it ends"):
            Workdir(tmp_path).open({})
    finally:
        over.set()
        thread.join()
    assert json.loads((tmp_path / "lease").read_text())["process"] == 7


@pytest.mark.parametrize("text", [None, "", "{", json.dumps({"host": lease.HOST, "name": "here", "process": 1})])
def test_one_that_is_dead_leaves_it_to_the_next(tmp_path, text):
    left(tmp_path)
    if text is not None:
        (tmp_path / "lease").write_text(text)
    run = Workdir(tmp_path)
    run.open({})
    assert json.loads((tmp_path / "lease").read_text())["host"] == lease.HOST
    run.close()
    assert not list(tmp_path.glob("lease*")), "who ends takes its lease away"


def test_a_lease_is_renewed_and_whoever_lost_it_ends(tmp_path):
    code = f"""
import time
from lm_jax import lease
from lm_jax.workdir import Workdir
lease.BEAT = 0.1
Workdir({str(tmp_path)!r}).open({{}})
print("open", flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], text=True, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "open\n"
    beats = set()
    while len(beats) < 3:
        beats.add((tmp_path / "lease").read_text())
    left(tmp_path)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 2 and "taken over by process 7 on elsewhere" in said
