"""Times that can be compared: everything warm, one after another in turns, so that a busy moment meets all alike."""

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence

from lm_jax.measure.figures import Figure, median

TURNS = 7  # of each side
WARM = 2  # calls before
REST = 0.25  # seconds between sides: OpenMP's threads, which PyTorch has, go on spinning for 0.2 s after their work
BURST = 1.0  # seconds that a burst of short calls takes at least
MOST = 64  # calls of a burst


def quiet(line: str):
    """Say nothing."""


def interleaved(sides: dict[str, Callable[[], object]], *, turns: int = TURNS, warm: int = WARM, rest: float = REST,
                say: Callable[[str], None] = quiet) -> dict[str, list["Spent"]]:
    """Seconds of each call of each side, which returns when its work is done; every other turn in reverse order. `say`
    is told what each turn took: of long ones that much is known when the rest is interrupted."""
    for _ in range(warm):
        for run in sides.values():
            run()
    seconds = {name: [] for name in sides}
    gc.collect()
    for turn in range(turns):
        for name in sorted(sides, key=list(sides).index, reverse=turn % 2 == 1):
            time.sleep(rest if len(sides) > 1 else 0)
            seconds[name].append(once(sides[name]))
        say(f"turn {turn + 1} of {turns}: " + ", ".join(f"{name} {took[-1]:.3g} s" for name, took in seconds.items()))
    return seconds


def alone(run: Callable[[], object], *, turns: int = TURNS, warm: int = WARM) -> list["Spent"]:
    """Seconds of each call."""
    return interleaved({"": run}, turns=turns, warm=warm)[""]


def once(run: Callable[[], object]) -> "Spent":
    """Of one call, or what it says itself that it took."""
    begun, busy = time.perf_counter(), time.process_time()
    if isinstance(spent := run(), Spent):
        return spent
    return Spent(time.perf_counter() - begun, time.process_time() - busy)


class Spent(float):
    """Seconds by the clock; `cpu` are those of all this process's threads, which say more where others take cores
    away, and nothing of an accelerator."""

    def __new__(cls, seconds: float, cpu: float = math.nan):
        made = super().__new__(cls, seconds)
        made.cpu = cpu
        return made


def calls(seconds: float) -> int:
    """How many calls of so many seconds are a burst."""
    return max(2, min(MOST, math.ceil(BURST / max(seconds, 1e-9))))


def times_as_fast(name: str, ours: Sequence["Spent"], theirs: Sequence["Spent"]) -> Figure:
    """How many times as fast as theirs ours is: of each turn's pair, whose middle and spread are the figure's."""
    cpu = statistics.median(b.cpu / a.cpu if a.cpu else math.nan for a, b in zip(ours, theirs, strict=True))
    how = f"of each turn's pair; {cpu:.2f} by CPU time of all threads"
    return median(name, [b / a for a, b in zip(ours, theirs)], "x", how)


def faster(sides: dict[str, Sequence[float]]) -> str:
    """The side with the least median."""
    return min(sides, key=lambda name: statistics.median(sides[name]))
