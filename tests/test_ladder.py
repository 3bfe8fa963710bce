"""Sizes by one dial, hyperparameters that follow them, and grids of points."""

import pytest

from lm_jax import config
from lm_jax.config import ConfigError
from lm_jax.models import flops
from lm_jax.scaling import grid, ladder


def base(**model):
    c = config.default()
    c.model.update({"depth": 2, "width": 128, "heads": 8, "head_size": 16} | model)
    c.data.tokenizer, c.data.length = "byte", 64
    c.train.steps, c.train.batch, c.optim.warmup = 1000, 16, 50
    return c


def run(c, point):
    """What a point makes of a config."""
    values = c.to_dict()
    for key, value in point.items():
        *section, leaf = key.split(".")
        (values[section[0]] if section else values)[leaf] = value
    return config.from_dict(values)


def test_the_base_itself_is_a_point_that_changes_nothing():
    c = base()
    point = ladder.point(c, {}, tokens=1000 * 16 * 64)
    assert run(c, point) == config.resolve(c)


def test_standard_rates_fall_with_width_and_mup_leaves_them_to_the_optimizer():
    wider = {"width": 512, "heads": 32}
    for name, power in (("adamw", 1), ("muon", 0.5)):
        c = base()
        c.optim.name = name
        moved = ladder.point(c, wider, tokens=1000 * 16 * 64)
        assert moved["optim.lr"] == pytest.approx(c.optim.lr / 4**power, rel=1e-3)
        decay = moved["optim.weight_decay"] * moved["optim.lr"]
        assert decay == pytest.approx(c.optim.weight_decay * c.optim.lr, rel=1e-3)
    mup = ladder.point(base(base_width=128), wider, tokens=1000 * 16 * 64)
    assert (mup["optim.lr"], mup["optim.weight_decay"]) == (3e-3, 0.1)


def test_longer_runs_take_larger_batches_lower_rates_and_the_same_share_of_decay_and_warm_up():
    c = base()
    longer = ladder.point(c, {}, tokens=64 * 1000 * 16 * 64)
    assert longer["train.batch"] == 16 * 8  # 64^0.47 = 7.1, in powers of two
    assert longer["train.steps"] == 8000 and longer["optim.warmup"] == 400
    assert longer["optim.lr"] == pytest.approx(3e-3 * 8**0.5 * 64**-0.32, rel=1e-3)
    averaged = longer["optim.lr"] * longer["optim.weight_decay"] * longer["train.steps"]
    assert averaged == pytest.approx(3e-3 * 0.1 * 1000, rel=1e-3)
    still = ladder.point(c, {}, tokens=64 * 1000 * 16 * 64, rules=ladder.STILL)
    assert (still["train.batch"], still["optim.lr"]) == (16, 3e-3)


def test_a_muP_ladder_keeps_the_head_size_and_both_grow_by_one_dial():
    plain = [ladder.shape(base(), depth) for depth in (1, 2, 4, 8)]
    mup = [ladder.shape(base(base_width=128), depth) for depth in (1, 2, 4, 8)]
    assert len({m["head_size"] for m in plain}) > 1 and {m["head_size"] for m in mup} == {16}
    for ladder_ in (plain, mup):
        sizes = [ladder.counts(ladder.sized(base(), m))["non_embedding"] for m in ladder_]
        assert sizes == sorted(sizes) and sizes[-1] > 100 * sizes[0]
        assert all(m["width"] == m["heads"] * m["head_size"] for m in ladder_)


def test_parameters_are_counted_under_three_conventions():
    c = ladder.sized(base(), {})
    n = ladder.counts(c)
    table = c.model.vocab * 128
    assert n["total"] - n["non_embedding"] == table
    norms = 128 * 5  # two a layer and the last: they multiply no matrix
    pairs = 2 * 8 * 16 * 2 * (64 + 1) / 2  # q k and p v, numbers a token, over two layers
    assert n["effective"] == pytest.approx(n["total"] - norms + pairs)


def test_points_of_one_budget_have_its_flops_whatever_their_size():
    c = base()
    models = [ladder.shape(c, depth) for depth in (1, 2, 4)]
    points = grid.isoflop(c, models, (1e14, 4e14), between=(1, 1e5))
    assert len(points) == 6
    for point, budget in zip(points, [1e14] * 3 + [4e14] * 3):
        r = ladder.sized(c, {k.removeprefix("model."): v for k, v in point.items() if k.startswith("model.")})
        spent = point["train.steps"] * point["train.batch"] * flops.train(r.model, 64)
        assert spent == pytest.approx(budget, rel=0.02)
    assert len(grid.isoflop(c, models, (1e14,), between=(1, 1000))) == 2
    with pytest.raises(ConfigError, match="no model has 1000 to 1001 tokens"):
        grid.isoflop(c, models, (1e14,), between=(1000, 1001))


def test_branches_are_one_run_until_a_cool_down_begins():
    c = base()
    models = [ladder.shape(c, depth) for depth in (1, 2)]
    points = grid.branches(c, models, (4e6, 1e6, 2e6))
    assert len(points) == 6
    for three in (points[:3], points[3:]):
        apart = {key for key in three[0] if len({point[key] for point in three}) > 1}
        assert apart == {"train.steps"} and three[0]["optim.schedule"] == "wsd"
        assert [p["train.steps"] / three[2]["train.steps"] for p in three] == pytest.approx([0.25, 0.5, 1], rel=0.01)
    for key, value, said in (("decay", 0.04, "is under-cooled"), ("floor", 0.3, "is under-cooled"),
                             ("warmup", 900, "before the trunk's warm-up")):
        other = base()
        other.optim[key] = value
        with pytest.raises(ConfigError, match=said):
            grid.branches(other, models, (1e6, 2e6))


def test_grids_multiply():
    c = base()
    models = [ladder.shape(c, depth) for depth in (1, 2)]
    points = grid.tokens(c, models, (1e6, 2e6, 4e6))
    assert len(grid.seeds(points, 2)) == 12 and {p["seed"] for p in grid.seeds(points, 2)} == {0, 1}
    assert [p["train.steps"] * p["train.batch"] * 64 for p in points[:3]] == pytest.approx([1e6, 2e6, 4e6], rel=1e-2)
    tuned = grid.rates(grid.batches(points[:1], (0.5, 2)), (0.5, 1, 2))
    assert len({(p["train.batch"], p["optim.lr"]) for p in tuned}) == 6
    assert all(p["train.steps"] * p["train.batch"] == pytest.approx(1e6 / 64, rel=0.02) for p in tuned)
    four, hundred = grid.overtrained(c, models[:1], (4, 100))
    seen = lambda p: p["train.steps"] * p["train.batch"]
    assert seen(hundred) / seen(four) == pytest.approx(25, rel=0.02)
    again = grid.epochs(c, models[:1], {"text:half/*.txt": 1e6, "text:all/*.txt": 2e6}, (1, 4))
    assert {(p["data.sources"], round(seen(p) * 64 / 1e5)) for p in again} == {
        ("text:half/*.txt", 10), ("text:half/*.txt", 40), ("text:all/*.txt", 20), ("text:all/*.txt", 80)}
    with pytest.raises(ConfigError, match="no whole number of rows"):
        grid.batches(points[:1], (0.3,))
    with pytest.raises(ConfigError, match="without optim.lr"):
        grid.rates([{"seed": 1}], (2,))
    with pytest.raises(ConfigError, match="widht.*did you mean model.width"):
        ladder.point(c, {"widht": 3}, tokens=1e6)
