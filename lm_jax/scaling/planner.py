"""Which runs to make next: those that leave a law's word on a large budget the least in doubt.

A run at (N, D) adds j j' / s^2 to what is known of a law's coordinates, j being the gradient of its predicted log loss
there and s the noise of a run. With g that of the target, the variance g' C g of the predicted log loss falls by
(g' C j)^2 / (s^2 + j' C j): c-optimal design, one run after another (Fedorov 1972; Chaloner & Verdinelli 1995). That
the best allocation at the target hangs on the law does not enter: around it the loss is flat.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lm_jax.errors import ConfigError
from lm_jax.scaling import compare
from lm_jax.scaling.fitting import Fit
from lm_jax.scaling.table import Table

PRIOR = 3.0  # of log: before any run a coordinate is known within a factor of twenty, which those of real laws are
FARTHER = 4.0  # candidates reach so many times beyond the sizes and tokens of the table
THRIFT = (0.0, 0.25, 0.5, 0.75, 1.0)  # powers of cost
STEPS = 12  # candidates along N, and along D


@dataclass(frozen=True)
class Run:
    """A run to make, and the relative standard error of the target's loss once all runs up to it are made."""

    N: float
    D: float
    flops: float
    stderr: float


@dataclass(frozen=True)
class Plan:
    """Runs in the order of their choice. `before` and `after` are relative standard errors of the target's loss, and
    `next` is the best run on top of them, of a cost that the budget once allowed: what one more is worth."""

    target: float  # FLOPs
    loss: float  # predicted there
    noise: float  # of one run, relative
    before: float
    runs: tuple[Run, ...]
    next: Run

    @property
    def after(self) -> float:
        return self.runs[-1].stderr if self.runs else self.before

    @property
    def flops(self) -> float:
        return sum(run.flops for run in self.runs)


def plan(fit: Fit, table: Table, *, target: float, budget: float, candidates: Sequence[tuple] = (), most: int = 20
         ) -> Plan:
    """The runs that a budget of FLOPs buys and a fit's prediction at `target` FLOPs gains the most from.

    Candidates are (N, D), by default a grid a little beyond the table's. They are chosen greedily, by gain over a power
    of cost; of several powers the one that ends with the least doubt. ConfigError where nothing can be bought.
    """
    k = compare.per_product(table)
    candidates = np.array(candidates or grid(table), float)
    costs = k * candidates.prod(1)
    if not (costs <= budget).any():
        raise ConfigError(f"no run costs less than the budget of {budget:.3g} FLOPs, the cheapest {costs.min():.3g}")
    best = compare.allocation(fit.law, fit.params, target, k)
    J, g = gradients(fit, candidates), gradients(fit, np.array([best]))[0]
    C, s = doubt(fit), noise(fit)
    plans = [_greedy(C, s, J, g, costs, budget, most, thrift) for thrift in THRIFT]
    chosen = min(plans, key=lambda picks: picks[-1][1])
    runs = [Run(*candidates[i], costs[i], float(np.sqrt(v))) for i, v in chosen]
    for i, _ in chosen:
        C = _known(C, J[i], s)
    i = int(np.argmin(np.where(costs <= budget, _left(C, s, J, g), np.inf)))
    more = Run(*candidates[i], costs[i], float(np.sqrt(_left(C, s, J, g)[i])))
    return Plan(target, float(fit.predict({"N": best[0], "D": best[1]})), s, float(np.sqrt(g @ doubt(fit) @ g)),
                tuple(runs), more)


def grid(table: Table) -> list[tuple[float, float]]:
    """(N, D) in and a little beyond the table's, as tokens a parameter are too."""
    N, D = (np.geomspace(table[name].min(), FARTHER * table[name].max(), STEPS) for name in ("N", "D"))
    ratio = table["D"] / table["N"]
    return [(n, d) for n in N for d in D if ratio.min() / FARTHER <= d / n <= ratio.max() * FARTHER]


def gradients(fit: Fit, points: np.ndarray) -> np.ndarray:
    """Of the predicted log loss at points (N, D), by the fit's coordinates; a row a point."""
    problem = fit.problem()
    problem.x = {name: points[:, i] / fit.units[name] for i, name in enumerate(("N", "D"))}
    return problem.jacobian(fit.theta)


def doubt(fit: Fit) -> np.ndarray:
    """Covariance of the coordinates if runs scatter by their noise alone; where they say nothing, the prior's."""
    J = fit.problem().jacobian(fit.theta)
    return np.linalg.inv(J.T @ J / noise(fit) ** 2 + np.eye(len(fit.theta)) / PRIOR**2)


def noise(fit: Fit) -> float:
    """Standard deviation of one run's log loss. Of all residuals, outliers too: a robust fit to few runs goes through
    most of them, and would know no noise."""
    return float(np.sqrt(np.sum(fit.residuals**2) / max(fit.n - len(fit.theta), 1)))


def _greedy(C, s, J, g, costs, budget, most, thrift: float) -> list[tuple[int, float]]:
    """(candidate, variance of the target after it), one after another, as long as there is one that can be paid."""
    picks = []
    while len(picks) < most and (costs <= budget).any():
        left = _left(C, s, J, g)
        i = int(np.argmax(np.where(costs <= budget, (g @ C @ g - left) / costs**thrift, -np.inf)))
        picks.append((i, float(left[i])))
        C, budget = _known(C, J[i], s), budget - costs[i]
    return picks


def _left(C, s, J, g) -> np.ndarray:
    """Variance of the target after each candidate."""
    return g @ C @ g - (J @ C @ g) ** 2 / (s**2 + np.einsum("np,pq,nq->n", J, C, J))


def _known(C, j, s) -> np.ndarray:
    """The covariance after a run whose gradient is j (Sherman & Morrison 1950)."""
    return C - np.outer(C @ j, C @ j) / (s**2 + j @ C @ j)
