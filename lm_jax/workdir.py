"""A run's folder: claimed by one trainer at a time, bound to one config, and written so that a kill harms no record.

    <workdir>/config.json manifest.json metrics.jsonl checkpoints/ plots/ summary.json lock lease mark
"""

import contextlib
import errno
import fcntl
import json
import math
import os
import socket
import time
from pathlib import Path

from lm_jax import disk, peers
from lm_jax.config import difference
from lm_jax.errors import REFUSED, ConfigError
from lm_jax.lease import Lease

# Keys that may change while a run goes on: where and how it computes and what it records, not what it learns.
FREE = ("name:", "mesh.", "data.root:", "model.remat:", "model.attention:", "train.microbatches:", "train.log_every:",
        "train.eval_every:", "train.eval_rows:", "train.checkpoint_every:", "train.keep:", "train.loggers:",
        "train.profile:", "train.watchdog:", "train.deterministic:", "train.rollbacks:", "train.compare_every:")
LOCKLESS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)  # of flock: as Lustre may be mounted
SEEN = 10  # seconds in which a file that one host writes in a shared folder is seen by the others


class Workdir:
    """The folder of one run. Of several processes all but the first pass `writes=False`, and only read in it."""

    def __init__(self, path, *, writes: bool = True):
        self.path = Path(path).absolute()
        self.writes = writes
        self._lock = self._lease = None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def open(self, config: dict, mark: str = ""):
        """Claim the folder for a run of `config` (nested, JSON-able) until `close` or the process's end.

        Raises ConfigError where another trainer holds the folder, where it belongs to another config, or where no
        folder can be. A run that ended before its first step leaves the folder to any config.
        The processes of one run pass the same `mark`, the one that writes first: the others look for it in the folder.
        """
        if not self.writes:
            return self._find(mark)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._claim()
        except OSError as e:
            if e.errno not in (*REFUSED, errno.ENOENT, errno.ENAMETOOLONG):
                raise
            raise ConfigError(f"--workdir={self.path} cannot be used: {e}. Pass a folder that takes files") from e
        if mark:
            disk.replace(self.path / "mark", [mark])
        recorded = self.read_json("config.json")
        if recorded is None or not self._begun():
            self.write_json("config.json", config)
            return
        lines = difference(recorded, json.loads(json.dumps(config)))
        if changed := bound(lines):
            self.close()
            raise ConfigError(f"{self.path} belongs to a run with another config: pass another --workdir, or the "
                              "config that it was started with\n  " + "\n  ".join(changed))
        if lines:
            self.write_json("config.json", config)
            print("goes on with other settings:\n  " + "\n  ".join(lines))

    def close(self):
        """Let go of the folder."""
        if self._lock:
            self._lease.close()
            self._lock.close()
            self._lock = self._lease = None

    def write_json(self, name: str, value):
        """Write a record whole or not at all; numbers that JSON lacks become null."""
        if self.writes:
            self.path.mkdir(parents=True, exist_ok=True)
            disk.replace(self.path / name, [json.dumps(plain(value), indent=2), "\n"])

    def read_json(self, name: str):
        """A record, or None where there is none; ConfigError where it is damaged."""
        try:
            return disk.read_json(self.path / name)
        except ValueError as e:
            raise ConfigError(f"{self.path / name} is no JSON ({e}): mend or remove it, or pass another "
                              "--workdir") from e

    def keep_metrics(self, step: int, *, evaluated: int | None = None) -> tuple[int, float]:
        """Make metrics.jsonl end where a run resumes: rows beyond `step`, and a row cut off by a kill, go; how many,
        and the seconds of their steps.

        Evaluations, which are rows with a tag, go beyond `evaluated` if it is given.
        """
        ends = {False: step, True: step if evaluated is None else evaluated}
        if not self.writes or not self.metrics.exists():
            return 0, 0.0
        gone = []

        def kept():
            for line, at, tagged in _rows(self.metrics):
                if at <= ends[tagged]:
                    yield line
                else:
                    gone.append(0.0 if at == math.inf else json.loads(line).get("seconds", 0.0))

        disk.replace(self.metrics, kept())
        return len(gone), sum(gone)

    def take_metrics(self, start, step: int, *, evaluated: int):
        """Begin metrics.jsonl with rows of the run in folder `start`: up to `step`, evaluations up to `evaluated`."""
        ends = {False: step, True: evaluated}
        if self.writes and (theirs := Path(start) / "metrics.jsonl").exists():
            disk.replace(self.metrics, (line for line, at, tagged in _rows(theirs) if at <= ends[tagged]))

    def _begun(self) -> bool:
        """Whether there is anything that another config would spoil."""
        return self.metrics.exists() and self.metrics.stat().st_size > 0 or any(self.checkpoints.glob("*"))

    def _find(self, mark: str):
        """Raise ConfigError unless this is the folder that the run's first process has marked."""
        file, end = self.path / "mark", time.monotonic() + SEEN
        while mark and not (file.exists() and file.read_text() == mark):
            if time.monotonic() > end:
                raise ConfigError(f"--workdir={self.path} must be a folder that all processes share: what process 0 "
                                  "writes does not appear in it: pass one on a disk that all of them see")
            time.sleep(0.1)

    def _claim(self):
        """Take the lock, which the system frees when its holder dies, however it dies, and the lease, which other
        hosts see, and which is all there is where the disk knows no locks."""
        lock, alone = open(self.path / "lock", "a+"), True
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = " ".join(lock.read().split()) or "another process"
            lock.close()
            raise ConfigError(f"{self.path} is in use by {holder}: wait until it ends, or pass another "
                              "--workdir") from None
        except OSError as e:
            if e.errno not in LOCKLESS:
                raise
            alone = False
            print(f"{self.path} is on a disk without locks ({e.strerror}): its lease alone keeps other trainers out",
                  flush=True)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        try:
            self._lease = Lease(self.path, alone=alone, lost=_lost)
        except BaseException:
            lock.close()
            raise
        self._lock = lock


def bound(lines: list[str], *more: str) -> list[str]:
    """Of the differences of two configs those that make another run: in keys that are not FREE, and not `more`."""
    return [line for line in lines if not line.startswith((*FREE, *more))]


def plain(value):
    """`value` with arrays of one number as numbers, and NaN and infinity, which JSON lacks, as None."""
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lost(why: str):
    """End all processes of the run, whose folder is another's now."""
    with contextlib.suppress(RuntimeError):
        peers.tell(ConfigError.code, why)
    peers.depart(ConfigError.code, why)


def _rows(path: Path):
    """Lines of a metrics.jsonl, the step of each and whether it is an evaluation's; infinity for what is no whole row.
    """
    with open(path, errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
                yield line, row["step"] if line.endswith("\n") else math.inf, "tag" in row
            except (ValueError, KeyError, TypeError):
                yield line, math.inf, False
