"""What data cannot carry: refusals before a fit is made, and warnings after one."""

import math

import numpy as np

from lm_jax.errors import ConfigError
from lm_jax.scaling import intervals
from lm_jax.scaling.fitting import Fit
from lm_jax.scaling.laws import Law
from lm_jax.scaling.table import Table

NEAR = 0.05  # E this close to nothing, or to the smallest loss, in units of the smallest loss, is at its edge


class Refused(ConfigError):
    """The data cannot carry what was asked of them; the message says why, and what would."""


def comparable(table: Table):
    """Refuse rows that do not measure the same thing."""
    bad = ~(np.isfinite(table.loss) & (table.loss > 0))
    if bad.any():
        raise Refused(f"{table.source}: the loss is not a positive number on lines {_lines(table, bad)}: a diverged "
                      "run says nothing of the law; mark it excluded=1 or status=diverged")
    for name, cure in (("tokenizer", "fit one tokenizer at a time (--where=tokenizer=...), or --loss=bits_per_byte"),
                       ("params_convention", "count all runs alike"), ("flops_convention", "count all runs alike"),
                       ("code_revision", "select one with --where, or run the older points again")):
        found = sorted(set(table[name])) if name in table else []
        if len(found) > 1 and not (name == "tokenizer" and table.unit == "bits per byte"):
            raise Refused(f"{table.source}: {len(found)} values of {name} are mixed "
                          f"({', '.join(map(repr, found[:4]))}): their losses are not comparable; {cure}")
    if len(of_corpora(table)) > 1 and not _nested(table):
        raise Refused(f"{table.source}: {len(of_corpora(table))} values of data_digest are mixed "
                      f"({', '.join(map(repr, list(of_corpora(table))[:4]))}) that no number of unique tokens tells "
                      "apart: their losses are not comparable; select one with --where=data_digest=...")
    _flops_alike(table)


def of_corpora(table: Table) -> dict[str, float]:
    """Tokens of each corpus that runs were made on; NaN where neither epochs nor unique tokens tell."""
    if "data_digest" not in table:
        return {}
    size = table["D"] / table["epochs"] if "epochs" in table else table["U"] if "U" in table else 0 * table["D"]
    sizes = {str(name): size[table["data_digest"] == name].max() for name in np.unique(table["data_digest"])}
    return {name: float(found) if found > 0 else math.nan for name, found in sizes.items()}


def cautions(table: Table) -> list[str]:
    """What must be read beside any law of these rows."""
    said = []
    flags = table["flags"] if "flags" in table else np.array([])
    if edge := sum("edge-of-lr-grid" in flag for flag in flags):
        said.append(f"{edge} of {len(table)} runs have their best learning rate at the edge of its grid: a better one "
                    "may be beyond, and their losses above what their N and D can reach; widen the grid there")
    if len(corpora := of_corpora(table)) > 1:
        sizes = ", ".join(f"{size:.3g}" for size in sorted(corpora.values()))
        said.append(f"runs are on {len(corpora)} corpora, of {sizes} tokens: their losses are comparable only where "
                    "the smaller are samples of the larger")
    return said


def enough(law: Law, table: Table, fixed=()):
    """Refuse a law whose columns are missing, do not vary, or are fewer than its parameters need."""
    for column in law.reads:
        if column not in table:
            raise Refused(f"{law.name} needs {column}, which {table.source} does not have")
    if np.ptp(np.log(table.loss)) < 1e-9:
        raise Refused(f"the loss is {table.loss[0]:g} in every run: there is nothing for {law.name} to explain")
    free = len(law.params) - len(set(fixed) & set(law.params))
    points = len(set(zip(*(table[column] for column in law.reads))))
    if points < free + 1:
        raise Refused(f"{law.name} has {free} parameters and there are {points} different points: at least "
                      f"{free + 1} are needed, and several more for an interval")
    for column, exponent in law.exponents.items():
        values = len(np.unique(np.round(np.log(table[column]), 3)))
        if values < 3 and exponent not in fixed:
            raise Refused(f"{law.name} needs at least 3 values of {column} for its exponent, there are {values}")
    if law.name == "data_constrained" and np.ptp(table["D"] / table["U"]) < 0.5 and "R_D" not in fixed:
        raise Refused("data_constrained needs runs that repeat their data; here none does, and chinchilla is that law")
    together = np.corrcoef(np.log(table["N"]), np.log(table["D"]))[0, 1] if len(law.exponents) > 1 else 0.0
    if abs(together) > 0.999:
        raise Refused(f"{law.name} cannot tell N from D: they rise together in every run (a fixed ratio); fit power_C, "
                      "or add runs at other ratios")


def settled(fit: Fit):
    """Refuse a fit whose parameters ran off: an exponent without end, and its amplitude with it."""
    if lost := [name for name in fit.free if not 0 <= fit.params[name] < intervals.LARGE]:
        raise Refused(f"{fit.law.name} runs off on these {fit.n} runs ({', '.join(lost)} without end): they carry no "
                      "its exponents; add runs, or hold some with --fix")


def warnings(fit: Fit, intervals: dict) -> list[str]:
    """What must be read beside the parameters: edges, open intervals, other optima as good."""
    said = []
    smallest = float(fit.loss.min())
    if "E" in fit.free:
        low, high = intervals.get("E", (fit.params["E"],) * 2)
        if min(low, fit.params["E"]) < NEAR * smallest:
            said.append(f"E touches 0 ({fit.params['E']:.3g}, interval from {low:.3g}): the data carry no irreducible "
                        "loss")
        if max(fit.params["E"], min(high, 2 * smallest)) > (1 - NEAR / 5) * smallest:
            said.append(f"E touches the smallest loss ({fit.params['E']:.4g} of {smallest:.4g}, interval to "
                        f"{high:.4g}): the largest runs are taken to be at the floor; go larger")
    for name, (low, high) in intervals.items():
        if name in fit.free and (high == math.inf or low <= 1e-6 * fit.params[name] or high > 30 * max(low, 1e-300)) \
                and not (name in fit.law.amplitudes or name == "E"):
            said.append(f"{name} is not identified: {_open(low)} to {_open(high)} suit the data")
    lower = [m for m in fit.minima if m[0] < fit.objective * (1 - 1e-6)]
    rivals = [m for m in fit.minima if fit.objective * (1 + 1e-9) < m[0] < fit.objective * 1.02]
    for word, found in (("a lower minimum exists", lower[:1]), ("another minimum is nearly as good", rivals[:1])):
        for value, params in found:
            where = ", ".join(f"{name} {params[name]:.4g}" for name in fit.free)
            said.append(f"{word}: objective {value:.6g} against {fit.objective:.6g}, at {where}")
    return said


def _nested(table: Table) -> bool:
    """Whether every corpus has a size of its own, as in a sweep of repeated data."""
    sizes = np.sort(list(of_corpora(table).values()))  # NaN last
    return bool((sizes[1:] > 1.01 * sizes[:-1]).all())


def _flops_alike(table: Table):
    """Refuse compute that is 6 N D in some rows and something else in others."""
    ratio = table["C"] / (6 * table["N"] * table["D"])
    exact, far = np.abs(ratio - 1) < 0.005, np.abs(ratio - 1) > 0.02
    if exact.mean() > 0.1 and far.mean() > 0.1:
        raise Refused(f"{table.source}: flops are 6 N D on {exact.sum()} rows and not on {far.sum()} (lines "
                      f"{_lines(table, far)}): two conventions are mixed; count all runs alike, or leave flops out")


def _open(end: float) -> str:
    return "anything smaller" if end == 0 else "anything larger" if end == math.inf else f"{end:.3g}"


def _lines(table: Table, mask) -> str:
    lines = [str(line) for line in table.lines[mask]]
    return ", ".join(lines[:8]) + (f" and {len(lines) - 8} more" if len(lines) > 8 else "")
