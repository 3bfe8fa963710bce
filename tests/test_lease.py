"""A folder that hosts share belongs to one trainer, who is believed for as long as it is seen to live."""

import errno
import fcntl
import json
import os
import resource
import subprocess
import sys
import threading

import pytest
from test_hosts import free_port, python

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


@pytest.mark.parametrize("first", [None, ""], ids=["whole", "still empty"])
def test_a_trainer_of_another_host_that_lives_keeps_the_folder(tmp_path, first):
    left(tmp_path)
    if first is not None:  # buckets may show it so for a while
        (tmp_path / "lease").write_text(first)
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
    process = subprocess.Popen([sys.executable, "-c", code], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == "open\n"
    beats = set()
    while len(beats) < 3:
        beats.add((tmp_path / "lease").read_text())
    left(tmp_path)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 2 and "taken over by process 7 on elsewhere" in said
    assert json.loads((tmp_path / "lease").read_text())["process"] == 7, "it is the other's"


LOSES = """
import pathlib, sys, time
from lm_jax import errors, hosts, lease, peers, signals
from lm_jax.workdir import Workdir
def main(argv):
    hosts.start(*argv[1:4])
    lease.BEAT, me, folder = 0.1, int(argv[3]), pathlib.Path(argv[4])
    with signals.ending():
        if me == 0:
            Workdir(folder).open({})
            (folder / "lease").write_text('{"host": "elsewhere 1", "name": "elsewhere", "process": 7, "beats": 0}')
        time.sleep(60)
errors.run(main)
"""


def test_when_the_first_process_has_lost_it_all_end_and_say_why(tmp_path):
    at = f"127.0.0.1:{free_port()}"
    running = [python(LOSES, [at, "2", str(n), str(tmp_path)]) for n in range(2)]
    try:
        said = [process.communicate(timeout=60)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [2, 2], said
    assert "taken over by process 7" in said[0] and "process 0 ends with code 2" in said[1], said


def test_a_disk_without_room_is_left_without_a_lease(tmp_path):
    """An empty one would keep the next trainer waiting."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
    try:
        with pytest.raises(OSError):
            lease.Lease(tmp_path, alone=True, lost=pytest.fail)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert not list(tmp_path.iterdir())


def refuse(number):
    def refused(*args):
        raise OSError(number, os.strerror(number))

    return refused


def test_where_files_cannot_be_linked_a_lease_is_taken_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", refuse(errno.ENOTSUP))
    run = Workdir(tmp_path)
    run.open({})
    assert json.loads((tmp_path / "lease").read_text())["host"] == lease.HOST
    with pytest.raises(ConfigError, match="in use"):
        lease.Lease(tmp_path, alone=False, lost=pytest.fail)
    run.close()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_where_there_are_no_locks_the_lease_keeps_others_of_this_host_out(tmp_path, monkeypatch, capsys, number):
    monkeypatch.setattr(fcntl, "flock", refuse(number))
    run = Workdir(tmp_path)
    run.open({})
    assert "on a disk without locks" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=f"in use by process {os.getpid()}"):
        Workdir(tmp_path).open({})
    run.close()
    Workdir(tmp_path).open({})
