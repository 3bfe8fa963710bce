"""How far a number taken from a fit can be believed: profile likelihood, and resampling of rows, sizes and seeds.

A quantity is a positive number made of parameters (an exponent, an allocation, a predicted loss): `quantity(params)`.
Profiles follow its logarithm. An end of an interval that the data leave open is 0 or infinity.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np
from scipy.optimize import minimize
from scipy.stats import f as f_distribution

from lm_jax.scaling import fitting
from lm_jax.scaling.fitting import Fit

LEVEL = 0.95
DRAWS = 1000
FARTHEST = 16.0  # of log: a quantity that may be e^16 times larger is not bounded
Quantity = Callable[[Mapping[str, float]], float]
Interval = tuple[float, float]


def profile(fit: Fit, quantity: Quantity, *, level: float = LEVEL) -> Interval:
    """Values of a quantity for which some parameters still suit the data: the best objective that has this value rises
    less than a test of `level` allows (F with one degree, as the residuals' scale is estimated)."""
    p = len(fit.theta)
    limit = f_distribution.ppf(level, 1, max(fit.n - p, 1))
    path = _Path(fit, quantity)
    return tuple(float(np.exp(_crossing(path, sign, limit))) for sign in (-1, 1))


def rows(fit: Fit, rng: np.random.Generator, *, draws: int = DRAWS) -> list[dict]:
    """Parameters of fits to rows drawn with replacement."""
    return [fitting.refit(fit, rng.integers(0, fit.n, fit.n)).params for _ in range(draws)]


def groups(fit: Fit, names, rng: np.random.Generator, *, draws: int = DRAWS) -> list[dict]:
    """Parameters of fits to whole groups (model sizes, seeds) drawn with replacement; `names` has each row's group.

    Draws with fewer groups than the law has free exponents carry no fit and are drawn again.
    """
    members = [np.flatnonzero(names == name) for name in np.unique(names)]
    found = []
    while len(found) < draws:
        drawn = rng.integers(0, len(members), len(members))
        if len(set(drawn)) > min(2, len(members) - 1):
            found.append(fitting.refit(fit, np.concatenate([members[i] for i in drawn])).params)
    return found


def percentiles(values, *, level: float = LEVEL) -> Interval:
    low, high = np.quantile(values, ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)


class _Path:
    """The objective at its best where log quantity is held at a value, as a rise above the optimum in chi-squares."""

    def __init__(self, fit: Fit, quantity: Quantity):
        self.problem, self.best = fit.problem(), fit.objective
        self.theta, self.basis = fit.theta, self.problem.basis(fit.theta)
        self.log = lambda theta: np.log(quantity(self.problem.params(theta)))
        self.centre = float(self.log(fit.theta))
        slope, bread = self.slope(fit.theta), fit.bread()
        variance = slope @ bread @ fit.filling() @ bread @ slope
        self.step = float(np.sqrt(variance))
        self.scale = 2 * slope @ bread @ slope / variance  # makes a rise chi-square (Ronchetti 1982; Huber's sandwich)

    def slope(self, theta):
        return fitting.complex_step(lambda t: self.log(t.T), theta)

    def rise(self, value: float, z: np.ndarray) -> tuple[float, np.ndarray]:
        """The rise at a value, and where (in the basis), sought from z."""
        place = lambda z: self.theta + self.basis @ z

        def objective(z):
            here, slope = self.problem.gradient(place(z))
            return self.scale * (here - self.best), self.scale * self.basis.T @ slope

        held = {"type": "eq", "fun": lambda z: (self.log(place(z)) - value) / self.step,
                "jac": lambda z: self.basis.T @ self.slope(place(z)) / self.step}
        with np.errstate(all="ignore"):
            found = minimize(objective, z, jac=True, method="SLSQP", constraints=[held],
                             options={"maxiter": 50, "ftol": 1e-4})
        met = found.success or abs(held["fun"](found.x)) < 1e-3
        return (float(found.fun), found.x) if met and np.isfinite(found.fun) else (math.inf, z)


def _crossing(path: _Path, sign: int, limit: float) -> float:
    """Log of the value on one side where the rise reaches the limit; infinite where it never does."""
    if not 0 < path.step < 1e3:
        return sign * math.inf
    here, z, root = 0.0, np.zeros(len(path.theta)), 0.0  # distance, place, square root of the rise, which is near linear
    stride = path.step * math.sqrt(limit)
    while True:
        there = here + stride
        if there > FARTHEST:
            return sign * math.inf
        rise, beyond = path.rise(path.centre + sign * there, z)
        if rise >= limit:
            break
        here, z, root = there, beyond, math.sqrt(max(rise, 0.0))
        stride *= 1.5
    top = math.sqrt(rise) if math.isfinite(rise) else 2 * math.sqrt(limit)
    for _ in range(12):
        share = np.clip((math.sqrt(limit) - root) / max(top - root, 1e-9), 0.1, 0.9)
        middle = here + share * (there - here)
        rise, place = path.rise(path.centre + sign * middle, z)
        if rise >= limit:
            there, top = middle, math.sqrt(min(rise, 4 * limit))
        else:
            here, z, root = middle, place, math.sqrt(max(rise, 0.0))
        if there - here < 0.02 * path.step or abs(rise - limit) < 0.01 * limit:
            return path.centre + sign * middle
    return path.centre + sign * (here + there) / 2
