"""Fits as records: what law.json says of each law, of the approaches by valleys, and of a prediction."""

import math
from collections.abc import Mapping

import numpy as np

from lm_jax.errors import ConfigError
from lm_jax.scaling import checks, compare, envelope, fitting, intervals, valleys
from lm_jax.scaling.checks import Refused
from lm_jax.scaling.fitting import Fit
from lm_jax.scaling.laws import LAWS, Law
from lm_jax.scaling.table import Table

TWO = ("N", "D")


def study(table: Table, *, level: float = intervals.LEVEL, draws: int = intervals.DRAWS,
          delta: float = fitting.HUBER, chosen: str = "chinchilla",
          settings: Mapping[str, Mapping] | None = None) -> tuple[dict[str, Fit], dict]:
    """Every law that the table carries, as (fits, record); the record of law.json, without predictions.

    Laws are of the ends of runs, the best of each grid of learning rates. The `chosen` law has `draws` of each
    resampling, the others a tenth, and FEWEST. `settings` {law: {"fixed": ..., "start": ..., "within": ...}} go to
    `fitting.fit`. Laws refused are in the record with their reason. Raises Refused where no law is left.
    """
    checks.comparable(table)
    if draws and draws < intervals.FEWEST:
        raise ConfigError(f"{draws} draws tell no interval: pass --draws=0 for none, {intervals.FEWEST} or more for a "
                          f"spread, {intervals.DRAWS} for the ends of a 95 % interval")
    ends, rng = table.finals().tuned(), np.random.default_rng(0)
    few = min(draws, max(draws // 10, intervals.FEWEST))
    fits, laws, refused = {}, {}, {}
    for name, law in LAWS.items():
        asked = dict((settings or {}).get(name, {}), delta=delta)
        try:
            checks.enough(law, ends, asked.get("fixed") or ())
            found = fitting.fit(law, ends.columns, ends.loss, **asked)
            checks.settled(found)
        except Refused as reason:
            refused[name] = str(reason)
            continue
        fits[name] = found
        with np.errstate(all="ignore"):  # a form that does not suit runs off to infinity, which its intervals say
            laws[name] = describe(fits[name], ends, rng, level=level, draws=draws if name == chosen else few,
                                  settings=asked)
    if not fits:
        raise Refused(f"{table.source} carries no law: " + "; ".join(f"{k}: {v}" for k, v in refused.items()))
    approaches, not_followed = by_valleys(table, rng, level=level)
    return fits, {"source": table.source, "digest": table.digest, "rows": len(ends), "notes": list(ends.notes),
                  "conventions": {"N": table.params_convention, "C": table.flops_convention, "loss": table.unit},
                  "level": level, "estimator": estimator(delta), "laws": laws, "approaches": approaches,
                  "refused": refused | not_followed}


def describe(fit: Fit, table: Table, rng: np.random.Generator, *, level: float, draws: int, settings: dict) -> dict:
    """All that is known of one fit. `interval` is the profile's; `intervals` has those of resampling too."""
    law = fit.law
    measured = {name: (lambda p, name=name: p[name]) for name in fit.free}
    if carries_allocation(law) and "beta" in law.params:  # with one exponent for both it is one half
        measured["allocation_exponent"] = lambda p: compare.allocation_exponent(law, p)
    samples = {"rows": intervals.rows(fit, rng, draws=draws)} if draws else {}
    for unit, column in (("sizes", "N"), ("seeds", "seed")):
        if draws and column in table and len(np.unique(table[column])) >= (5 if unit == "sizes" else 3):
            samples[unit] = intervals.groups(fit, table[column], rng, draws=draws)
    found = {"profile": {name: intervals.profile(fit, q, level=level) for name, q in measured.items()}}
    for unit, drawn in samples.items():
        found[unit] = {name: intervals.percentiles([q(p) for p in drawn], level=level) for name, q in measured.items()}
    errors = dict(zip(measured, delta_errors(fit, measured)))
    if draws:
        errors = {name: intervals.spread([q(p) for p in samples["rows"]]) for name, q in measured.items()}
    rolling = compare.rolling(law, table, **settings)
    return {"formula": law.formula, "source": law.source, "conventions": table.conventions, "params": fit.params,
            "fixed": fit.fixed, "stderr": errors, "interval": found["profile"], "intervals": found, "level": level,
            "derived": {name: q(fit.params) for name, q in measured.items() if name not in fit.params},
            "coordinates": list(fit.free), "covariance": fit.covariance().tolist(),
            "objective": fit.objective, "aic": fit.aic, "r2": fit.r2, "points": fit.n,
            "holdout_error": rolling["error"], "holdout": rolling["cuts"],
            "largest_budget": compare.largest(law, table, **settings),
            "minima": [{"objective": value, "params": params} for value, params in fit.minima[:5]],
            "warnings": checks.warnings(fit, found["profile"]) + checks.cautions(table)}


def delta_errors(fit: Fit, measured: Mapping) -> list[float]:
    """Standard errors by the delta method, from the sandwich."""
    covariance, problem = fit.covariance(), fit.problem()
    slopes = [fitting.complex_step(lambda t, q=q: q(problem.params(t)), fit.theta) for q in measured.values()]
    variances = [slope @ covariance @ slope for slope in slopes]
    return [math.sqrt(v) if 0 <= v < math.inf else math.inf for v in variances]


def by_valleys(table: Table, rng: np.random.Generator, *, level: float) -> tuple[dict, dict]:
    """Approaches 1 and 2 by each curve, laws of learning rate and batch, and what is refused of them."""
    ends, tuned = table.finals(), table.finals().tuned()
    jobs = {f"approach_1_{method}": (lambda method=method: envelope.envelope(table, rng, method=method))
            for method in valleys.METHODS}
    jobs |= {f"approach_2_{method}": (lambda method=method: valleys.isoflop(tuned, rng, method=method))
             for method in valleys.METHODS}
    jobs |= {f"{dial}_along_{along}": (lambda dial=dial, along=along: valleys.dial(ends, dial, along, rng))
             for dial in ("lr", "batch") for along in TWO}
    found, refused = {}, {}
    for name, job in jobs.items():
        try:
            t = job()
        except Refused as reason:
            refused[name] = str(reason)
        else:
            found[name] = {"factor": t.factor, "exponent": t.exponent, "interval": t.interval(level=level),
                           "stderr": float(np.std(t.draws[:, 1], ddof=1)), "method": t.method,
                           "valleys": [vars(v) for v in t.valleys], "warnings": list(t.refused)}
            found[name] |= {"curves": t.curves} if t.curves else {}
    return found, refused


def predict(fit: Fit, table: Table, compute: float, *, level: float) -> dict:
    """The best N and D at a budget under one law, and their loss, each with its interval."""
    law, k = fit.law, compare.per_product(table)
    quantities = {"N": lambda p: compare.allocation(law, p, compute, k)[0],
                  "D": lambda p: compare.allocation(law, p, compute, k)[1],
                  "loss": lambda p: law.loss(p, dict(zip(TWO, compare.allocation(law, p, compute, k))))}
    quantities["tokens_per_param"] = lambda p: quantities["D"](p) / quantities["N"](p)
    beyond = compute / table["C"].max()
    return {"compute": compute, "law": law.name, "conventions": table.conventions, "level": level,
            "times_largest_run": float(beyond)} | {
        name: {"value": float(q(fit.params)), "interval": intervals.profile(fit, q, level=level)}
        for name, q in quantities.items()}


def estimator(delta: float) -> str:
    return "least squares on log loss" if math.isinf(delta) else f"Huber, delta {delta:g}, on log loss, summed"


def carries_allocation(law: Law) -> bool:
    return set(TWO) <= set(law.exponents) and "U" not in law.reads


def best_loss(fit: Fit, table: Table, compute: float) -> float:
    """The loss of a law's own allocation."""
    N, D = compare.allocation(fit.law, fit.params, compute, compare.per_product(table))
    return float(fit.law.loss(fit.params, {"N": N, "D": D}))
