"""The clock of a run: times its steps, reads their numbers one step late, and traces a few of them on demand."""

import time
from dataclasses import dataclass, field
from typing import Callable

import jax
import numpy as np

from lm_jax.clock import Clock
from lm_jax.devices import peak_flops
from lm_jax.log import Log, peak_memory

PROFILED = 5  # steps in a profile


@dataclass
class Meter:
    """Times steps and writes their rows, one step late, so that the device always has the next one waiting."""

    log: Log
    tokens: int  # of one step over all devices
    flops: float
    derived: Callable[[dict], dict]  # what else a row says, from its numbers
    every: int  # steps a row
    clock: Clock
    seconds: float = 0.0  # spent in steps, those before a restart included
    compile_seconds: float = 0.0  # until the first step was on its way
    burst: tuple[int, int] | None = None  # first and last update of a burst of refused ones, once one was read
    _wait: float = 0.0
    _pending: tuple | None = None
    _last: float = field(default_factory=time.perf_counter)

    def waited(self, batches):
        """The next batch; the time it took is data wait."""
        begun = time.perf_counter()
        with self.clock.phase("wait"):
            batch = next(batches)
        self._wait += time.perf_counter() - begun
        return batch

    def sent(self, step: int, metrics):
        """A step has been sent to the device: read the one before."""
        if not self.compile_seconds:
            self.compile_seconds = time.perf_counter() - self._last - self._wait
            self.restart()
        previous, self._pending = self._pending, (step, metrics, self._wait)
        self._wait = 0.0
        self._read(previous)

    def flush(self):
        """Read the last step sent."""
        self._read(self._pending)
        self._pending = None

    def back(self, log: Log, seconds: float):
        """The run goes on from an earlier step, before which it took so many seconds: what was sent is not read."""
        self.log, self.seconds, self.burst, self._pending = log, seconds, None, None
        self.restart()

    def restart(self):
        """Do not count what a hook took as time of a step."""
        self._last = time.perf_counter()

    def _read(self, pending):
        if pending is None:
            return
        step, metrics, wait = pending
        metrics = jax.device_get(metrics)
        self.clock.step()
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self.record(step, _numbers(metrics), seconds, wait)

    def record(self, step: int, numbers: dict, seconds: float, wait: float):
        """Write a step's row."""
        self.seconds += seconds
        burst = int(numbers.pop("burst_first")), int(numbers.pop("burst_last"))
        self.burst = self.burst or (burst if burst[0] >= 0 else None)  # the first one seen: a restart sees the same
        if step % self.every == 0 or step == 1:
            row = (numbers | {"tokens": step * self.tokens} | self.derived(numbers)
                   | self._rates(seconds, wait))
            with self.clock.phase("record"):
                self.log.row(step, row)

    def _rates(self, seconds, wait):
        """What a step's time says; MFU only on a device whose peak is known."""
        flops = self.flops / seconds
        peak = peak_flops(jax.devices()[0].device_kind)
        mfu = {"mfu": flops / (peak * jax.device_count())} if peak else {}
        return {"seconds": seconds, "goodput": self.clock.account()["goodput"],
                "tokens_per_second": self.tokens / seconds, "flops_per_second": flops, **mfu,
                "data_wait": wait, "data_wait_fraction": min(wait / seconds, 1.0), **peak_memory()}


class Profile:
    """A trace of `PROFILED` steps from step `first` on, in <workdir>/profile, for TensorBoard or Perfetto; 0: none."""

    def __init__(self, first: int, workdir):
        self.first, self.folder, self.running = first, str(workdir.path / "profile"), False

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.running:
            jax.profiler.stop_trace()

    def before(self, step: int):
        if step == self.first and not self.running:
            jax.profiler.start_trace(self.folder)
            self.running = True

    def after(self, step: int, state):
        if self.running and step == self.first + PROFILED - 1:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self.running = False


def _numbers(metrics) -> dict:
    return {name: np.asarray(value).item() for name, value in metrics.items() if name != "objective"}
