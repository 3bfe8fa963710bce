"""Runs that a budget is best spent on: the variance promised is the one that comes true, and beats other choices."""

import numpy as np
import pytest

from lm_jax import fit as program
from lm_jax.errors import ConfigError
from lm_jax.scaling import compare, fitting, planner, study, table
from lm_jax.scaling.laws import LAWS

TRUE = {"E": 1.7, "A": 400.0, "B": 400.0, "alpha": 0.34, "beta": 0.28}
NOISE, TARGET = 3e-3, 1e23


def runs(points, rng):
    """A table of the law's losses at (N, D), with noise."""
    points = np.array(points, float)
    loss = LAWS["chinchilla"].loss(TRUE, {"N": points[:, 0], "D": points[:, 1]})
    loss = loss * np.exp(NOISE * rng.standard_normal(len(loss)))
    rows = [{"N": n, "D": d, "loss": value, "run": i} for i, ((n, d), value) in enumerate(zip(points, loss))]
    return table.from_rows(list(enumerate(rows)))


def fitted(runs):
    return fitting.fit(LAWS["chinchilla"], runs.columns, runs.loss, delta=np.inf, tries=2)


def predicted(fit):
    N, D = compare.allocation(fit.law, fit.params, TARGET)
    return float(np.log(fit.predict({"N": N, "D": D})))


POINTS = [(n, d) for n in np.geomspace(1e7, 1e9, 6) for d in np.geomspace(1e9, 3e10, 5)]


@pytest.fixture(scope="module")
def first():
    known = runs(POINTS, np.random.default_rng(0))
    return known, fitted(known)


def test_the_noise_of_a_run_is_found(first):
    assert planner.noise(first[1]) == pytest.approx(NOISE, rel=0.4)


def test_planned_runs_fit_the_budget_and_beat_the_same_compute_spent_otherwise(first):
    known, fit = first
    plan = planner.plan(fit, known, target=TARGET, budget=2e20)
    assert plan.flops <= 2e20 and plan.runs and plan.after < plan.before
    errors = [plan.before, *(run.stderr for run in plan.runs), plan.next.stderr]
    assert errors == sorted(errors, reverse=True), "no run makes a prediction worse"
    rng, J = np.random.default_rng(1), lambda points: planner.gradients(fit, np.array(points))
    (g,) = J([compare.allocation(fit.law, fit.params, TARGET)])
    choices = planner.grid(known)
    for _ in range(20):
        spent, made, C = 0.0, 0, planner.doubt(fit)
        for i in rng.permutation(len(choices)):
            cost = 6 * np.prod(choices[i])
            if spent + cost <= 2e20 and made < 20:
                spent, made, C = spent + cost, made + 1, planner._known(C, J([choices[i]])[0], planner.noise(fit))
        assert plan.after < np.sqrt(g @ C @ g)


def test_what_is_promised_comes_true(first):
    """The scatter of predictions refitted with the planned runs, over tables with new noise."""
    known, fit = first
    plan = planner.plan(fit, known, target=TARGET, budget=2e20, most=6)
    more = [(run.N, run.D) for run in plan.runs]
    again = [predicted(fitted(runs(points, np.random.default_rng(seed)))) for points in (POINTS, POINTS + more)
             for seed in range(24)]
    before, after = np.std(again[:24], ddof=1), np.std(again[24:], ddof=1)
    scale = NOISE / plan.noise  # the fit's own guess of the noise is one draw too
    assert before == pytest.approx(plan.before * scale, rel=0.45)
    assert after == pytest.approx(plan.after * scale, rel=0.45) and after < before


def test_a_budget_may_be_said_in_chip_hours(first):
    known, fit = first
    asked = lambda *flags: study.recommended({"chinchilla": fit}, known, program.parse(["fit", "runs.jsonl", *flags]))
    plan = asked("--predict=1e23", "--next=100h", "--chip=v5e", "--mfu=0.5")
    assert plan == asked("--predict=1e23", f"--next={100 * 3600 * 0.5 * 197e12}")
    for flags, said in ((("--next=1e20",), "pass --predict"), (("--predict=1e23", "--next=soon"), "as in 100h")):
        with pytest.raises(ConfigError, match=said):
            asked(*flags)


def test_a_budget_that_buys_nothing_is_told(first):
    with pytest.raises(ConfigError, match="the cheapest"):
        planner.plan(first[1], first[0], target=TARGET, budget=1e15, candidates=[(1e9, 1e9)])
