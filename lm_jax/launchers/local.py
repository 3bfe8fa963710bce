"""Points on this machine: one process each, so many at once, and nothing lost whatever dies.

    <out>/queue/<id>.lock  <host>-<device>.lock     held with flock while a point runs, and the devices it runs on
    <out>/points/<id>/log.txt  failure.json         what it printed, over all its starts; why it was given up

The locks are the queue. They belong to the point's own process too, which inherits them: a pool that is killed -9
leaves its points running and locked, and a second pool on the same folder, there already or started afterwards, takes
what is free, starts again what died, and looks after what still runs: waits for it, and stops it where the first would
have. So two pools also share one sweep, of two machines where their disk is shared and knows flock. A point is finished
when its result is there, and by nothing else.
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
from lm_jax.signals import TWICE

FINAL = {2: "its config cannot run", 77: "its data are damaged", 79: "none of its checkpoints is intact"}
FULL, STOPPED = 74, 75  # exit codes of a run that wants room, and of one that was stopped and has saved
FAILURE = "failure.json"  # says why a point was given up
GRACE = 300.0  # seconds that a point may take to save before it is killed
HOST = socket.gethostname()


@dataclass
class Running:
    """A point's process, the locks it shares, and when it is stopped."""

    job: Job
    process: subprocess.Popen
    locks: list
    deadline: float  # in time.monotonic(), which all processes of a machine share and nobody sets
    told: float = 0.0  # when it was told to stop

    def stop(self, number: int):
        """A signal to all processes of the point."""
        self.told = self.told or time.monotonic()
        _signal(self.process.pid, number)


@dataclass
class Pool:
    """Runs jobs until each has its results or was given up after `retries` further attempts. `at` has of each job
    waiting | running | elsewhere | ok | diverged | failed; elsewhere is in another pool, or in none any more."""

    jobs: Sequence[Job]
    out: Path
    slots: Sequence[Slot]
    retries: int = 2
    say: Callable[[str], None] = print
    poll: float = 0.3  # seconds
    at: dict[str, str] = field(default_factory=dict)
    full: bool = False  # a point found no room on a disk: nothing more is started

    def __post_init__(self):
        (self.out / "queue").mkdir(parents=True, exist_ok=True)
        self.begun = time.time()
        self.tries = {job.id: 0 for job in self.jobs}
        self.running: dict[str, Running] = {}
        self.told: set[str] = set()  # orphans
        self.at = {job.id: job.outcome() or "waiting" for job in self.jobs}

    @property
    def states(self) -> dict[str, str]:
        """Of each point: its own outcome, or where its job is."""
        own = lambda job: job.outcomes() if len(job.points) > 1 else {job.id: None}
        return {point: outcome or self.at[job.id] for job in self.jobs for point, outcome in own(job).items()}

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
        states = set(self.at.values())
        return "stopped" if seen else "full" if self.full else "failed" if "failed" in states else "ok"

    def _step(self) -> bool:
        """Look after what runs, start what can be; whether there is anything left to wait for."""
        for run in list(self.running.values()):
            self._tend(run)
        for job in self.jobs:
            if self.at[job.id] in ("waiting", "elsewhere"):
                self._look(job)
        if not self.full:
            self._fill()
        left = {"running"} if self.full else {"running", "waiting", "elsewhere"}
        return not left.isdisjoint(self.at.values())

    def _fill(self):
        """Start waiting points on free devices."""
        waiting = [job for job in self.jobs if self.at[job.id] == "waiting"]
        for slot in self.slots if waiting else ():
            if (held := self._lock(*(f"{HOST}-{name}" for name in slot.names))) is None:
                continue
            while waiting and held is not None:
                job = waiting.pop(0)
                if (own := self._lock(*job.points)) is None:
                    self.at[job.id] = "elsewhere"
                elif found := self._found(job):  # meanwhile, by another pool
                    self.at[job.id] = found
                    _free(own)
                else:
                    self._start(job, slot, own, held)
                    held = None
            _free(held or [])

    def _start(self, job: Job, slot: Slot, own: list, held: list):
        for file in self._failures(job):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.unlink(missing_ok=True)
        job.folder.mkdir(parents=True, exist_ok=True)
        locks = own + held
        argv = [sys.executable if job.argv[0] == "python" else job.argv[0], *job.argv[1:]]
        with open(job.folder / "log.txt", "a") as log:
            process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                                       env=os.environ | slot.env, pass_fds=[lock.fileno() for lock in locks])
        deadline = time.monotonic() + 60 * job.minutes if job.minutes else float("inf")
        for lock in own:
            lock.write(json.dumps({"host": HOST, "pid": process.pid, "pool": os.getpid(),
                                   "deadline": job.minutes and deadline}))
            lock.flush()
        self.running[job.id] = Running(job, process, locks, deadline)
        self.at[job.id] = "running"

    def _tend(self, run: Running):
        """Stop a point whose time is over; settle one that has ended."""
        code = run.process.poll()
        if code is None:
            if time.monotonic() > run.deadline and not run.told:
                self.say(f"{run.job.id} is over its limit of {run.job.minutes:g} minutes: stopped")
                run.stop(signal.SIGTERM)
            if run.told and time.monotonic() > run.told + GRACE:
                run.stop(signal.SIGKILL)
            return
        run.stop(signal.SIGKILL)  # whatever it has left behind
        _free(run.locks)
        del self.running[run.job.id]
        self._settle(run.job, code, late=time.monotonic() > run.deadline)

    def _settle(self, job: Job, code: int, *, late: bool):
        """What becomes of a point whose process has ended."""
        self.at[job.id] = job.outcome() or "waiting"
        if self.at[job.id] != "waiting" or (code == STOPPED and not late):
            return
        if code == FULL:
            self.full = True
            self.say(f"{job.id}: {job.last_line()}")
            return
        self._again(job, code, f"over {job.minutes:g} minutes" if late else FINAL.get(code, f"exit code {code}"))

    def _again(self, job: Job, code: int, why: str):
        """Try once more a point that has no result, or give it up."""
        self.tries[job.id] += 1
        if code not in FINAL and self.tries[job.id] <= self.retries:
            self.say(f"{job.id} ended, {why}: attempt {self.tries[job.id] + 1} of {self.retries + 1}")
            return
        self.at[job.id], last = "failed", job.last_line()
        failure = {"code": code, "tries": self.tries[job.id], "why": why, "last_line": last, "log": str(job.folder / "log.txt")}
        for file in self._failures(job):
            disk.replace(file, [json.dumps(failure, indent=2), "\n"])
        self.say(f"{job.id} failed, {why}, and is given up after {self.tries[job.id]} attempts: {last}")

    def _look(self, job: Job):
        """See whether another pool has a point, or had it and it ended or died; if no pool looks after it, do."""
        if found := self._found(job):
            self.at[job.id] = found
        elif own := self._lock(*job.points):
            self.at[job.id] = "waiting"
            if job.id in self.told:
                self.told.remove(job.id)
                self._again(job, 0, f"over {job.minutes:g} minutes")
            _free(own)
        else:
            self.at[job.id] = "elsewhere"
            if (holder := self._orphan(job)) and 0 < holder["deadline"] < time.monotonic():
                self._end(job, holder)

    def _found(self, job: Job) -> str | None:
        """How a point has ended: by its result, or given up by a pool since this one began."""
        files = self._failures(job)
        if files and all(file.exists() and file.stat().st_mtime > self.begun for file in files):
            return "failed"
        return job.outcome()

    def _failures(self, job: Job) -> list[Path]:
        """The files that say why its points were given up, of those that have no result."""
        return [self.out / "points" / point / FAILURE for point, outcome in job.outcomes().items() if not outcome]

    def _end(self, job: Job, holder: dict):
        """Stop a point that has outlived its pool and its time."""
        if job.id not in self.told:
            self.told.add(job.id)
            self.say(f"{job.id} is over its limit of {job.minutes:g} minutes: stopped")
            _signal(holder["pid"], signal.SIGTERM)
        elif holder["deadline"] < time.monotonic() - GRACE:
            _signal(holder["pid"], signal.SIGKILL)

    def _orphan(self, job: Job) -> dict | None:
        """Who holds a point of the job, if that is a process of this machine whose pool is no more."""
        for point in job.points:
            if own := self._lock(point):
                _free(own)
                continue
            try:
                holder = disk.read_json(self.out / "queue" / f"{point}.lock")
            except ValueError:  # of one who has only just taken it
                return None
            return holder if holder["host"] == HOST and not _lives(holder["pool"]) else None
        return None

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
        """Have all points save and end, orphans too; a signal more, or too long a wait, and they are killed."""
        for run in self.running.values():
            if not run.told:  # a second signal would end it unsaved
                run.stop(signal.SIGTERM)
        for job in self.jobs:
            if self.at[job.id] == "elsewhere" and job.id not in self.told and (holder := self._orphan(job)):
                _signal(holder["pid"], signal.SIGTERM)
        while self.running:
            for run in list(self.running.values()):
                if len(seen) > 1:
                    run.stop(signal.SIGKILL)
                if run.process.poll() is not None:
                    self.at[run.job.id] = run.job.outcome() or "waiting"
                    _free(run.locks)
                    del self.running[run.job.id]
                elif time.monotonic() > run.told + GRACE:
                    run.stop(signal.SIGKILL)
            time.sleep(0.05)


def _signal(group: int, number: int):
    """A signal to all processes of a group, if there are any left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _free(locks: list):
    for lock in locks:
        lock.close()


@contextlib.contextmanager
def _signals():
    """A list of when SIGINTs and SIGTERMs came, which do nothing else meanwhile."""
    seen = []

    def hear(number, frame):
        if not seen or time.monotonic() > seen[0] + TWICE:
            seen.append(time.monotonic())

    before = {s: signal.signal(s, hear) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
