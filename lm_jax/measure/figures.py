"""Measured numbers: each with its unit and its spread, as a table for people and as JSON for programs."""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rich.box import SIMPLE
from rich.table import Table

PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
PLAIN = ("", "ms", "s", "x", "%", "MiB", "GiB")  # units that take no prefix


@dataclass(frozen=True)
class Figure:
    """One number. `low` and `high` are the quartiles of what was measured so many times; `how` says what stands behind
    it. `nominal` is a number that somebody else wrote down: no other is shown that was not measured or counted here."""

    name: str
    value: float
    unit: str
    how: str = ""
    low: float | None = None
    high: float | None = None
    times: int = 1
    nominal: bool = False

    def record(self) -> dict:
        """For programs: what JSON cannot say is null."""
        clean = lambda x: None if isinstance(x, float) and not math.isfinite(x) else x
        return {key: clean(value) for key, value in dataclasses.asdict(self).items()}


def median(name: str, samples: Sequence[float], unit: str, how: str = "") -> Figure:
    """The median of samples, between its quartiles."""
    samples = [float(one) for one in samples]
    low, high = quartiles(samples)
    return Figure(name, statistics.median(samples), unit, how, low, high, len(samples))


def rate(name: str, work: float, seconds: Sequence[float], unit: str, how: str = "") -> Figure:
    """So much work in each of these times."""
    return median(name, [work / each for each in seconds], unit, how)


def duration(name: str, seconds: Sequence[float], how: str = "") -> Figure:
    """A time, in the unit that reads best."""
    return median(name, [1e3 * each for each in seconds], "ms", how) if statistics.median(seconds) < 10 else median(
        name, seconds, "s", how)


def quartiles(samples: Sequence[float]) -> tuple[float, float]:
    """The first and the third; of a single sample itself."""
    if len(samples) == 1:
        return samples[0], samples[0]
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, high


def table(title: str, figures: Sequence[Figure]) -> Table:
    """One part of a benchmark, for people."""
    shown = Table(title=title, box=SIMPLE, padding=(0, 1, 0, 0), title_justify="left", title_style="bold")
    shown.add_column("")
    for column in ("median", "quartiles"):
        shown.add_column(column, justify="right", no_wrap=True)
    shown.add_column("")
    for figure in figures:
        shown.add_row(figure.name, told(figure), _spread(figure), _how(figure))
    return shown


def markdown(title: str, figures: Sequence[Figure]) -> str:
    """One part as a table in Markdown."""
    lines = [f"### {title}", "", "| | median | quartiles | |", "| --- | ---: | ---: | --- |"]
    lines += [f"| {f.name.strip()} | {told(f)} | {_spread(f)} | {_how(f)} |" for f in figures]
    return "\n".join(lines) + "\n"


def told(figure: Figure) -> str:
    """Value and unit: `1.23 TFLOP/s`."""
    scale, prefix = _scale(figure)
    return f"{_digits(figure.value / scale)} {prefix}{figure.unit}".strip()


def _spread(figure: Figure) -> str:
    """The quartiles, in the unit of the value."""
    scale, _ = _scale(figure)
    return f"{_digits(figure.low / scale)} to {_digits(figure.high / scale)}" if figure.times > 1 else ""


def _how(figure: Figure) -> str:
    return "; ".join(filter(None, ("nominal" * figure.nominal, figure.how)))


def _scale(figure: Figure) -> tuple[float, str]:
    """A figure's thousands, and the prefix that stands for them."""
    fits = ((scale, prefix) for scale, prefix in PREFIXES if abs(figure.value) >= scale)
    return (1.0, "") if figure.unit in PLAIN else next(fits, (1.0, ""))


def _digits(value: float) -> str:
    """Three digits of a number."""
    if not math.isfinite(value) or 0 < abs(value) < 0.01:
        return f"{value:.1e}"
    return f"{value:,.{0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2}f}"
