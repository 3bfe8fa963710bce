"""A forecast as tables for people."""

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from lm_jax.config import Config
from lm_jax.preflight import aot, hlo, search, traffic
from lm_jax.preflight.cures import cures
from lm_jax.preflight.forecast import Forecast, shares

GIB = 2**30
MOVED = {"gathered": ("all-gather",), "summed": ("all-reduce", "reduce-scatter"), "passed on": ("collective-permute",)}


def page(f: Forecast, word: aot.Compiled | None = None) -> Group:
    """Model, mesh, memory, time and cost, in 80 columns; where the compiler had a word, beside what was predicted."""
    fits = f.fits if word is None else not word.refusal
    said = [Text(remark) for remark in f.remarks] + [Text(verdict(f, word), style="bold green" if fits else "bold red")]
    return Group(_model(f), _memory(f), _time(f), *([_compiled(f, word)] if word and fits else []), *_cost(f), *said)


def found(best: list[Forecast], config: Config) -> Group:
    """The best of a search, and the flags of each."""
    table = _table("best that fit", "", "mesh", "remat", "micro", "GiB", "seconds", "MFU", "dollars", text=3)
    for i, f in enumerate(best, 1):
        table.add_row(str(i), shares(f.mesh), f.config.model.remat, str(f.config.train.microbatches),
                      _gib(f.bytes["total"]), _seconds(f.roofline.seconds), f"{f.mfu:.0%}", f"{f.dollars:,.0f}")
    lines = [Text(f"{i}  {search.flags(f, config) or '(the config as it is)'}") for i, f in enumerate(best, 1)]
    return Group(table, Text("\nflags", style="bold"), *lines)


def verdict(f: Forecast, word: aot.Compiled | None = None) -> str:
    """Whether it fits, which the compiler knows best, and if it does not, what to change, the cheapest first."""
    need, have = f.bytes["total"] if word is None else word.total, _gib(f.limit)
    if word and word.refusal:
        return f"the compiler refuses: {word.refusal}: {_cures(f)}"
    if word or f.fits:
        return f"fits{', says the compiler' if word else ''}: {_gib(need)} of {have} GiB a device"
    return f"does not fit: {_gib(need)} of {have} GiB a device: {_cures(f)}"


def _cures(f: Forecast) -> str:
    return " or ".join([*cures(f), "--search", "more chips"])


def _compiled(f: Forecast, word: aot.Compiled) -> Table:
    """The compiler's own peak of memory and collectives, beside what was predicted."""
    table = _table(f"compiled in {word.seconds:.0f} s", "", "compiler", "predicted", "")
    table.add_row("peak of memory, GiB", _gib(word.total), _gib(f.bytes["total"]), _off(f.bytes["total"], word.total))
    moved, predicted = hlo.totals(word.text), traffic.totals(traffic.step(f.config, f.mesh))
    for name, kinds in MOVED.items():
        there, here = (sum(sums.get(kind, 0) for kind in kinds) for sums in (moved, predicted))
        if there or here:
            table.add_row(f"{name}, GB a step", f"{there / 1e9:.2f}", f"{here / 1e9:.2f}", _off(here, there))
    return table


def _off(predicted: float, real: float) -> str:
    return f"{predicted / real - 1:+.1%}" if real else ""


def _model(f: Forecast) -> Table:
    n, topology = f.params, f.topology
    table = _table(f"{f.config.name} on {topology}", "", "", text=2)
    active = f", {_amount(n['active'])} active" if n["active"] != n["total"] else ""
    table.add_row("parameters", f"{_amount(n['total'])}, {_amount(n['non_embedding'])} without embeddings{active}")
    table.add_row("FLOPs", f"{f.flops_per_step / f.tokens_per_step:.3g} a token, {f.flops_per_step:.3g} a step")
    steps = f.config.train.steps
    table.add_row("tokens", f"{f.tokens_per_step:,} a step, {_amount(f.tokens_per_step * steps)} in {steps:,} steps")
    table.add_row("mesh", shares(f.mesh))
    for line in f.replicated:
        table.add_row("", Text(f"{line}: replicated", style="yellow"))
    table.add_row("remat", f"{f.config.model.remat}, microbatches {f.config.train.microbatches}")
    return table


def _memory(f: Forecast) -> Table:
    table = _table("memory of a device", "", "GiB", "")
    for part, size in f.bytes.items():
        if part != "total":
            table.add_row(part, _gib(size), _bar(size / f.limit))
    table.add_section()
    table.add_row("all", _gib(f.bytes["total"]), f"of {_gib(f.limit)}", style="bold")
    return table


def _time(f: Forecast) -> Table:
    r = f.roofline
    table = _table("a step", "", "seconds", "")
    names = {"compute": "compute", "memory": "memory (HBM)", "links": "links (ICI, NVLink)", "network": "network (DCN)"}
    for key, name in names.items():
        seconds = getattr(r, key)
        worst = "  slowest" if key == r.bound_by else ""
        table.add_row(name, _seconds(seconds), _bar(seconds / r.seconds) + worst)
    table.add_row("of it waited for", _seconds(r.waited), _bar(r.waited / r.seconds))
    table.add_section()
    table.add_row("all", _seconds(r.seconds), f"MFU {f.mfu:.1%}, {_amount(f.tokens_per_step / r.seconds)} tokens/s",
                  style="bold")
    return table


def _cost(f: Forecast):
    price = f.topology.device.dollars
    yield Text(f"\n{_hours(f.hours)}, {f.chip_hours:,.0f} chip-hours, ${f.dollars:,.0f} at ${price:.2f} a chip-hour",
               style="bold")
    yield Text("(steps alone: no compiling, evaluation, checkpoints or restarts)")


def say(group: Group, console: Console):
    console.print(group, highlight=False, soft_wrap=True)


def _table(title: str, *columns: str, text: int = 1) -> Table:
    """A table whose first `text` columns are words and whose others are numbers, but for a last one without a name."""
    table = Table(title=f"\n{title}", box=None, padding=(0, 2, 0, 0), title_justify="left", title_style="bold",
                  show_header=any(columns))
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i < text or not name else "right")
    return table


def _bar(share: float) -> str:
    return "█" * max(round(min(share, 1) * 24), int(share > 0.002))


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3f}" if seconds < 10 else f"{seconds:.1f}"


def _hours(hours: float) -> str:
    return f"{hours / 24:.1f} days" if hours > 48 else f"{hours:.1f} hours"


def _amount(n: float) -> str:
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= unit:
            return f"{n / unit:.2f}{name}"
    return f"{n:.0f}"
