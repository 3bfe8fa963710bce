"""Points of a sweep, as a config file's `get_points(c)` returns them: flat overrides, {"model.depth": 2, "seed": 1}.

Makers take the base config and models (settings, as `ladder.shape` gives them); the rest takes points and gives more:

    grid.seeds(grid.isoflop(c, models, (1e17, 3e17, 1e18)), 3)
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from lm_jax import optim
from lm_jax.config import ConfigError
from lm_jax.scaling import ladder, records
from lm_jax.scaling.ladder import RULES, Rules

Points = list[dict]


def axis(key: str, values: Iterable) -> Points:
    """One key over its values."""
    return [{key: value} for value in values]


def product(*axes: Sequence[dict]) -> Points:
    """Every combination of a point from each axis; where two say the same key, the later one decides."""
    return [{key: value for part in parts for key, value in part.items()} for parts in itertools.product(*axes)]


def seeds(points: Points, count: int) -> Points:
    """Each point with seeds 0, 1, ..."""
    return product(points, axis("seed", range(count)))


def tokens(c, models: Sequence[dict], amounts: Iterable[float], *, rules: Rules = RULES) -> Points:
    """N x D: every model on every number of tokens."""
    return [ladder.point(c, model, tokens=amount, rules=rules) for model in models for amount in amounts]


def branches(c, models: Sequence[dict], amounts: Iterable[float], *, rules: Rules = RULES) -> Points:
    """N x D on one trunk a model: wsd runs that go on from each other, each amount of tokens with its own cool-down.

    Rate, batch, decay and warm-up are those of the model's longest run, so that all runs are one until a cool-down
    begins (Hägele et al. 2024). ConfigError for a cool-down that would leave loss to lose, or begins in the warm-up.
    """
    points, amounts = [], sorted(amounts)
    if not amounts:
        raise ConfigError("branches without amounts: name the tokens that each ends at, as in (1e6, 2e6, 4e6)")
    for model in models:
        longest = ladder.point(c, model, tokens=amounts[-1], rules=rules) | {"optim.schedule": "wsd"}
        o = replace(ladder.sized(c, model).optim, schedule="wsd", warmup=longest["optim.warmup"])
        for amount in amounts:
            steps = max(1, round(amount / amounts[-1] * longest["train.steps"]))
            if optim.trunk(o, steps) <= o.warmup:
                raise ConfigError(f"a branch of {steps} steps cools down before the trunk's warm-up of {o.warmup} "
                                  "steps is over: take more tokens, or a shorter warm-up")
            if records.flags({"optim": vars(o), "train": {"steps": steps}}, "ok"):
                raise ConfigError(f"a branch of {steps} steps that cools down over {o.decay:.0%} of them to "
                                  f"{o.floor:.0%} of the rate is under-cooled: raise optim.decay (0.2) or lower "
                                  "optim.floor")
            points.append(longest | {"train.steps": steps})
    return points


def overtrained(c, models: Sequence[dict], ratios: Iterable[float], *, rules: Rules = RULES) -> Points:
    """Every model on so many tokens for each of its parameters; 20 is about optimal, hundreds suit serving."""
    return [ladder.point(c, model, tokens=ratio * ladder.counts(ladder.sized(c, model))["total"], rules=rules)
            for model in models for ratio in ratios]


def isoflop(c, models: Sequence[dict], budgets: Iterable[float], *, between: tuple[float, float] = (2, 200),
            rules: Rules = RULES) -> Points:
    """Every model at every budget of FLOPs, steps following; but for those whose tokens a parameter are not `between`
    two numbers, which are far from any valley's bottom. ConfigError for a budget that is left with none."""
    points = []
    for budget in budgets:
        kept = []
        for model in models:
            run = ladder.sized(c, model)
            amount = budget / ladder.flops_per_token(run)
            if between[0] <= amount / ladder.counts(run)["total"] <= between[1]:
                kept.append(ladder.point(c, model, tokens=amount, rules=rules))
        if not kept:
            raise ConfigError(f"isoflop: no model has {between[0]:g} to {between[1]:g} tokens a parameter at "
                              f"{budget:g} FLOPs: change the models or the budget, or widen between=")
        points += kept
    return points


def epochs(c, models: Sequence[dict], corpora: Mapping[str, float], passes: Iterable[float], *, rules: Rules = RULES
           ) -> Points:
    """Data-constrained: every model on every corpus {data.sources: its tokens}, so many times over."""
    return [ladder.point(c, model, tokens=unique * times, rules=rules) | {"data.sources": sources}
            for model in models for sources, unique in corpora.items() for times in passes]


def rates(points: Points, factors: Iterable[float]) -> Points:
    """Each point with its learning rate times each factor; weight decay stays."""
    return [point | {"optim.lr": float(f"{_of(point, 'optim.lr') * factor:.4g}")}
            for point in points for factor in factors]


def batches(points: Points, factors: Iterable[float]) -> Points:
    """Each point with its batch times each factor, on the same number of tokens; the learning rate stays."""
    found = []
    for point, factor in itertools.product(points, list(factors)):
        rows = _of(point, "train.batch") * factor
        if rows < 1 or rows != int(rows):
            raise ConfigError(f"train.batch={_of(point, 'train.batch')} times {factor:g} is no whole number of rows")
        steps, warmup = (math.ceil(_of(point, key) / factor) for key in ("train.steps", "optim.warmup"))
        found.append(point | {"train.batch": int(rows), "train.steps": steps, "optim.warmup": warmup})
    return found


def _of(point: dict, key: str):
    if key not in point:
        raise ConfigError(f"a point without {key} cannot be scaled ({point}): make it with grid.tokens, isoflop, "
                          "overtrained or epochs, or say the key")
    return point[key]
