"""The parts of experiments/scaling_law.py that need no training; CI runs all of it with --quick."""

import functools
import runpy
from pathlib import Path

import numpy as np
import pytest

from lm_jax.config import ConfigError
from lm_jax.data import synthetic
from lm_jax.scaling import ladder, table
from lm_jax.scaling import sweep as sweeps
from lm_jax.scaling.laws import LAWS

FILE = str(Path(__file__).parent.parent / "experiments" / "scaling_law.py")
EXPERIMENT = runpy.run_path(FILE)
NAMES = ("text", "zipf", "text-quick", "zipf-quick")


@functools.cache
def points(name):
    return sweeps.points(f"{FILE}:{name}", EXPERIMENT["get_config"](name))


def place(point, count):
    return ladder.counts(point.planned)[count], point.tokens


def runs(name, *, noise=0.0, **params):
    """A table of a sweep's points whose losses follow Kaplan's law with a floor."""
    count = "non_embedding" if "zipf" in name else "total"
    N, D = np.array(sorted({place(point, count) for point in points(name)})).T
    p = {"E": 2.4, "A": 0.5, "B": 6.0, "alpha": 0.5, "beta": 0.5} | params
    scatter = np.exp(noise * np.random.default_rng(1).standard_normal(len(N)))
    loss = LAWS["kaplan_floor"].loss(p, {"N": N, "D": D}) * scatter
    return table.from_rows([(i, dict(N=n, D=d, C=6 * n * d, loss=y)) for i, (n, d, y) in enumerate(zip(N, D, loss))])


@pytest.mark.parametrize("name", NAMES)
def test_a_sweep_is_sizes_times_amounts_on_one_trunk_a_size(name):
    found = points(name)
    sizes, amounts = (set(values) for values in zip(*(place(point, "total") for point in found)))
    assert (len(sizes), len(amounts)) == ((5, 4) if "quick" in name else (7, 5))
    assert {place(point, "total") for point in found} == {(N, D) for N in sizes for D in amounts}
    shortest = min(point.config.train.steps for point in found)
    assert shortest >= 500
    for point in found:
        c, base = point.config, EXPERIMENT["get_config"](name)
        assert c.optim.lr * c.model.width == pytest.approx(base.optim.lr * base.model.width, rel=1e-3)
        assert (point.begins > 0) == (c.train.steps > shortest)  # it begins as the next shorter one


@pytest.mark.parametrize("name", NAMES)
def test_the_largest_size_and_the_largest_amount_are_held_out(name):
    everything, first = ({point.id: place(point, "total") for point in points(which)}
                         for which in (name, name + "-first"))
    largest, longest = (max(values) for values in zip(*everything.values()))
    assert first == {id: (N, D) for id, (N, D) in everything.items() if N < largest and D < longest}


def test_what_is_held_out_is_predicted():
    everything = runs("zipf-quick", noise=1e-6)
    largest, longest = everything["N"].max(), everything["D"].max()
    first = everything.take((everything["N"] < largest) & (everything["D"] < longest))
    foreseen = EXPERIMENT["predict"](first, "zipf-quick")
    assert foreseen["points"] == 12 and len(foreseen["runs"]) == 8
    for one in EXPERIMENT["held_out"](foreseen, everything):
        assert abs(one["error"]) < 1e-4 and one["low"] <= one["loss"] <= one["high"]


def test_a_known_law_is_found_and_another_is_told_from_it():
    law = synthetic.make("zipf:exponent=1")  # alpha 1/2 of N ~ D², beta 1/2
    judge = lambda **params: {one["name"]: one["inside"] for one in EXPERIMENT["known"](
        law, 2.4, runs("zipf", noise=1e-4, **params))}
    assert judge() == {"alpha": True, "beta": True, "E": True}
    assert not judge(alpha=0.35)["alpha"]
    assert not judge(beta=0.8, B=600.0)["beta"]


def test_every_line_has_its_r2():
    exact, noisy = (EXPERIMENT["along"](runs("text", noise=noise)) for noise in (0.0, 0.03))
    assert [len(exact[letter]) for letter in "ND"] == [5, 7]
    assert min(one["r2"] for one in exact["N"]) > 0.999 > min(one["r2"] for one in noisy["N"])


def test_a_name_that_is_no_sweep_says_which_there_are():
    with pytest.raises(ConfigError, match="text or zipf"):
        EXPERIMENT["get_config"]("markov")
    with pytest.raises(ConfigError, match="quick"):
        EXPERIMENT["get_config"]("text-fast")
