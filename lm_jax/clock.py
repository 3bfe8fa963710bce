"""Where a run's time goes, and the end of one that hangs.

A run is in one phase at a time, so that what the phases took adds up to the wall clock; what a kill cost is there too,
as `idle` (until the next start) and `replay` (steps that were made again). A thread keeps the account in
<workdir>/phases.json. Another, which touches no disk, ends a process that is longer in a phase than it may be, with the
stacks of all its threads and exit code 76: a process that waits for a dead peer, for a disk, or for a loader that waits
for itself, would else hold its chips for ever. Of several processes one may wait in a step for what another does, which
has a limit of its own: they end when all are late, and all then show their stacks.
"""

import contextlib
import json
import os
import statistics
import sys
import threading
import time
from collections import deque
from pathlib import Path

from lm_jax import disk, errors, faults, lease, peers

HUNG = 76  # exit code
LEAST, TIMES = 60.0, 10.0  # seconds that a step or its batch may take at least, or so many times the median step
# Seconds of each phase without a sign of progress. A first step compiles. Data are prepared by one process while the
# others wait, for days if there are many; the start and a restore read whole checkpoints.
LIMITS = {"start": peers.LONG, "data": peers.ENDLESS, "restore": peers.LONG, "compile": 3600.0, "wait": 600.0,
          "step": 3600.0, "record": peers.BRIEF, "compare": peers.BRIEF, "save": peers.LONG, "evaluation": 1800.0,
          "end": 1800.0}
TICK, RECORD = 0.5, 10.0  # seconds between looks, and between records
SHOWN, LAST = 2.0, 20.0  # seconds for showing stacks on the disk or the screen, and for all of the end of what hangs


def age() -> float:
    """Seconds since this process began, where the system tells."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, AttributeError):
        return 0.0


class Clock:
    """Times phases, of which `age` seconds have gone already. `watch` gives it a run's folder and sets the limits."""

    def __init__(self, age: float = 0.0):
        self.seconds = {"start": age}  # of each phase, over all starts of the run
        self._lock, self._over = threading.Lock(), threading.Event()
        self._phases, self._since = ["start"], time.monotonic()
        self._beat = time.monotonic()  # when there was last a sign of progress
        self._steps = deque(maxlen=64)  # seconds of the latest
        self._file, self._threads = None, ()
        self._recording = threading.Lock()
        self._patience = 0.0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    @contextlib.contextmanager
    def phase(self, name: str):
        """Within it time is `name`'s, whatever phase it lies in."""
        self._turn(lambda: self._phases.append(name))
        try:
            if name != "step":  # which is told by its number
                faults.reach(name)
            yield
        finally:
            self._turn(self._phases.pop)

    def step(self):
        """A step, or as many as are sent at once, has been seen to end: the next has its full time."""
        self._steps.append(time.monotonic() - self._beat)
        self.beat()

    def beat(self):
        """A sign of progress within a phase."""
        self._beat = time.monotonic()

    def watch(self, folder: Path, *, writes: bool, patience: float):
        """Go on with the account in a folder (`writes`: keep it), and end a process that hangs; limits are multiplied
        by `patience`, 0 is none."""
        if self._threads:
            return  # of runs that are made together the first one's folder has the account
        self._file, self._patience = (folder / "phases.json" if writes else None), patience
        before = _read(folder / "phases.json") if writes else None
        if before:
            self.add("idle", max(0.0, _since(before) - sum(self._now().values())))
            for name, seconds in before["seconds"].items():
                self.add(name, seconds)
        self._threads = [threading.Thread(target=work, name=work.__name__, daemon=True)
                         for work in (self._guard, self._keep)]
        for thread in self._threads:
            thread.start()

    def add(self, name: str, seconds: float):
        with self._lock:
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def replayed(self, seconds: float):
        """Steps of so many seconds are made again: what they took before was lost."""
        lost = min(seconds, self.seconds.get("step", 0.0))
        self.add("step", -lost)
        self.add("replay", lost)

    def account(self) -> dict:
        """Seconds of each phase, and the share of all that steps took which were not lost."""
        found = self._now()
        return {"phases": found, "goodput": found.get("step", 0.0) / max(sum(found.values()), 1e-9)}

    def close(self):
        """The account is complete; stop watching."""
        self._record()
        self._over.set()
        for thread in self._threads:
            thread.join()
        self._threads = ()

    def _turn(self, change):
        with self._lock:
            now = time.monotonic()
            name = self._phases[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
            self._since = self._beat = now
            change()

    def _now(self) -> dict[str, float]:
        with self._lock:
            running = {self._phases[-1]: time.monotonic() - self._since}
            return {name: self.seconds.get(name, 0.0) + running.get(name, 0.0)
                    for name in self.seconds.keys() | running.keys()}

    def _keep(self):
        while not self._over.wait(RECORD):
            self._record()

    def _guard(self):
        last, late_said = time.monotonic(), False
        while not self._over.wait(TICK):
            now = time.monotonic()
            if (away := now - last) > 10 * TICK:  # the process was paused, and has not had that time
                self._beat += away
            last = now
            phase, late = self._phases[-1], time.monotonic() - self._beat
            is_late = bool(self._patience) and late > self._patience * self._limit(phase)
            if is_late != late_said:
                late_said = is_late
                self._say_late(is_late, phase)
            if is_late and (self._all_late() or late > self._patience * peers.LONG):
                self._end(phase, late)

    def _limit(self, phase: str) -> float:
        if phase in ("step", "wait") and self._steps:
            return max(LEAST, TIMES * statistics.median(self._steps))
        return LIMITS[phase]

    def _say_late(self, late: bool, phase: str):
        """Tell the other processes that this one is late, or no more."""
        if peers.count() > 1:
            key = f"late/{peers.number()}"
            with contextlib.suppress(RuntimeError):
                peers.put(key, phase) if late else peers.take_back(key)

    def _all_late(self) -> bool:
        return peers.count() == 1 or len(self._late()) in (0, peers.count())  # none: the store is out of reach

    def _late(self) -> dict[str, str]:
        """The phases of the processes that are late."""
        try:
            return peers.found("late") if peers.count() > 1 else {}
        except RuntimeError:
            return {}

    def _end(self, phase, late):
        """End the process, also where what hangs is the disk, the network or who reads what is printed."""
        last = threading.Timer(LAST, os._exit, (HUNG,))
        last.daemon = True
        last.start()
        others = "".join(f", process {n} in {where!r}" for n, where in self._late().items()
                         if n != str(peers.number()))
        said = (f"nothing has happened for {late:.0f} s in phase {phase!r}{others}: this process hangs and ends with "
                f"code {HUNG}; the same command goes on from the last checkpoint")
        shows = [threading.Thread(target=show, args=(said, errors.stacks()), daemon=True)
                 for show in (self._print, self._leave)]
        for show in shows:
            show.start()
        for show in shows:
            show.join(SHOWN)
        with contextlib.suppress(RuntimeError):
            peers.tell(HUNG, said)
        peers.depart(HUNG, said)

    def _print(self, said: str, stacks: str):
        print(f"Stacks of the threads of process {peers.number()}:\n{stacks}", file=sys.stderr, flush=True)

    def _leave(self, said: str, stacks: str):
        """Put into the folder what there is to know of the end."""
        if self._file:
            with contextlib.suppress(OSError):
                self._file.with_name("stacks.txt").write_text(f"{said}\n{stacks}\n")
            self._record()

    def _record(self):
        if self._file:
            with self._recording, contextlib.suppress(OSError):  # a full disk is told by what matters more
                text = json.dumps(_moment() | {"seconds": self._now()}, indent=2)
                disk.replace(self._file, [text, "\n"])


def _moment() -> dict:
    """Now, by the clock that may be set, and by one that counts since the host's boot, where there is one."""
    uptime = time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else None
    return {"until": time.time(), "host": lease.HOST, "uptime": uptime}


def _since(before: dict) -> float:
    """Seconds since the moment of a record; on another host, or after a boot, as the clocks on the walls have it."""
    now = _moment()
    same = now["uptime"] is not None and before.get("host") == now["host"]
    return now["uptime"] - before["uptime"] if same else now["until"] - before["until"]


def _read(path: Path) -> dict | None:
    try:
        found = disk.read_json(path)
        return found if found and {"until", "seconds"} <= found.keys() else None
    except (ValueError, AttributeError):
        return None  # an account that is damaged begins anew
