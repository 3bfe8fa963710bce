"""SIGTERM and SIGINT as a wish that a loop may look at: stop after the step at hand, the same on every process."""

import contextlib
import os
import signal

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def caught():
    """A list that a SIGTERM or SIGINT makes non-empty; the second one acts as it would without us.

    Of several processes each leaves SIGTERM to JAX, whose coordinator has all of them stop after the same step; SIGINT
    becomes a SIGTERM, and a second one kills.
    """
    seen, alone = [], jax.process_count() == 1
    ours = (signal.SIGTERM, signal.SIGINT) if alone else (signal.SIGINT,)

    def note(number, frame):
        seen.append(number)
        for s, handler in before.items():
            signal.signal(s, handler if alone else signal.SIG_DFL)
        if not alone:
            os.kill(os.getpid(), signal.SIGTERM)

    before = {s: signal.getsignal(s) for s in ours}
    try:
        for s in before:
            signal.signal(s, note)
    except ValueError:  # not the main thread: whoever owns it owns the signals
        before = {}
    try:
        yield seen
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def agreed(stop: list, step: int) -> bool:
    """Whether to stop after this step; all processes stop after the same one."""
    if jax.process_count() == 1:
        return bool(stop)
    return multihost_utils.reached_preemption_sync_point(step)
