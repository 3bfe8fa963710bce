"""What figures and report speak of: runs, the fits of them, the law that is drawn, and its bands."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from lm_jax.scaling import checks, compare, fitting
from lm_jax.scaling.checks import Refused
from lm_jax.scaling.fitting import Fit
from lm_jax.scaling.table import Table

NEAR = 0.1  # of log: rows this close to a slice belong to it
SLICES = 6  # more curves in a panel are not told apart
HELD_OUT = 0.2  # of the rows, those with the most compute


@dataclass(frozen=True)
class Band:
    """A curve and the ends of its interval, point by point."""

    centre: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class Slice:
    """Rows that differ in one column only, the values of the others, and their losses moved there along the law."""

    held: dict[str, float]
    rows: np.ndarray
    losses: np.ndarray


@dataclass(frozen=True)
class Subject:
    """All rows and those that laws are of, every fit, the record of law.json, and the name of the law drawn."""

    runs: Table
    ends: Table
    fits: dict[str, Fit]
    record: dict
    law: str

    @property
    def fit(self) -> Fit:
        return self.fits[self.law]

    @property
    def budgets(self) -> list[dict]:
        """Predictions that were asked for."""
        return self.record.get("predict", [])

    @property
    def level(self) -> float:
        """Of the bands."""
        return self.record["level"]


def subject(runs: Table, fits: Mapping[str, Fit], record: dict, *, law: str = "chinchilla") -> Subject:
    """Drawn is the law asked for; where it was refused, the one with the lowest AIC of those that say most."""
    if law not in fits:
        able = [name for name in fits if allocates(fits[name])] or [name for name in fits if reaches(fits[name])]
        law = min(able or fits, key=lambda name: record["laws"][name]["aic"])
    return Subject(runs, runs.finals().tuned(), dict(fits), record, law)


def allocates(fit: Fit) -> bool:
    """Whether a law says how to share a budget between N and D."""
    return {"N", "D"} <= set(fit.law.reads)


def reaches(fit: Fit) -> bool:
    """Whether a law says what a budget can reach."""
    return allocates(fit) or fit.law.reads == ("C",)


def loss_band(fit: Fit, level: float, **x) -> Band:
    """The loss at columns, all of one length; U is D where it is not given: fresh data."""
    x = {"U": x.get("D")} | x
    return band(fit, lambda p: fit.law.loss(p, x), level)


def frontier(fit: Fit, C, level: float, per_product: float) -> Band:
    """The loss that compute can reach: at the law's own allocation, or of a law of C at C."""
    if not allocates(fit):
        return loss_band(fit, level, C=C)
    return band(fit, lambda p: fit.law.loss(p, _shares(fit, p, C, per_product)), level)


def best_N(fit: Fit, C, level: float, per_product: float) -> Band:
    return band(fit, lambda p: _shares(fit, p, C, per_product)["N"], level)


def band(fit: Fit, quantity: Callable, level: float) -> Band:
    """Of a positive quantity(params), an array: what the fit's covariance makes of its logarithm (delta method).

    Profiles, which the record has of single numbers, are closer to the truth and a thousand times slower.
    """
    problem = fit.problem()
    slopes_pm = fitting.complex_step(lambda theta: np.log(quantity(problem.params(theta[..., None]))), fit.theta)
    error = np.sqrt(np.einsum("pm,pq,qm->m", slopes_pm, fit.covariance(), slopes_pm))
    centre = np.asarray(quantity(fit.params))
    with np.errstate(over="ignore"):
        reach = np.exp(stdtrit(max(fit.n - len(fit.theta), 1), (1 + level) / 2) * error)
    return Band(centre, centre / reach, centre * reach)


def slices(fit: Fit, ends: Table, column: str) -> list[Slice]:
    """Slices of the table along one column that the law reads, three values or more in each, in the others' order.

    Where more than SLICES have enough rows, as many are taken, evenly spread. Rows that are only near are moved along
    the law, so that a point is as far from the curve as its residual.
    """
    others = [name for name in fit.law.reads if name != column]
    logs = np.stack([np.log(ends[name]) for name in others], axis=1) if others else np.zeros((len(ends), 0))
    left, groups = np.ones(len(ends), bool), []
    while left.any():
        found = max((left & (np.abs(logs - centre) < NEAR).all(1) for centre in np.unique(logs[left], axis=0)),
                    key=lambda mask: (_values(ends[column][mask]), np.ptp(np.log(ends[column][mask]))))
        if _values(ends[column][found]) < 3:
            break
        groups.append(np.flatnonzero(found))
        left &= ~found
    enough = max((len(rows) for rows in groups), default=0) / 4
    groups = sorted((rows for rows in groups if len(rows) >= enough), key=lambda rows: tuple(logs[rows].mean(0)))
    chosen = np.unique(np.linspace(0, len(groups) - 1, min(SLICES, len(groups))).round().astype(int))
    return [_slice(fit, ends, column, others, groups[i]) for i in chosen]


def hold_out(fit: Fit, ends: Table) -> tuple[Fit, np.ndarray]:
    """The law fitted without the HELD_OUT share of rows with the most compute, and which rows these are."""
    C = ends["C"]
    if C.min() == C.max():
        raise Refused(f"all runs have the same compute, {C.max():.3g} FLOPs: none is beyond the others")
    above = C > min(np.quantile(C, 1 - HELD_OUT, method="lower"), C[C < C.max()].max())
    checks.enough(fit.law, ends.take(~above), fit.fixed)
    return fitting.refit(fit, np.flatnonzero(~above)), above


def per_product(ends: Table) -> float:
    return compare.per_product(ends)


def _shares(fit, p, C, k) -> dict:
    N, D = compare.allocation(fit.law, p, C, k)
    return {"N": N, "D": D, "U": D}


def _values(column) -> int:
    """How many different values, those within two percent counted once."""
    return len(np.unique(np.round(np.log(column) / 0.02)))


def _slice(fit, ends, column, others, rows) -> Slice:
    held = {name: math.exp(np.log(ends[name][rows]).mean()) for name in others}
    here = {name: ends[name][rows] for name in fit.law.reads}
    there = here | {name: np.full(len(rows), value) for name, value in held.items()}
    return Slice(held, rows, ends.loss[rows] * fit.predict(there) / fit.predict(here))
