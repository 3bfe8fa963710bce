"""Points on this machine: one process each, so many at once, and nothing lost whatever dies.

    <out>/queue/<id>.lock  <host>-<device>.lock     held with flock while a point runs, and the devices it runs on
    <out>/points/<id>/log.txt  failure.json         what it printed, over all its starts; why it was given up

The locks are the queue. They belong to the point's own process too, which inherits them: a pool that is killed -9
leaves its points running and locked, and a second pool on the same folder, there already or started afterwards, takes
what is free, waits for what still runs, and starts again what died. So two pools also share one sweep, of two machines
where their disk is shared and knows flock. A point is finished when its result is there, and by nothing else.
"""

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lm_jax import disk
from lm_jax.launchers.job import Job
from lm_jax.launchers.slots import Slot

FINAL = {2: "its config cannot run", 77: "its data are damaged", 79: "none of its checkpoints is intact"}
FULL, STOPPED = 74, 75  # exit codes of a run that wants room, and of one that was stopped and has saved
GRACE = 300.0  # seconds that a point may take to save before it is killed
HOST = socket.gethostname()


@dataclass
class Running:
    """A point's process, the locks it shares, and when it is stopped."""

    job: Job
    process: subprocess.Popen
    locks: list
    deadline: float  # in time.time()
    told: float = 0.0  # when it was told to stop

    def stop(self, number: int):
        """A signal to all processes of the point."""
        self.told = self.told or time.time()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


@dataclass
class Pool:
    """Runs jobs until each has a result or was given up after `retries` further attempts. `states` has of each id
    waiting | running | elsewhere | ok | diverged | failed; elsewhere is in another pool, or in none any more."""

    jobs: Sequence[Job]
    out: Path
    slots: Sequence[Slot]
    retries: int = 2
    say: Callable[[str], None] = print
    poll: float = 0.3  # seconds
    states: dict[str, str] = field(default_factory=dict)
    full: bool = False  # a point found no room on a disk: nothing more is started

    def __post_init__(self):
        (self.out / "queue").mkdir(parents=True, exist_ok=True)
        self.begun = time.time()
        self.tries = {job.id: 0 for job in self.jobs}
        self.running: dict[str, Running] = {}
        self.states = {job.id: outcome(job) or "waiting" for job in self.jobs}

    def run(self, watch: Callable[["Pool"], None] = lambda pool: None) -> str:
        """Work; `watch(pool)` is called a few times a second. Returns "ok" (each point has a result), "failed",
        "stopped" (by SIGINT or SIGTERM, points have saved; a second one kills them) or "full" (a disk)."""
        with _signals() as seen:
            try:
                while not seen and self._step():
                    watch(self)
                    time.sleep(self.poll)
            finally:
                self._stop(seen)
        watch(self)
        states = set(self.states.values())
        return "stopped" if seen else "full" if self.full else "failed" if "failed" in states else "ok"

    def _step(self) -> bool:
        """Look after what runs, start what can be; whether there is anything left to wait for."""
        for run in list(self.running.values()):
            self._tend(run)
        for job in self.jobs:
            if self.states[job.id] == "elsewhere":
                self._look(job)
        if not self.full:
            self._fill()
        left = {"running"} if self.full else {"running", "waiting", "elsewhere"}
        return not left.isdisjoint(self.states.values())

    def _fill(self):
        """Start waiting points on free devices."""
        waiting = [job for job in self.jobs if self.states[job.id] == "waiting"]
        for slot in self.slots if waiting else ():
            if (held := self._lock(*(f"{HOST}-{name}" for name in slot.names))) is None:
                continue
            while waiting and held is not None:
                job = waiting.pop(0)
                if (own := self._lock(job.id)) is None:
                    self.states[job.id] = "elsewhere"
                elif found := self._found(job):  # meanwhile, by another pool
                    self.states[job.id] = found
                    _free(own)
                else:
                    self._start(job, slot, own + held)
                    held = None
            _free(held or [])

    def _start(self, job: Job, slot: Slot, locks: list):
        folder = Path(job.result).parent
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "failure.json").unlink(missing_ok=True)
        argv = [sys.executable if job.argv[0] == "python" else job.argv[0], *job.argv[1:]]
        with open(folder / "log.txt", "a") as log:
            process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                                       env=os.environ | slot.env, pass_fds=[lock.fileno() for lock in locks])
        deadline = time.time() + 60 * job.minutes if job.minutes else float("inf")
        locks[0].write(json.dumps({"host": HOST, "pid": process.pid, "deadline": job.minutes and deadline}))
        locks[0].flush()
        self.running[job.id] = Running(job, process, locks, deadline)
        self.states[job.id] = "running"

    def _tend(self, run: Running):
        """Stop a point whose time is over; settle one that has ended."""
        code = run.process.poll()
        if code is None:
            if time.time() > run.deadline and not run.told:
                self.say(f"{run.job.id} is over its limit of {run.job.minutes:g} minutes: stopped")
                run.stop(signal.SIGTERM)
            if run.told and time.time() > run.told + GRACE:
                run.stop(signal.SIGKILL)
            return
        run.stop(signal.SIGKILL)  # whatever it has left behind
        _free(run.locks)
        del self.running[run.job.id]
        self._settle(run.job, code, late=time.time() > run.deadline)

    def _settle(self, job: Job, code: int, *, late: bool):
        """What becomes of a point whose process has ended."""
        self.states[job.id] = outcome(job) or "waiting"
        if self.states[job.id] != "waiting" or (code == STOPPED and not late):
            return
        if code == FULL:
            self.full = True
            self.say(f"{job.id}: {_last_line(job)}")
            return
        self.tries[job.id] += 1
        why = f"over {job.minutes:g} minutes" if late else FINAL.get(code, f"exit code {code}")
        if code in FINAL or self.tries[job.id] > self.retries:
            self.states[job.id] = "failed"
            disk.replace(_failure(job), [json.dumps({"code": code, "tries": self.tries[job.id], "why": why,
                                                     "last_line": _last_line(job)}, indent=2), "\n"])
            self.say(f"{job.id} failed, {why}, and is given up after {self.tries[job.id]} attempts: {_last_line(job)}")
        else:
            self.say(f"{job.id} ended with {why}: attempt {self.tries[job.id] + 1} of {self.retries + 1}")

    def _look(self, job: Job):
        """See what became of a point that another pool had."""
        if found := self._found(job):
            self.states[job.id] = found
        elif own := self._lock(job.id):  # free: it ended, or died
            _free(own)
            self.states[job.id] = "waiting"
        else:
            self._overdue(job)

    def _found(self, job: Job) -> str | None:
        """How a point has ended: by its result, or given up by a pool since this one began."""
        if _failure(job).exists() and _failure(job).stat().st_mtime > self.begun:
            return "failed"
        return outcome(job)

    def _overdue(self, job: Job):
        """Stop a point over its limit whose pool is no longer there to do it."""
        try:
            holder = disk.read_json(self.out / "queue" / f"{job.id}.lock")
        except ValueError:  # of one who has only just taken it
            return
        if holder["host"] == HOST and 0 < holder["deadline"] < time.time() - GRACE:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(holder["pid"], signal.SIGKILL)
            self.tries[job.id] += 1

    def _lock(self, *names: str) -> list | None:
        """The files of these names, each locked; None, and nothing locked, if another process has one."""
        files = []
        for name in names:
            files.append(open(self.out / "queue" / f"{name}.lock", "a+"))
            try:
                fcntl.flock(files[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _free(files)
                return None
        for file in files:
            file.truncate(0)  # of what an earlier holder said
        return files

    def _stop(self, seen: list):
        """Have all points save and end; a signal more, or too long a wait, and they are killed."""
        for run in self.running.values():
            run.stop(signal.SIGTERM)
        while self.running:
            for run in list(self.running.values()):
                if len(seen) > 1:
                    run.stop(signal.SIGKILL)
                if run.process.poll() is not None:
                    self.states[run.job.id] = outcome(run.job) or "waiting"
                    _free(run.locks)
                    del self.running[run.job.id]
                elif time.time() > run.told + GRACE:
                    run.stop(signal.SIGKILL)
            time.sleep(0.05)


def outcome(job: Job) -> str | None:
    """"ok" or "diverged" where a job has its result; None where it has none, or one that says it was stopped."""
    try:
        status = (disk.read_json(Path(job.result)) or {}).get("status")
    except (ValueError, AttributeError):
        return None  # damaged: running the point again goes on from its last checkpoint and writes it anew
    return status if status in ("ok", "diverged") else None


def _failure(job: Job) -> Path:
    return Path(job.result).with_name("failure.json")


def _last_line(job: Job) -> str:
    """What a point said last, which for an error is what was wrong."""
    try:
        with open(Path(job.result).with_name("log.txt"), "rb") as log:
            log.seek(max(0, os.path.getsize(log.name) - 4096))
            lines = log.read().decode(errors="replace").split("\n")
    except FileNotFoundError:
        return "it printed nothing"
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "it printed nothing")


def _free(locks: list):
    for lock in locks:
        lock.close()


@contextlib.contextmanager
def _signals():
    """A list of the SIGINTs and SIGTERMs that came, which do nothing else meanwhile."""
    seen = []
    before = {s: signal.signal(s, lambda number, frame: seen.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
