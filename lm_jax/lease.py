"""Who trains in a folder, said in the folder itself: hosts that share a bucket do not know of each other's locks.

    <workdir>/lease     {"host", "name", "process", "beats"}, written anew every `BEAT` seconds

A lease that does not move for `STALE` seconds is of one who is dead; no clocks are compared, only what is seen. The
holder takes it away when it ends.
"""

import atexit
import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from lm_jax import disk
from lm_jax.errors import ConfigError

BEAT, STALE = 20.0, 120.0  # seconds; buckets that are mounted may show a file as it was a minute ago
BOOT = Path("/proc/sys/kernel/random/boot_id")
_held = set()  # the leases of this process
HOST = f"{socket.gethostname()} {BOOT.read_text().strip() if BOOT.exists() else ''}"


class Lease:
    """Held until `close` or the process's end. Who is `alone` has the folder's lock, so that no other of this host has;
    `lost` is called, with why, where the folder was taken over: it ends the process."""

    def __init__(self, folder: Path, *, alone: bool, lost: Callable[[str], None]):
        """Take it; waits until it is known whether one who seems to have it lives: ConfigError if so."""
        self.path, self._beats, self._over = folder / "lease", 0, threading.Event()
        self._alone, self._lost = alone, lost
        while not self._create():
            self._outlive()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()
        _held.add(self)
        atexit.register(let_go)

    def close(self):
        """Let go of the folder."""
        _held.discard(self)
        self._over.set()
        self._thread.join()
        if self._seen() == self._text():
            self.path.unlink(missing_ok=True)

    def _create(self) -> bool:
        """Make the lease, if there is none, whole from its first moment where the disk can link files."""
        made = self.path.with_name(f".lease-{secrets.token_hex(8)}")
        try:
            made.write_text(self._text())
            try:
                os.link(made, self.path)
            except FileExistsError:
                return made.stat().st_nlink == 2  # NFS may ask twice, and then meets its own link
            except OSError:
                return self._write_if_none()
        finally:
            made.unlink(missing_ok=True)
        return True

    def _write_if_none(self) -> bool:
        try:
            with open(self.path, "x") as file:
                file.write(self._text())
        except FileExistsError:
            return False
        return True

    def _outlive(self):
        """Return when whoever left the lease is dead, and it is out of the way."""
        first, patience = self._seen(), STALE
        if self._alone and _read(first).get("host") == HOST:
            patience = 0  # its process is gone
        else:
            print(f"{self.path.parent} was in use by {_holder(first)}: watching for {STALE:.0f} s whether it still is",
                  flush=True)
        end = time.monotonic() + patience
        while time.monotonic() < end and (now := self._seen()) is not None:
            if _read(now) and now != first:
                raise ConfigError(f"{self.path.parent} is in use by {_holder(now)}: wait until it ends, or pass "
                                  "another --workdir")
            time.sleep(BEAT / 20)
        aside = self.path.with_name(f"lease-{os.getpid()}")  # of two who see it dead, one is the first to rename it
        with contextlib.suppress(FileNotFoundError):
            self.path.rename(aside).unlink()

    def _renew(self):
        while not self._over.wait(BEAT):
            with contextlib.suppress(OSError):  # a disk that is full or away now may be well at the next beat
                self._beat()

    def _beat(self):
        if (seen := self._seen()) not in (None, self._text()):
            _held.discard(self)
            try:
                self._lost(f"{self.path.parent} was taken over by {_holder(seen)} while this process was not heard of: "
                           "it ends, and leaves the folder as it is")
            finally:  # also where nobody reads that
                os._exit(ConfigError.code)
        before = self._beats
        try:
            self._beats += 1
            disk.replace(self.path, [self._text()])
        except OSError:
            self._beats = before  # what stands there is still the last one
            raise

    def _text(self) -> str:
        return json.dumps({"host": HOST, "name": socket.gethostname(), "process": os.getpid(), "beats": self._beats})

    def _seen(self) -> str | None:
        try:
            return self.path.read_text()
        except FileNotFoundError:
            return None


def let_go():
    """Let go of all folders: also for a process that ends without its main thread."""
    for lease in list(_held):
        lease.close()


def _read(text: str | None) -> dict:
    try:
        return json.loads(text or "{}")
    except ValueError:  # half-written
        return {}


def _holder(text: str | None) -> str:
    return "process {process} on {name}".format(**({"process": "?", "name": "another host"} | _read(text)))
