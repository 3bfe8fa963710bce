"""How a run ends before its time: by SIGTERM or SIGINT to any of its processes, or because one of them fails.

Where nothing would be lost a signal ends the run at once, on all processes, whatever they do. In a loop that changes a
state, all stop at the same point of it: each counts the points where it asks, the counts are compared when a signal
comes, and the first point that nobody has passed is taken. The main thread may be deep in a compilation or wait for a
device, so a thread of its own hears signals and news, and ends the process if the main thread does not.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback

import jax

from lm_jax import peers
from lm_jax.errors import Stopped, stacks, told

GRACE = 5.0  # seconds in which the main thread may come out of what it does
OWN = 1.5  # seconds for a reason of its own, before it ends for that of another process
TWICE = 1.0  # seconds in which a signal that comes again is the same: `timeout` sends it to a process, then its group
LOOK = 0.2  # seconds between looks at where the others are
SIGNALS = (signal.SIGTERM, signal.SIGINT)
STOPPED = "stopped by {}; the same command goes on from what was saved".format
_present = None  # what `ending` is in force: signals are the process's, and so is this


@contextlib.contextmanager
def ending():
    """Whatever is done within, SIGTERM or SIGINT ends it by `Stopped`, but in a `caught` loop.

    A second one, more than `TWICE` later, kills. Of several processes all end, with the code of the one that a signal
    came to or that failed.
    """
    global _present
    if _present or threading.current_thread() is not threading.main_thread():
        yield  # whoever owns the main thread owns the signals
        return
    _present = _Ending()
    try:
        with _present.listening():
            yield
    except BaseException as e:
        if peers.count() == 1 or isinstance(e, SystemExit):
            raise
        _failed(e)
    finally:
        _present = None


@contextlib.contextmanager
def caught():
    """A loop in which `agreed` says when to stop; what it has changed is saved before the end of this.

    Until it has first been asked there is nothing to save, and a signal ends it by `Stopped`.
    """
    with ending():
        if _present:
            _present.inside = True
        try:
            yield
        finally:
            if _present:
                _present.leave_loop()
        if _present:
            _present.stop_if_due()


def agreed() -> bool:
    """Whether to stop now, at the same call on every process; to be asked by all alike. False outside of a loop."""
    return bool(_present) and _present.inside and _present.ask()


class Halt(Exception):
    """Raised within a loop by what takes long, where all have `agreed` to stop: it is to be done again."""


def check():
    """Raise `Halt` where all have agreed to stop."""
    if agreed():
        raise Halt


class _Ending:
    """Where this process is, from where on it is to stop, and who hears."""

    def __init__(self):
        self.position = (0, 0)  # loops that are over, and how often the present one has asked
        self.inside = False
        self.point = None  # the position from which on to stop
        self.why = ""
        self.honoured = False  # a loop has been told
        self.over = threading.Event()
        self._settled = threading.Condition()  # its lock is re-entrant, as handlers of signals need it
        self._deciding = False
        self._raised = False
        self._pokes = 0  # signals of this to the main thread
        self._main = threading.main_thread().ident

    @contextlib.contextmanager
    def listening(self):
        """Have signals and news heard."""
        ear, mouth = socket.socketpair()
        mouth.setblocking(False)
        before = {s: signal.signal(s, self._handle) for s in SIGNALS}
        wakeup = signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
        threads = [threading.Thread(target=self._hear, args=(ear,), name="signals", daemon=True)]
        if peers.count() > 1:
            threads.append(threading.Thread(target=self._read_news, name="news", daemon=True))
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self.over.set()
            signal.set_wakeup_fd(wakeup)
            mouth.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join(GRACE)
            mouth.close()
            ear.close()
            for s, old in before.items():
                signal.signal(s, old)

    def ask(self) -> bool:
        with self._settled:
            while self._deciding:
                self._settled.wait(1.0)
            if not self.honoured:
                self.position = (self.position[0], self.position[1] + 1)
                self.honoured = self._due()
            return self.honoured

    def leave_loop(self):
        with self._settled:
            while self._deciding:
                self._settled.wait(1.0)
            self.position, self.inside = (self.position[0] + 1, 0), False

    def stop_if_due(self):
        """Raise Stopped if the run is to stop, and no loop has been told."""
        if self._due() and not (self.honoured or self._raised or self.over.is_set()):
            self._raised = True
            raise Stopped(STOPPED(self.why))

    def _due(self) -> bool:
        return self.point is not None and self.position >= self.point

    def _handle(self, signum, frame):
        """In the main thread, as soon as it is in Python."""
        if peers.count() == 1:
            self._decide([self.position], signal.Signals(signum).name)
        self.stop_if_due()

    def _hear(self, ear):
        """In a thread, which hears a signal whatever the main thread does."""
        first = None
        while byte := ear.recv(1):
            if byte[0] not in SIGNALS:
                continue
            if self._pokes:
                self._pokes -= 1
                continue
            now, name = time.monotonic(), signal.Signals(byte[0]).name
            if first is not None and now < first + TWICE:
                continue
            if first is not None:
                print(f"error: a second signal, {name}: it ends at once", file=sys.stderr, flush=True)
                os._exit(128 + byte[0])
            first = now
            if peers.count() > 1:
                peers.tell(Stopped.code, f"{name} to process {peers.number()}")
            else:
                with self._settled:  # the main thread may be long in doing so itself
                    self._decide([self.position], name)
                self._end_in_time()

    def _read_news(self):
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # without process 0 JAX ends this one
            for news in peers.news(self.over):
                if news["code"] != Stopped.code:
                    self._end_with(news)
                elif self.point is None:
                    self._agree(news["why"])

    def _agree(self, why: str):
        """Compare positions with all processes, none of which asks meanwhile."""
        with self._settled:
            self._deciding = True
            mine = self.position
        peers.put(f"position/{peers.number()}", json.dumps(mine))
        while len(found := peers.found("position")) < peers.count():
            if self.over.wait(LOOK) or any(json.loads(news)["code"] != Stopped.code
                                           for news in peers.found("news").values()):
                return  # it ends otherwise
        positions = [tuple(json.loads(text)) for text in found.values()]
        with self._settled:
            self._deciding = False
            self._decide(positions, why)
            self._settled.notify_all()
        if self._due() and not self.honoured:
            self._pokes += 1
            signal.pthread_kill(self._main, signal.SIGTERM)
            self._end_in_time()

    def _decide(self, positions: list[tuple[int, int]], why: str):
        """The point to stop at: at once where nobody can have finished a step of a loop, or all are out of it."""
        if self.point is None:
            least, most = min(positions), max(positions)
            ahead = most if most[1] == 0 else (most[0], most[1] + 1)
            self.why, self.point = why, least if least[1] == 0 else ahead

    def _end_in_time(self):
        """End the process in a while, unless the main thread does or a loop is to be waited for."""

        def end():
            if not self.over.wait(GRACE) and self._due() and not self.honoured:
                peers.depart(Stopped.code, STOPPED(self.why), limit=peers.LONG)

        threading.Thread(target=end, name="grace", daemon=True).start()

    def _end_with(self, news: dict):
        """End as another process does, unless this one has a reason of its own, which it tells."""
        if news["process"] == peers.number() or self.over.wait(OWN):
            return
        said = f"process {news['process']} ends with code {news['code']}: {news['why']}"
        if news["code"] == peers.LostError.code:
            print(f"{said}. Stacks of this one's threads:\n{stacks()}", file=sys.stderr, flush=True)
        peers.depart(news["code"], said)


def _failed(error: BaseException):
    """End one of several processes, and tell the others."""
    message, code = told(error) or (f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]}", 1)
    if code == 1:
        traceback.print_exception(error)
    if isinstance(error, Stopped):
        peers.depart(code, message, limit=peers.LONG)
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        peers.tell(code, message)
    peers.depart(code, message)
