"""Approach 1 of Hoffmann et al. 2022: the best size at each budget, of sizes whose losses along training are known."""

import dataclasses
import math

import numpy as np
from scipy.interpolate import Akima1DInterpolator

from lm_jax.scaling import curves, valleys
from lm_jax.scaling.checks import Refused
from lm_jax.scaling.curves import CURVE
from lm_jax.scaling.table import Table
from lm_jax.scaling.valleys import Trace

SIZES = 5
WINDOW = 7  # sizes of a slice, around its lowest


def envelope(table: Table, rng: np.random.Generator, *, method: str = "parabola", budgets: int = 12,
             draws: int = valleys.DRAWS) -> Trace:
    """Best N along C, of losses along training, cut at budgets in between; of one size and seed the lowest counts.

    Curves are the ends of a size's runs, joined, where there are CURVE lengths of run or more: each is a loss that its
    tokens can reach, under any schedule. Else they are training curves whose learning rate fell all the way, in which
    losses lie above those of runs that ended there (of which Hoffmann et al. 2022 took no notice): `Trace.curves` says
    which. The noise of a curve is shared by all of its cuts, and is drawn so.
    """
    lines, said = _curves(table)
    ends = np.array([[min(c[0] for c, _ in parts), max(c[-1] for c, _ in parts)] for parts in lines.values()])
    ats, sizes, losses, names = [], [], [], []
    for at in np.geomspace(np.sort(ends[:, 0])[2], np.sort(ends[:, 1])[-3], budgets):
        cut = []
        for name, ((n, _), parts) in enumerate(lines.items()):
            there = [_cut(c, loss, at) for c, loss in parts if c[0] <= at <= c[-1]]
            cut += [(n, min(there), name)] if there else []
        for n, loss, name in _around(cut):
            ats, sizes, losses, names = ats + [at], sizes + [n], losses + [loss], names + [name]
    found = valleys.trace(np.array(ats), np.array(sizes), np.array(losses), rng, method=method,
                          noise=np.array(names), draws=draws)
    return dataclasses.replace(found, curves=said)


def _around(cut: list[tuple]) -> list[tuple]:
    """As many sizes on either side of the lowest, or one more: a parabola that sees more of one side leans that way."""
    if not cut:
        return []
    sizes = sorted({n for n, _, _ in cut})
    lowest = sizes.index(min(cut, key=lambda row: row[1])[0])
    reach = min(WINDOW // 2, lowest + 1, len(sizes) - lowest)
    near = sizes[max(0, lowest - reach):lowest + reach + 1]
    return [row for row in cut if row[0] in near]


def _curves(table: Table) -> tuple[dict, str]:
    """{(N, seed): [(C, loss) along one curve]}, sizes rising, and what these curves are."""
    ends = valleys.fresh(table.finals().tuned())
    once = set(ends["run"]) if "run" in ends else set()
    recorded = [curve for curve in table.recorded if curve.run in once and curve.falls]
    ways = {"training curves, as the table has them": _by_size(table, curves.within(table.columns)),
            "ends of each size's runs, joined": _joined(ends),
            "training curves, whose losses before their ends lie above those of runs that end there":
            _by_size(table, recorded)}
    for said, found in ways.items():
        if len({n for n, _ in found}) >= SIZES:
            return dict(sorted(found.items())), said
    counts = ", ".join(f"{len({n for n, _ in found})} by {said}" for said, found in ways.items())
    unfit = sum(not curve.falls for curve in table.recorded)
    raise Refused(f"an envelope takes {SIZES} sizes or more with {CURVE} points or more along training each; there are "
                  f"{counts}" + (f"; inside of {unfit} training curves, whose learning rate does not fall all the way "
                                 "(WSD), no loss is what its tokens can reach" if unfit else ""))


def _by_size(table: Table, found) -> dict:
    seeds = dict(zip(table["run"], table["seed"])) if "run" in table and "seed" in table else {}
    groups = {}
    for curve in found:
        groups.setdefault((curve.N, seeds.get(curve.run, "")), []).append((curve.C, curve.loss))
    return groups


def _joined(ends: Table) -> dict:
    """(C, loss) of the ends of runs, a curve for each size and seed; where several ended together, the lowest."""
    groups = {}
    for i in np.argsort(-ends.loss, kind="stable"):
        key = float(ends["N"][i]), ends["seed"][i] if "seed" in ends else ""
        groups.setdefault(key, {})[float(ends["C"][i])] = float(ends.loss[i])
    return {key: [tuple(np.array(sorted(found.items())).T)] for key, found in groups.items() if len(found) >= CURVE}


def _cut(C, loss, at: float) -> float:
    """Between points of a curve; Akima's, as a straight line lies above a curve of a few points."""
    return float(np.exp(Akima1DInterpolator(np.log(C), np.log(loss), method="makima")(math.log(at))))
