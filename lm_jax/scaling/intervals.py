"""How far a number taken from a fit can be believed: profile likelihood, and resampling of rows, sizes and seeds.

A quantity is a positive number made of parameters (an exponent, an allocation, a predicted loss): `quantity(params)`.
Profiles follow its logarithm. An end of an interval that the data leave open is 0 or infinity.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np
from scipy.optimize import minimize
from scipy.special import fdtri

from lm_jax.scaling import fitting
from lm_jax.scaling.fitting import Fit

LEVEL = 0.95
DRAWS = 1000
FEWEST = 20  # draws of which a spread is told
PULL = 100.0  # of the search for a profile towards its target, in units of the quantity's own curvature
FLAT = 1e-9  # of the steepest direction: one as flat moves no prediction
FARTHEST = 16.0  # of log: a quantity that may be e^16 times larger is not bounded
LARGE = 1e300  # and one so large has run off
Quantity = Callable[[Mapping[str, float]], float]
Interval = tuple[float, float]


def profile(fit: Fit, quantity: Quantity, *, level: float = LEVEL) -> Interval:
    """Values of a quantity for which some parameters still suit the data: the best objective that has this value rises
    less than a test of `level` allows (F with one degree, as the residuals' scale is estimated)."""
    p = len(fit.theta)
    limit = fdtri(1, max(fit.n - p, 1), level)
    path = _Path(fit, quantity)
    ends = (float(np.exp(_crossing(path, sign, limit))) for sign in (-1, 1))
    return tuple(open_end if math.isnan(end) else end for end, open_end in zip(ends, (0.0, math.inf)))


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
    """Ends that leave as many draws on either side; open where draws run off."""
    if np.isnan(values).any():
        return 0.0, math.inf
    low, high = np.quantile(np.minimum(values, LARGE), ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high) if high < LARGE / 10 else math.inf


def spread(values) -> float:
    """Standard error from draws: their standard deviation, the outermost half percent on either side brought in. Draws
    of amplitudes are so skewed that without it a few in the tail decide. Infinite where they run off."""
    low, high = percentiles(values, level=0.99)
    return math.inf if math.isinf(high) else float(np.std(np.clip(values, low, high), ddof=1))


class _Path:
    """The objective at its best where log quantity is held at a value, as a rise above the optimum in chi-squares."""

    def __init__(self, fit: Fit, quantity: Quantity):
        self.problem, self.best = fit.problem(), fit.objective
        self.theta, self.basis = fit.theta, self.problem.basis(fit.theta)
        self.log = lambda theta: np.log(quantity(self.problem.params(theta)))
        self.centre = float(self.log(fit.theta))
        slope, bread = self.slope(fit.theta), fit.bread()
        variance = slope @ bread @ fit.filling() @ bread @ slope
        self.step = float(np.sqrt(variance)) if self.felt(slope) else math.inf
        self.along = np.linalg.solve(self.basis, bread @ slope / (slope @ bread @ slope))  # the profile's tangent
        self.scale = 2 * slope @ bread @ slope / variance  # makes a rise chi-square (Ronchetti 1982; Huber's sandwich)

    def felt(self, slope) -> bool:
        """Whether predictions change with the quantity: not at the end of a parameter that ran off to where it says
        nothing, of which no curvature is left, and so no width."""
        J = self.problem.jacobian(self.theta)
        carried = J.T @ np.linalg.lstsq(J.T, slope, rcond=FLAT)[0]
        return bool(np.linalg.norm(slope - carried) < 1e-3 * np.linalg.norm(slope))

    def slope(self, theta):
        return fitting.complex_step(self.log, theta)

    def point(self, target: float, z: np.ndarray) -> tuple[float, float, np.ndarray]:
        """A point of the profile near a target: how far log quantity is from its estimate, the rise, and its place in
        the basis, sought from z. What is best but for a pull towards the target is best at the value it has."""
        place = lambda z: self.theta + self.basis @ z
        aim = target * (1 + 2 / PULL)  # so far that a rise of (target / step)^2 pulls back to the target

        def pulled(z):
            theta = place(z)
            here, slope = self.problem.gradient(theta)
            miss = (self.log(theta) - self.centre - aim) / self.step
            cost = self.scale * (here - self.best) + PULL / 2 * miss**2
            slope = self.basis.T @ (self.scale * slope + PULL * miss / self.step * self.slope(theta))
            return (cost, slope) if np.isfinite(cost) and np.isfinite(slope).all() else (1e10, np.zeros_like(z))

        with np.errstate(all="ignore"):
            z = minimize(pulled, z, jac=True, method="BFGS", options={"gtol": 0.01, "maxiter": 60}).x
            theta = place(z)
            rise = self.scale * (self.problem.objective(theta) - self.best)
            return float(self.log(theta)) - self.centre, rise, z


def _crossing(path: _Path, sign: int, limit: float) -> float:
    """Log of the value on one side where the rise reaches the limit; infinite where it never does."""
    if not 0 < path.step < FARTHEST:
        return sign * math.inf
    root, goal = (lambda rise: math.sqrt(max(rise, 0.0))), math.sqrt(limit)
    below, above = (0.0, 0.0), None  # (distance, root of the rise), which are near a line
    z = np.zeros(len(path.theta))
    target = stride = path.step * goal
    for _ in range(20):
        far, rise, there = path.point(sign * target, z + path.along * sign * (target - below[0]))
        if abs(root(rise) - goal) < 0.015 * goal:
            return path.centre + far
        if root(rise) < goal:
            below, z = (sign * far, root(rise)), there
        else:
            above = (sign * far, root(rise))
        if above is None:
            stride *= 1.5
            target += stride
            if target > FARTHEST:
                return sign * math.inf
        elif above[0] - below[0] < 0.015 * path.step:
            break
        else:
            share = np.clip((goal - below[1]) / (above[1] - below[1]), 0.1, 0.9)
            target = below[0] + share * (above[0] - below[0])
    return path.centre + sign * ((above[0] + below[0]) / 2 if above else math.inf)
