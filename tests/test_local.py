"""The pool of this machine: limits, retries, stops, and what is left of it after kill -9. Points are tiny programs."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from lm_jax.errors import ConfigError
from lm_jax.launchers import slots
from lm_jax.launchers.job import Job
from lm_jax.launchers.local import Pool
from lm_jax.launchers.slots import Slot

# A point: notes that it began, does as it is told, and writes its result as training does.
POINT = """
import json, os, pathlib, signal, sys, time
folder, what, seconds = pathlib.Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
def save(*_):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one kills
    time.sleep(0.3)
    print("saved")
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
began = folder / "began"
began.write_text((began.read_text() if began.exists() else "") + f"{os.getpid()} {os.getpgid(0)}\\n")
times = len(began.read_text().splitlines())
time.sleep(seconds)
print("what is wrong")
if what.isdigit() and what != "78": sys.exit(int(what))
if what == "oncekilled" and times == 1: os.kill(os.getpid(), signal.SIGKILL)
if what == "oncehung" and times == 1: time.sleep(600)
if what.startswith("once") and times == 1: sys.exit(int(what[4:]))
status = "diverged" if what == "78" else "ok"
(folder / "hidden").write_text(json.dumps({"status": status}))
os.rename(folder / "hidden", folder / "summary.json")
sys.exit(78 if what == "78" else 0)
"""
POOL = """
import pathlib, sys
sys.path.insert(0, sys.argv[1])
from test_local import jobs, pool
out = pathlib.Path(sys.argv[2])
todo = jobs(out, eval(sys.argv[3]), minutes=float(sys.argv[5]))
print(pool(out, todo, at_once=int(sys.argv[4])).run(), flush=True)
"""


def jobs(out, points: dict, minutes=0.0):
    """Jobs of {name: (what, seconds)}."""
    made = []
    for name, (what, seconds) in points.items():
        folder = out / "points" / name
        folder.mkdir(parents=True, exist_ok=True)
        argv = ("python", "-c", POINT, str(folder), what, str(seconds))
        made.append(Job(name, argv, minutes, (str(folder / "summary.json"),)))
    return made


def pool(out, todo, at_once=1, **more):
    return Pool(todo, out, [Slot((f"cpu{i}",)) for i in range(at_once)], poll=0.02, **more)


def other(out, points: dict, at_once=1, minutes=0.0):
    """A pool in a process of its own."""
    here = os.path.dirname(__file__)
    argv = [sys.executable, "-c", POOL, here, str(out), repr(points), str(at_once), str(minutes)]
    return subprocess.Popen(argv, text=True, stdout=subprocess.PIPE, cwd=os.path.dirname(here))


def began(out, name) -> list[str]:
    """A line, of process and group, for each start of a point."""
    file = out / "points" / name / "began"
    return file.read_text().splitlines() if file.exists() else []


def until(happened, seconds=20):
    deadline = time.time() + seconds
    while not happened():
        assert time.time() < deadline, "it never happened"
        time.sleep(0.02)


def test_points_run_once_in_groups_of_their_own_and_so_many_at_once(tmp_path):
    todo, most = jobs(tmp_path, {f"p{i}": ("ok", 0.1) for i in range(5)}), []
    first = pool(tmp_path, todo, at_once=2)
    assert first.run(lambda p: most.append(len(p.running))) == "ok"
    assert max(most) == 2 and set(first.states.values()) == {"ok"}
    for job in todo:
        (line,) = began(tmp_path, job.id)
        process, group = line.split()
        assert process == group != str(os.getpgid(0))
    assert pool(tmp_path, todo).run() == "ok" and len(began(tmp_path, "p0")) == 1


def test_an_exit_code_decides_what_is_tried_again(tmp_path):
    points = {"crash": ("1", 0), "config": ("2", 0), "data": ("77", 0), "lost": ("79", 0), "diverged": ("78", 0),
              "shaky": ("once1", 0), "stopped": ("once75", 0)}
    said = []
    run = pool(tmp_path, jobs(tmp_path, points), at_once=4, retries=1, say=said.append)
    assert run.run() == "failed"
    assert run.states == {"crash": "failed", "config": "failed", "data": "failed", "lost": "failed",
                          "diverged": "diverged", "shaky": "ok", "stopped": "ok"}
    assert {name: len(began(tmp_path, name)) for name in points} == {
        "crash": 2, "config": 1, "data": 1, "lost": 1, "diverged": 1, "shaky": 2, "stopped": 2}
    failure = json.loads((tmp_path / "points/crash/failure.json").read_text())
    assert (failure["code"], failure["tries"], failure["last_line"]) == (1, 2, "what is wrong")
    assert any("config failed, its config cannot run" in line for line in said)


def test_no_room_on_a_disk_starts_nothing_more(tmp_path):
    run = pool(tmp_path, jobs(tmp_path, {"a": ("74", 0), "b": ("ok", 0)}), say=lambda line: None)
    assert run.run() == "full" and not began(tmp_path, "b")
    assert run.states == {"a": "waiting", "b": "waiting"}


def test_a_point_over_its_time_saves_and_is_given_up_after_its_attempts(tmp_path):
    said = []
    run = pool(tmp_path, jobs(tmp_path, {"slow": ("ok", 60)}, minutes=0.3 / 60), retries=1, say=said.append)
    assert run.run() == "failed" and len(began(tmp_path, "slow")) == 2
    assert "saved" in (tmp_path / "points/slow/log.txt").read_text()
    assert "over 0.005 minutes" in json.loads((tmp_path / "points/slow/failure.json").read_text())["why"]


def test_a_clock_that_is_put_on_ends_no_point_before_its_time(tmp_path, monkeypatch):
    run, now = pool(tmp_path, jobs(tmp_path, {"a": ("ok", 1)}, minutes=10), retries=0), time.time
    until(lambda: run._step() and began(tmp_path, "a"))
    monkeypatch.setattr(time, "time", lambda: now() + 86_400)
    assert run.run() == "ok" and len(began(tmp_path, "a")) == 1


def test_a_signal_to_the_pool_has_its_points_save_and_end(tmp_path):
    points = {"a": ("ok", 60), "b": ("ok", 60)}
    running = other(tmp_path, points)
    until(lambda: began(tmp_path, "a"))
    running.send_signal(signal.SIGINT)
    assert running.communicate(timeout=20)[0].strip() == "stopped"
    assert "saved" in (tmp_path / "points/a/log.txt").read_text() and not began(tmp_path, "b")


def test_a_signal_that_comes_twice_at_once_is_one_and_a_point_that_was_told_is_not_told_again(tmp_path):
    """As `timeout` sends it: a second one would kill what still saves."""
    running = other(tmp_path, {"a": ("ok", 60)})
    until(lambda: began(tmp_path, "a"))
    for _ in range(2):
        running.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    assert running.communicate(timeout=20)[0].strip() == "stopped"
    assert "saved" in (tmp_path / "points/a/log.txt").read_text()
    late = pool(tmp_path, jobs(tmp_path, {"late": ("ok", 60)}, minutes=0.3 / 60), say=lambda line: None)
    until(lambda: late._step() and late.running["late"].told)
    late._stop([signal.SIGTERM])
    assert "saved" in (tmp_path / "points/late/log.txt").read_text()


def test_after_kill_9_of_the_pool_a_second_one_takes_over_and_runs_nothing_twice(tmp_path):
    points = {"a": ("ok", 1.5), "b": ("ok", 0), "c": ("ok", 0)}
    first = other(tmp_path, points)
    until(lambda: began(tmp_path, "a"))
    first.kill()
    first.communicate()
    assert not (tmp_path / "points/a/summary.json").exists()
    seen = []
    second = pool(tmp_path, jobs(tmp_path, points), at_once=2)
    assert second.run(lambda p: seen.append(dict(p.states))) == "ok"
    assert any(states["a"] == "elsewhere" and states["b"] == "ok" for states in seen), "what lives is left alone"
    assert [len(began(tmp_path, name)) for name in points] == [1, 1, 1]


def test_what_died_with_the_pool_is_run_again(tmp_path):
    first = other(tmp_path, {"a": ("ok", 60)})
    until(lambda: began(tmp_path, "a"))
    first.kill()
    first.communicate()
    os.kill(int(began(tmp_path, "a")[0].split()[0]), signal.SIGKILL)
    assert pool(tmp_path, jobs(tmp_path, {"a": ("ok", 0)})).run() == "ok"
    assert len(began(tmp_path, "a")) == 2


def test_twenty_points_five_faults_and_two_kills_of_the_pool_give_each_its_result_once(tmp_path):
    points = {f"p{i:02}": ("ok", 0.3) for i in range(20)}
    points |= {"p02": ("once1", 0), "p05": ("oncehung", 0), "p07": ("oncekilled", 0), "p11": ("78", 0),
               "p13": ("once75", 0)}  # crashed, hung, killed for its memory, diverged, preempted
    for ended in (4, 10):
        killed = other(tmp_path, points, at_once=3, minutes=0.1)
        until(lambda: len(list(tmp_path.glob("points/*/summary.json"))) >= ended, seconds=60)
        killed.kill()
        killed.communicate()
    last = pool(tmp_path, jobs(tmp_path, points, minutes=0.1), at_once=3, say=lambda line: None)
    last.run()
    assert last.states == {name: "diverged" if what == "78" else "ok" for name, (what, _) in points.items()}
    assert {name: len(began(tmp_path, name)) for name in points} == {
        name: 2 if what.startswith("once") else 1 for name, (what, _) in points.items()}


def orphaned(out, points, minutes=0.0):
    """A pool's successor, while a point of the first, which was killed, still runs; and that point's process."""
    first = other(out, points, minutes=minutes)
    until(lambda: began(out, "a"))
    first.kill()
    first.communicate()
    (line,) = began(out, "a")
    return pool(out, jobs(out, points, minutes=minutes), retries=0, say=lambda line: None), int(line.split()[0])


def ended(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().split()[2] == "Z"
    except FileNotFoundError:
        return True


def test_a_point_that_outlived_its_pool_and_its_time_is_stopped(tmp_path):
    second, process = orphaned(tmp_path, {"a": ("ok", 60)}, minutes=0.5 / 60)
    until(lambda: not second._step())
    assert ended(process) and second.states == {"a": "failed"}
    assert "saved" in (tmp_path / "points/a/log.txt").read_text()


def test_a_pool_that_is_stopped_stops_the_points_of_one_that_was_killed(tmp_path):
    second, process = orphaned(tmp_path, {"a": ("ok", 60), "b": ("ok", 60)})
    until(lambda: second._step() and second.states["a"] == "elsewhere")
    second._stop([signal.SIGINT])
    until(lambda: ended(process))
    assert (tmp_path / "points/a/log.txt").read_text().strip() == "saved"


def test_two_pools_share_one_sweep(tmp_path):
    points = {f"p{i}": ("ok", 0.3) for i in range(6)}
    another = other(tmp_path, points, at_once=1)
    until(lambda: began(tmp_path, "p0"))
    here, mine = pool(tmp_path, jobs(tmp_path, points), at_once=2), set()
    assert here.run(lambda p: mine.update(p.running)) == "ok"
    assert another.communicate(timeout=20)[0].strip() == "ok"
    assert 0 < len(mine) < 6 and [len(began(tmp_path, name)) for name in points] == [1] * 6


def test_cores_are_divided_among_points_at_once(monkeypatch):
    monkeypatch.setattr(slots, "cores", lambda env: 8)
    share = lambda jobs: [slot.env for slot in slots.slots(jobs, {"JAX_PLATFORMS": "cpu"})]
    assert share(0) == share(1) == [{}], "one process has all of them without being told"
    assert share(3) == [{"NPROC": "2"}] * 3 and share(9) == [{"NPROC": "1"}] * 9


def test_devices_are_divided_and_no_two_points_have_the_same():
    env = {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    two = slots.slots(2, env)
    assert [slot.env["CUDA_VISIBLE_DEVICES"] for slot in two] == ["0,1", "2,3"]
    assert two[1].names == ("gpu2", "gpu3") and len(slots.slots(0, env)) == 4
    chips = slots.slots(0, {"TPU_VISIBLE_CHIPS": "0,1", "CUDA_VISIBLE_DEVICES": ""})
    assert chips[1].env["TPU_VISIBLE_CHIPS"] == "1" and chips[1].env["TPU_PROCESS_BOUNDS"] == "1,1,1"
    assert slots.slots(1, env)[0].env == {}, "one process has all of them without being told"
    assert len(slots.slots(0, {"JAX_PLATFORMS": "cpu"})) == 1 and len(slots.slots(3, {"JAX_PLATFORMS": "cpu"})) == 3
    with pytest.raises(ConfigError, match="--jobs=3 over 4 gpus: use a divisor"):
        slots.slots(3, env)
