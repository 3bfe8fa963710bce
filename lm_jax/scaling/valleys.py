"""Where a loss is lowest along one dial, at several sizes of another, and the power law that joins these minima.

IsoFLOP profiles (Hoffmann et al. 2022, approach 2) are this with N along C; so are envelopes of training curves that
are cut at budgets (`envelope`), the best learning rate along N and the best batch along D. A parabola in the dial's log
is the usual curve; since it is biased where a valley leans, a cubic and Akima's interpolation stand beside it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.interpolate import Akima1DInterpolator
from scipy.special import stdtrit

from lm_jax.scaling.checks import Refused
from lm_jax.scaling.intervals import LEVEL, Interval
from lm_jax.scaling.table import Table

BUDGET = 0.1  # of log C: runs this close to the middle of a budget are of it
DRAWS = 200
SHARED = 0.75  # power of 1 - leverage where profiles share noise: HC2 (0.5) holds the truth too seldom, HC3 too often


@dataclass(frozen=True)
class Valley:
    """The minimum of one profile: at which budget, at which value of the dial, how low, of how many points, and on
    which lines of the table they are."""

    at: float
    best: float
    loss: float
    points: int
    lines: tuple[int, ...] = ()


@dataclass(frozen=True)
class Trace:
    """best = factor at^exponent. `draws` are (log factor, exponent) of tables with other noise."""

    factor: float
    exponent: float
    valleys: tuple[Valley, ...]
    refused: tuple[str, ...]  # profiles left out, each with its reason
    method: str
    freedom: int
    draws: np.ndarray
    curves: str = ""  # of an envelope, what was cut

    def predict(self, at: float) -> float:
        return self.factor * at**self.exponent

    def interval(self, quantity: Callable = lambda log_factor, exponent: exponent, *, level=LEVEL) -> Interval:
        """Of a number made of log factor and exponent: the exponent, or log of a prediction."""
        centre = quantity(math.log(self.factor), self.exponent)
        reach = stdtrit(max(self.freedom, 1), (1 + level) / 2) * np.std(quantity(*self.draws.T), ddof=1)
        return float(centre - reach), float(centre + reach)


def isoflop(table: Table, rng: np.random.Generator, *, method: str = "parabola", draws: int = DRAWS) -> Trace:
    """Best N along C, of a table whose runs share budgets. Refused where fewer than two budgets have a valley."""
    table = fresh(table)
    return trace(budgets(table["C"]), table["N"], table.loss, rng, method=method, lines=table.lines, draws=draws)


def dial(table: Table, vary: str, along: str, rng: np.random.Generator, *, method: str = "parabola",
         draws: int = DRAWS) -> Trace:
    """Best learning rate or batch (`vary`) along N or D, of a table that has it as a column.

    A valley is of runs with one N and D, other dials at their best: rates that only follow the size have no valley.
    """
    if vary not in table:
        raise Refused(f"{table.source} has no column {vary!r}: there is no law of it")
    alike = [table[name] for name in ("N", "D", "U", "seed", vary) if name in table]
    lowest = {key: i for i, key in sorted(enumerate(zip(*alike)), key=lambda pair: -table.loss[pair[0]])}
    table = table.take(sorted(lowest.values()))
    _, groups = np.unique(np.stack([table["N"], table["D"]]), axis=1, return_inverse=True)
    return trace(table[along], table[vary], table.loss, rng, method=method, groups=groups.ravel(), lines=table.lines,
                 draws=draws)


def trace(at, x, loss, rng: np.random.Generator, *, method: str = "parabola", groups=None, noise=None, lines=None,
          draws: int = DRAWS) -> Trace:
    """Minima over x at each value of `at`, joined by a power law.

    `groups` names the rows that are one profile, if not those of one `at`; `noise` those that share their noise;
    `lines` are theirs in a table.

    Draws flip the signs of residuals (wild bootstrap, a sign for each name), which are first made as large as the
    noise, of which a parabola takes a part, and the more where neighbouring profiles share it.
    """
    groups = at if groups is None else groups
    profiles = [np.flatnonzero(groups == value) for value in np.unique(groups)]
    noise = np.arange(len(x)) if noise is None else noise
    kept, valleys, refused = [], [], []
    for rows in profiles:
        try:
            best, low = minimum(x[rows], loss[rows], method=method)
        except Refused as reason:
            refused.append(f"at {at[rows[0]]:.3g}: {reason}")
        else:
            kept.append(rows)
            numbers = () if lines is None else tuple(int(line) for line in lines[rows])
            valleys.append(Valley(float(at[rows[0]]), best, low, len(rows), numbers))
    if len({valley.at for valley in valleys}) < 2:
        raise Refused(f"{len(valleys)} of {len(profiles)} profiles have a minimum inside them, and a power law takes "
                      f"two at different places: {'; '.join(refused[:3])}")
    slope = lambda bests: np.polynomial.polynomial.polyfit(np.log([v.at for v in valleys]), np.log(bests), 1)
    level, exponent = slope([v.best for v in valleys])
    used = np.concatenate(kept)
    names, freedom = np.unique(noise[used]), len(used) - 3 * len(kept)
    shared = len(names) < len(used)
    freedom = min(freedom, len(names) - 3) if shared else freedom
    smooth, residual = np.zeros(len(x)), np.zeros(len(x))
    for rows in kept:
        smooth[rows], residual[rows] = _parabola_residuals(x[rows], loss[rows], power=SHARED if shared else 0.5)
    found = []
    for _ in range(20 * draws):
        if len(found) == draws:
            break
        signs = dict(zip(names, rng.choice((-1.0, 1.0), len(names))))
        drawn = smooth + residual * np.array([signs.get(name, 0.0) for name in noise])
        try:
            found.append(slope([minimum(x[rows], drawn[rows], method=method)[0] for rows in kept]))
        except Refused:
            continue
    if len(found) < draws:
        raise Refused(f"minima are lost in the noise: {len(found)} of {20 * draws} tables with new noise had them all")
    return Trace(math.exp(level), float(exponent), tuple(valleys), tuple(refused), method, freedom, np.array(found))


def fresh(table: Table) -> Table:
    """Runs that do not repeat their data, which those that do lie above, and the more the smaller they are."""
    once = table["D"] <= 1.01 * table["U"] if "U" in table else np.ones(len(table), bool)
    if not once.any():
        raise Refused("every run repeats its data: the lowest of a budget says what suits these data, not the budget")
    return table.take(once)


def budgets(C) -> np.ndarray:
    """C of each row's budget: rows within BUDGET of a middle share their geometric mean, the most such rows first.

    Joining every neighbour instead would make one of two budgets that have stray runs between them.
    """
    order, shared = np.argsort(C), np.empty(len(C))
    while len(order):
        logs = np.log(C[order])
        ends = np.searchsorted(logs, logs + 2 * BUDGET, side="right")
        first = int(np.argmax(ends - np.arange(len(logs))))
        rows = slice(first, ends[first])
        shared[order[rows]] = np.exp(logs[rows].mean())
        order = np.delete(order, rows)
    return shared


def minimum(x, loss, *, method: str = "parabola") -> tuple[float, float]:
    """(x, loss) at the bottom of a valley, x on a log scale. Refused where there is none inside the points."""
    order = np.argsort(x)
    u, y = np.log(x[order]), loss[order]
    if len(np.unique(u)) < 4:
        raise Refused(f"{len(np.unique(u))} different values of the dial, a valley takes 4 or more")
    a, b = np.polynomial.polynomial.polyfit(u - u.mean(), y, 2)[1:]
    if b <= 0:
        raise Refused("the valley is concave: its parabola has a top, not a bottom")
    centre = u.mean() - a / (2 * b)
    if not u[0] < centre < u[-1]:
        raise Refused(f"the optimum, {math.exp(min(centre, 700)):.3g}, is outside of the sampled {x.min():.3g} to "
                      f"{x.max():.3g}")
    if np.argmin(y) in (0, len(y) - 1):
        raise Refused(f"the lowest loss is at the edge of the sampled {x.min():.3g} to {x.max():.3g}: sample beyond it")
    place, low = METHODS[method](u, y)
    return math.exp(place), float(low)


def _parabola(u, y):
    c, a, b = np.polynomial.polynomial.polyfit(u - u.mean(), y, 2)
    return u.mean() - a / (2 * b), c - a**2 / (4 * b)


def _cubic(u, y):
    """A cubic's minimum, or Refused where it has none between the points."""
    if len(np.unique(u)) < 5:
        raise Refused(f"{len(np.unique(u))} different values of the dial, a cubic takes 5 or more")
    centre = u.mean()
    d, c, b, a = np.polynomial.polynomial.polyfit(u - centre, y, 3)
    root = b**2 - 3 * a * c
    low = -c / (b + math.sqrt(root)) if root > 0 and b + math.sqrt(root) != 0 else math.inf  # of a = 0 too
    if not u[0] < centre + low < u[-1]:
        raise Refused("the cubic has no minimum between the points")
    return centre + low, d + low * (c + low * (b + low * a))


def _akima(u, y):
    """The minimum of Akima's interpolation, of the mean where several points share a value of the dial."""
    values = np.unique(u)
    curve = Akima1DInterpolator(values, [y[u == value].mean() for value in values], method="makima")
    fine = np.linspace(values[0], values[-1], 2001)
    lowest = int(np.argmin(curve(fine)))
    return fine[lowest], float(curve(fine[lowest]))


METHODS = {"parabola": _parabola, "cubic": _cubic, "akima": _akima}


def _parabola_residuals(x, loss, *, power: float):
    """A parabola's values, and residuals over (1 - leverage)^power."""
    matrix = np.vander(np.log(x) - np.log(x).mean(), 3)
    hat = matrix @ np.linalg.pinv(matrix)
    return hat @ loss, (loss - hat @ loss) / np.maximum(1 - np.diag(hat), 0.1) ** power
