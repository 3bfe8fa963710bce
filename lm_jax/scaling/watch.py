"""A sweep as it is seen: its plan as a table, and a live table with a bar, or lines where no terminal is."""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from lm_jax.launchers.local import Pool
from lm_jax.scaling import ladder
from lm_jax.scaling.sweep import Point, Prices

STYLES = {"ok": "green", "running": "bold", "diverged": "yellow", "failed": "bold red"}
OVER = ("ok", "diverged", "failed")
ROWS = 16  # of the live table: what runs, then what ended last
SHOWN = {"model.depth", "model.width", "model.heads", "model.head_size", "model.hidden", "train.steps", "train.batch",
         "optim.lr", "optim.weight_decay", "optim.warmup"}  # by columns of their own, or following from them


def plan(points: Sequence[Point], states: dict[str, str], prices: Prices | None) -> Table:
    """Every point with its counts, and with prices its time and cost."""
    table = Table(box=SIMPLE, padding=0, show_footer=True)
    table.add_column("point", no_wrap=True)
    table.add_column("LxD", no_wrap=True)
    columns = {"params": "", "tokens": _amount(sum(point.tokens for point in points)), "batch": "", "lr": "",
               "FLOPs": f"{spent(points):.2g}"}
    if prices:
        columns |= {"hours": f"{sum(map(prices.hours, points)):,.2g}",
                    "$": f"{sum(map(prices.dollars, points)):,.2f}"}
    for name, footer in columns.items():
        table.add_column(name, justify="right", footer=footer, no_wrap=True)
    table.add_column("state", no_wrap=True, min_width=8)
    others = any(map(varies, points))
    if others:
        table.add_column("varies", overflow="fold")
    for point in points:
        c = point.planned
        cells = [_amount(ladder.counts(c)["total"]), _amount(point.tokens), f"{c.train.batch}", f"{c.optim.lr:.2g}",
                 f"{point.flops:.2g}"]
        if prices:
            cells += [f"{prices.hours(point):,.2g}", f"{prices.dollars(point):,.2f}"]
        state = states[point.id]
        table.add_row(point.id, shape(point), *cells, Text(state, STYLES.get(state, "")),
                      *([varies(point)] if others else []))
    return table


def spent(points: Sequence[Point]) -> float:
    """FLOPs of a sweep, where a trunk that several points share is made once."""
    return sum(point.flops * point.own for point in points)


def _amount(n: float) -> str:
    """Three digits, as in 109M and 1.25G."""
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= 0.9995 * unit:
            return f"{n / unit:.3g}{name}"
    return f"{n:.0f}"


def shape(point: Point) -> str:
    return f"{point.config.model.depth}x{point.config.model.width}"


def varies(point: Point) -> str:
    """What a point overrides beside its size, length and rate, in short."""
    return " ".join(f"{key.split('.')[-1]}={value}" for key, value in point.overrides.items() if key not in SHOWN)


def duration(seconds: float) -> str:
    minutes = int(seconds / 60 + 0.5)
    return f"{minutes // 60} h {minutes % 60:02d}" if minutes >= 60 else f"{minutes} min" if minutes else "under 1 min"


class Watch:
    """Shows a pool at work: called with it a few times a second."""

    def __init__(self, points: Sequence[Point], out: Path, console: Console, *, ended):
        self.points = {point.id: point for point in points}
        self.out, self.console, self.ended = out, console, ended
        self.flops = {point.id: point.flops * point.own for point in points}
        self.states: dict[str, str] = {}
        self.last: list[str] = []  # points that ended, the latest first
        self.begun, self.shown = time.monotonic(), 0.0
        self.before = None  # share of the FLOPs that was done before this began
        self.bar = Progress(TextColumn("{task.fields[counts]}"), BarColumn(bar_width=24),
                            TextColumn("{task.percentage:.0f}% of {task.fields[flops]} FLOPs{task.fields[left]}"))
        self.task = self.bar.add_task("", total=1.0, counts="", flops=f"{sum(self.flops.values()):.3g}", left="")
        self.live = Live(console=console, refresh_per_second=2) if console.is_terminal else None

    def __enter__(self):
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *error):
        if self.live:
            self.live.stop()

    def __call__(self, pool: Pool):
        states = pool.states  # which reads the disk
        changed = [name for name, state in states.items() if self.states.get(name) != state]
        over = [name for name in changed if states[name] in OVER and self.before is not None]
        self.states = states
        if over:
            self.last = over + self.last
            self.ended()
        if self.before is None:
            self.before = self._done()
        if self.live and (changed or time.monotonic() > self.shown + 1):
            self.shown = time.monotonic()
            self.live.update(self._page())
        for name in over if not self.live else ():
            self.console.print(f"{name} {self.states[name]}{self._result(name)} · {self._counts()}", highlight=False)

    def _page(self) -> Group:
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        running = [name for name, state in self.states.items() if state in ("running", "elsewhere")]
        at = {name: place for name in running if (place := self._place(name))}
        begun, others = list(at), [name for name in running if name not in at]
        for name in (begun + self.last + others)[:ROWS]:
            state, point = self.states[name], self.points[name]
            said = self._result(name) if state in OVER else "starts" if name not in at else \
                f"step {at[name][0]:,} of {point.config.train.steps:,} · loss {at[name][1]:.3f}"
            table.add_row(name, shape(point), f"{_amount(point.tokens)} tokens", f"lr {point.config.optim.lr:.3g}",
                          varies(point), Text(state, STYLES.get(state, "")), said)
        done = self._done() + sum(self.flops[name] * self._share(self.points[name], step)
                                  for name, (step, _) in at.items()) / sum(self.flops.values())
        here = time.monotonic() - self.begun
        gone = done - self.before
        left = f", {duration(here / gone * (1 - done))} left" if gone > 0.01 else ""
        self.bar.update(self.task, completed=done, counts=self._counts(), left=left)
        return Group(table, self.bar)

    def _counts(self) -> str:
        over = [state for state in self.states.values() if state in OVER]
        bad = [f"{over.count(state)} {state}" for state in ("diverged", "failed") if state in over]
        return ", ".join([f"{len(over)} of {len(self.states)} points", *bad])

    def _done(self) -> float:
        """Share of the sweep's FLOPs that points at their end stand for."""
        return sum(self.flops[name] for name, state in self.states.items() if state in OVER
                   ) / sum(self.flops.values())

    def _share(self, point: Point, step: int) -> float:
        """Of its own steps, how many are done."""
        return max(0, step - point.begins) / (point.config.train.steps - point.begins)

    def _place(self, name: str) -> tuple[int, float] | None:
        """Step and loss of a running point, from the end of its metrics."""
        path = self.out / "points" / name / "metrics.jsonl"
        try:
            with open(path, "rb") as file:
                file.seek(max(0, os.path.getsize(path) - 4096))
                rows = [json.loads(line) for line in file.read().split(b"\n")[:-1] if line.startswith(b"{")]
            return next((row["step"], row["loss"] or float("nan")) for row in reversed(rows) if "loss" in row)
        except (OSError, ValueError, StopIteration):
            return None

    def _result(self, name: str) -> str:
        try:
            summary = json.loads((self.out / "points" / name / "summary.json").read_bytes())
            return f" loss {summary['val_loss']:.4f} ± {summary['val_loss_stderr']:.4f}"
        except (OSError, ValueError, KeyError, TypeError):
            return ""
