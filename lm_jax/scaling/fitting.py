"""One fitter for every law: Huber loss on log residuals, in float64, from many starts, polished until it stands still.

The sum of Huber losses with delta 1e-3 (Hoffmann et al. 2022) is tiny, so that an optimiser with default tolerances
stops where it starts. Here it is divided by its value at the start, in coordinates in which the Gauss-Newton matrix is
the identity, and descended again until a whole descent gains nothing. `delta=numpy.inf` is least squares.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.special import erf, ndtr

from lm_jax.errors import ConfigError
from lm_jax.scaling.laws import Law

HUBER = 1e-3  # of log loss: beyond a tenth of a percent a residual counts by its size, not its square
EXACT = 1e-24  # mean square of residuals that are rounding alone
SPARED = 0.65  # power of 1 - leverage: HC2 (0.5) holds the truth too seldom far from the runs, HC3 (1) too often
TRIES = 8  # starts of the grid that are polished


@dataclass(frozen=True)
class Fit:
    """A law fitted to columns. `theta` are its free coordinates at the optimum; `minima` (objective, parameters) of
    every distinct optimum found, the lowest first, whether or not it is the one taken."""

    law: Law
    params: dict[str, float]
    fixed: dict[str, float]
    objective: float
    theta: np.ndarray
    delta: float
    x: dict[str, np.ndarray]
    loss: np.ndarray
    units: dict[str, float]
    minima: tuple = ()

    @property
    def n(self) -> int:
        return len(self.loss)

    @property
    def free(self) -> tuple[str, ...]:
        return tuple(name for name in self.law.params if name not in self.fixed)

    @property
    def residuals(self) -> np.ndarray:
        """log of loss over prediction."""
        return np.log(self.loss) - np.log(self.predict(self.x))

    @property
    def aic(self) -> float:
        """Akaike's criterion, under the density that the Huber loss is the log of; its scale is a parameter too."""
        return 2 * (len(self.theta) + 1) - 2 * log_likelihood(self.residuals, self.delta)

    @property
    def r2(self) -> float:
        return float(1 - np.sum((self.predict(self.x) - self.loss) ** 2) / np.sum((self.loss - self.loss.mean()) ** 2))

    def predict(self, x: Mapping[str, np.ndarray]) -> np.ndarray:
        return self.law.loss(self.params, {name: np.asarray(x[name], float) for name in self.law.reads})

    def problem(self) -> "Problem":
        return Problem(self.law, self.x, self.loss, self.delta, self.fixed, self.units)

    def covariance(self) -> np.ndarray:
        """Of theta: the sandwich of an M-estimator, H^-1 M H^-1, residuals not taken to be alike everywhere."""
        bread, filling = self.bread(), self.filling()
        return bread @ filling @ bread

    def bread(self) -> np.ndarray:
        """H^-1, H the objective's curvature: psi' is smoothed, as a density is (Powell 1984; width of Silverman), of
        residuals drawn together, so that smoothing leaves their spread what it is (Silverman & Young 1987)."""
        J, r = self.spared()
        if math.isinf(self.delta):
            return np.linalg.pinv(J.T @ J)
        size = min(np.std(r), np.subtract(*np.quantile(r, (0.75, 0.25))) / 1.349) or np.std(r)
        width = 1.06 * size * len(r) ** -0.2 + 1e-12
        r = r / math.sqrt(1 + (width / (size + 1e-12)) ** 2)
        inside = ndtr((self.delta - r) / width) - ndtr((-self.delta - r) / width)
        met = np.argsort(np.abs(r))[:len(self.theta)]  # as many points as parameters are met whatever the noise
        inside[met] = np.delete(inside, met).mean() if len(r) > len(met) else inside[met]
        return np.linalg.pinv(J.T * inside @ J, hermitian=True)

    def filling(self) -> np.ndarray:
        """M, the sum of outer products of the rows' gradients."""
        J, r = self.spared()
        return J.T * np.clip(r, -self.delta, self.delta) ** 2 @ J

    def spared(self) -> tuple[np.ndarray, np.ndarray]:
        """The Jacobian, and residuals as large as the noise, of which a fit takes a part (MacKinnon & White 1985)."""
        J = self.problem().jacobian(self.theta)
        leverage = np.einsum("np,pq,nq->n", J, np.linalg.pinv(J.T @ J), J)
        return J, self.residuals / np.maximum(1 - leverage, 0.1) ** SPARED


def fit(law: Law, x: Mapping, loss, *, delta: float = HUBER, fixed: Mapping | None = None, start: Mapping | None = None,
        within: Mapping | None = None, grid: bool = True, tries: int = TRIES) -> Fit:
    """The law that suits losses best. `x` has the columns that the law reads.

    Parameters in `fixed` keep their value. `start` adds to the starts of the grid, or with `grid=False` is the only
    one: as it is, and with its amplitudes solved for. Of the grid the `tries` best are polished. Of several optima the
    lowest is taken, or the lowest `within` {name: (low, high)}; `Fit.minima` has all.
    """
    fixed = dict(fixed or {})
    for name in {*fixed, *(start or {}), *(within or {})} - set(law.params):
        raise ConfigError(f"{law.name} has no parameter {name!r}: it has {', '.join(law.params)}")
    x = {name: np.asarray(x[name], float) for name in law.reads}
    loss = np.asarray(loss, float)
    units = {name: float(np.exp(np.log(column).mean())) for name, column in x.items()}
    if "U" in units:
        units["U"] = units["D"]
    problem = Problem(law, x, loss, delta, fixed, units)
    starts = [problem.theta(dict(start) | fixed), problem.projected(dict(start) | fixed)] if start else []
    starts += problem.starts(tries) if grid else []
    if not starts:
        raise ConfigError(f"{law.name} has nowhere to start from: give a start, or allow the grid")
    found = sorted((problem.polish(theta) for theta in starts), key=lambda pair: pair[0])
    minima = _distinct([(value, problem.params(theta), theta) for value, theta in found])
    inside = [m for m in minima if all(a <= m[1][name] <= b for name, (a, b) in (within or {}).items())]
    if not inside:
        raise ConfigError(f"{law.name} has no optimum within {dict(within)}: those found are {[m[1] for m in minima]}")
    objective, params, theta = inside[0]
    return Fit(law, params, fixed, objective, theta, delta, x, loss, units, tuple(m[:2] for m in minima))


def refit(before: Fit, rows, loss=None) -> Fit:
    """The fit of some of the rows (an index, repeats allowed), or of other losses, started from an earlier one."""
    loss = (before.loss if loss is None else loss)[rows]
    x = {name: column[rows] for name, column in before.x.items()}
    problem = Problem(before.law, x, loss, before.delta, before.fixed, before.units)
    objective, theta = problem.polish(before.theta, gain=1e-6)
    return dataclasses.replace(before, params=problem.params(theta), objective=objective, theta=theta, x=x, loss=loss,
                               minima=())


class Problem:
    """A law and its data as a function of free coordinates: logs of the parameters, amplitudes at the units."""

    def __init__(self, law: Law, x, loss, delta: float, fixed: dict, units: dict):
        self.law, self.delta, self.fixed, self.units = law, delta, fixed, units
        self.x = {name: column / units[name] for name, column in x.items()}
        self.loss, self.log_loss = loss, np.log(loss)
        self.free = [name for name in law.params if name not in fixed]

    def theta(self, params: Mapping) -> np.ndarray:
        """Coordinates of parameters; nothing is the smallest that a coordinate can tell from it."""
        logs = {name: math.log(max(params[name], 1e-12)) for name in self.law.params}
        for name, (exponent, column) in self.law.amplitudes.items():
            logs[name] -= params[exponent] * math.log(self.units[column])
        return np.array([logs[name] for name in self.free])

    def scaled(self, theta: np.ndarray) -> dict:
        """Parameters in the units; the first axis of theta is the coordinate, others are kept."""
        p = {name: np.exp(value) for name, value in zip(self.free, theta)}
        p |= {name: value for name, value in self.fixed.items() if name not in self.law.amplitudes}
        for name in self.fixed.keys() & self.law.amplitudes.keys():
            exponent, column = self.law.amplitudes[name]
            p[name] = self.fixed[name] * np.exp(-p[exponent] * math.log(self.units[column]))
        return p

    def params(self, theta: np.ndarray) -> dict:
        """Parameters as a law states them; complex where theta is."""
        p = self.scaled(theta)
        with np.errstate(all="ignore"):  # where an exponent runs off, so does its amplitude, which is for the caller
            for name, (exponent, column) in self.law.amplitudes.items():
                p[name] = np.exp(np.log(p[name]) + p[exponent] * math.log(self.units[column]))
        return {name: self.fixed.get(name, p[name]) for name in self.law.params}

    def log_predict(self, theta: np.ndarray) -> np.ndarray:
        return np.log(self.law.loss(self.scaled(theta), self.x))

    def jacobian(self, theta: np.ndarray) -> np.ndarray:
        """Of the log prediction, a column a coordinate; exact, by a complex step."""
        return complex_step(lambda t: self.log_predict(t[..., None]), theta).T

    def residuals(self, theta: np.ndarray) -> np.ndarray:
        return self.log_predict(theta) - self.log_loss

    def objective(self, theta: np.ndarray) -> float:
        return float(huber(self.residuals(theta), self.delta).sum())

    def gradient(self, theta: np.ndarray) -> tuple[float, np.ndarray]:
        r = self.residuals(theta)
        return float(huber(r, self.delta).sum()), self.jacobian(theta).T @ np.clip(r, -self.delta, self.delta)

    def projected(self, p: dict) -> np.ndarray:
        """Coordinates of a guess: its exponents as they are, what is linear solved for."""
        p = self.law.guess({"floor": p.get("E", 0.0) / self.loss.min()} | p, self.x, self.loss)
        logs = {name: math.log(max(p[name], 1e-12)) for name in self.law.params}
        for name in self.fixed.keys() & self.law.amplitudes.keys():
            exponent, column = self.law.amplitudes[name]
            logs[name] = math.log(self.fixed[name]) - p[exponent] * math.log(self.units[column])
        return np.array([logs[name] for name in self.free])

    def starts(self, tries: int) -> list[np.ndarray]:
        """The best of the law's grid, amplitudes solved for, that are not next to a better one."""
        axes = {name: [self.fixed[name]] if name in self.fixed else values for name, values in self.law.grid.items()}
        guesses = [self.projected(dict(zip(axes, values)) | self.fixed) for values in itertools.product(*axes.values())]
        with np.errstate(all="ignore"):
            tried = sorted(((self.objective(theta), theta) for theta in guesses), key=lambda pair: pair[0])
        chosen = []
        for value, theta in tried:
            if np.isfinite(value) and all(np.abs(theta - other).max() > 0.4 for other in chosen):
                chosen.append(theta)
        return chosen[:tries]

    def polish(self, theta: np.ndarray, *, gain: float = 1e-12, rounds: int = 30) -> tuple[float, np.ndarray]:
        """Descend until a whole descent gains less than this share of the objective."""
        with np.errstate(all="ignore"):
            value = self.objective(theta)
            for _ in range(rounds if value > 0 else 0):
                before, (value, theta) = value, self._descend(theta, value, math.sqrt(gain) / 10)
                if not before - value > gain * before or value < EXACT * len(self.loss):
                    break
        return value, theta

    def _descend(self, theta, value, slack):
        basis = self.basis(theta)

        def scaled(z):
            here, slope = self.gradient(theta + basis @ z)
            if not np.isfinite(here) or not np.isfinite(slope).all():
                return 1e10, np.zeros_like(z)
            return here / value, basis.T @ slope / value

        found = minimize(scaled, np.zeros(len(theta)), jac=True, method="BFGS", options={"gtol": slack, "maxiter": 400})
        return (found.fun * value, theta + basis @ found.x) if found.fun < 1 else (value, theta)

    def basis(self, theta: np.ndarray) -> np.ndarray:
        """Steps that change all predictions together by about one residual each: (J'J)^-1/2, far ones shortened."""
        J = self.jacobian(theta)
        if not np.isfinite(J).all():
            return np.eye(len(theta))
        size = np.median(np.abs(self.residuals(theta))) + 1e-9
        _, s, vt = np.linalg.svd(J, full_matrices=False)
        return vt.T * np.minimum(size * math.sqrt(len(J)) / np.maximum(s, 1e-12), 1.0)


def complex_step(function, theta: np.ndarray) -> np.ndarray:
    """Derivatives of an analytic function of coordinates, one a row; the function maps (p, k) to (k, ...)."""
    step = 1e-30
    return np.imag(function(theta[:, None] + 1j * step * np.eye(len(theta)))) / step


def huber(r, delta: float):
    """r^2 / 2, and beyond delta a straight line."""
    if math.isinf(delta):
        return r**2 / 2
    size = np.abs(r)
    return np.where(size <= delta, r**2 / 2, delta * (size - delta / 2))


def log_likelihood(r: np.ndarray, delta: float) -> float:
    """Of residuals under exp(-huber(r) / s) / Z(s), the scale s at its best."""
    n = len(r)
    total = max(float(huber(r, delta).sum()), n * EXACT)
    if math.isinf(delta):
        return -n / 2 * (math.log(2 * math.pi * 2 * total / n) + 1)

    def cost(log_s):
        s = np.exp(log_s)
        edge = delta / np.sqrt(s)  # where the line begins, in standard deviations of the parabola
        centre = math.sqrt(2 * math.pi) * np.sqrt(s) * erf(edge / math.sqrt(2))
        return total / s + n * np.log(centre + 2 * s / delta * np.exp(-(edge**2) / 2))

    grid = np.log(total / n) + np.linspace(-3, 3, 121)
    best = grid[np.argmin(cost(grid))]
    fine = best + np.linspace(-0.05, 0.05, 201)
    return -float(cost(fine).min())


def _distinct(found: list[tuple]) -> list[tuple]:
    """Optima, lowest first, without those that are the same place or a descent that stopped on a slope above one."""
    kept = []
    for value, params, theta in found:
        if np.isfinite(value) and all(np.abs(theta - other).max() > 0.02 for *_, other in kept):
            kept.append((value, params, theta))
    return kept
