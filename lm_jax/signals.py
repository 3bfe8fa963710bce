"""SIGTERM and SIGINT as a wish that a loop may look at: stop after the step at hand, the same on every process."""

import contextlib
import os
import signal
import threading

import jax
from jax.experimental import multihost_utils

from lm_jax.errors import Failure


class Stopped(Failure):
    """A signal came while nothing was changed that is not on the disk."""

    code = 75


@contextlib.contextmanager
def ending():
    """Whatever is done within, a SIGTERM or SIGINT ends it by `Stopped`, but where `caught` has a loop look at it.

    Of several processes JAX has SIGTERM from where they join, and only a loop that asks is told.
    """

    def stop(number, frame):
        raise Stopped("stopped by a signal; the same command goes on from what was saved")

    with _handling((signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else (), stop):
        yield


@contextlib.contextmanager
def caught():
    """A list that a SIGTERM or SIGINT makes non-empty; the second one kills.

    Of several processes each leaves SIGTERM to JAX, whose coordinator has all of them stop after the same step; SIGINT
    becomes a SIGTERM, and a second one kills.
    """
    seen, alone = [], jax.process_count() == 1
    ours = (signal.SIGTERM, signal.SIGINT) if alone else (signal.SIGINT,)

    def note(number, frame):
        seen.append(number)
        for s in ours:
            signal.signal(s, signal.SIG_DFL)
        if not alone:
            os.kill(os.getpid(), signal.SIGTERM)

    with _handling(ours, note):
        yield seen


def agreed(stop: list, step: int) -> bool:
    """Whether to stop after this step; all processes stop after the same one."""
    if jax.process_count() == 1:
        return bool(stop)
    return multihost_utils.reached_preemption_sync_point(step)


@contextlib.contextmanager
def _handling(signals, handler):
    """Signals go to a handler; not in another thread than the main one: whoever owns that owns the signals."""
    main = threading.current_thread() is threading.main_thread()
    before = {s: signal.signal(s, handler) for s in signals} if main else {}
    try:
        yield
    finally:
        for s, old in before.items():
            signal.signal(s, old)
