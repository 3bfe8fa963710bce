"""The benchmark measures what it says: its counts are the program's, nothing nominal passes as seen."""

import functools
import json
import os
import pathlib
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm_jax import bench, config
from lm_jax.errors import ConfigError
from lm_jax.measure import (
    entropy,
    figures,
    limits,
    loader,
    ops,
    packing,
    stacked,
    subject,
    timing,
    training,
)
from lm_jax.measure.figures import Figure

ROOT = pathlib.Path(__file__).parent.parent
LIMITS = limits.Limits({"float32": 1e9, "bfloat16": 2e9}, 1e9, ())


def tiny(**changes) -> config.Config:
    c = config.default()
    c.model.update(dict(width=32, depth=2, heads=2, dtype="float32"))
    c.update(dict(data=dict(vocab=384, length=32), train=dict(batch=8), optim=dict(warmup=1)))
    c.update(changes)
    return config.resolve(c)


@pytest.fixture(scope="module")
def measured():
    with subject.opened(tiny()) as it:
        return {figure.name.strip(): figure for figure in training.measured(it, LIMITS, turns=2)}, it.flops


def test_a_training_report_has_every_part_with_its_unit(measured):
    found, work = measured
    units = {"tokens": "tokens/s", "model FLOPs": "FLOP/s", "MFU, measured peak": "%", "forward": "ms",
             "backward": "ms", "optimizer": "ms", "data": "ms", "host gap": "ms", "memory as planned": "GiB",
             "memory as compiled": "GiB"}
    assert {name: found[name].unit for name in units} == units
    assert found["model FLOPs"].value / found["tokens"].value == pytest.approx(work / 256)
    assert not any(figure.nominal for figure in found.values()), "a CPU has no nominal peak: none may be shown"


def test_the_host_s_share_is_measured_of_small_steps():
    with subject.opened(tiny()) as it:
        found = {figure.name.strip(): figure for figure in training.gap(it, turns=1)}
    loop, rest = found["step in the trainer's loop"], ("steps sent at once", "data", "host gap")
    assert loop.value == pytest.approx(sum(found[name].value for name in rest)) and "%" in found["host gap"].how


def test_packing_is_measured_over_rows_of_documents():
    rows = packing.layout(2, 10, documents=3)
    assert rows["segments"][0].tolist() == [1, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert rows["positions"][0].tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, 2]
    with subject.opened(tiny()) as it:
        found = {figure.name.strip(): figure for figure in packing.measured(it, turns=1)}
    assert {"a step, packed", "a step, unpacked", "a layer's attention by blocked, plain"} <= found.keys()
    assert found["packed costs over plain"].unit == "%"


def test_the_costliest_operations_are_told_with_their_limits(measured):
    costly = [figure for name, figure in measured[0].items() if name.startswith("op ")]
    assert len(costly) == 5 and all("at the limit" in figure.how for figure in costly)
    assert [f.value for f in costly] == sorted((f.value for f in costly), reverse=True)


def test_flops_and_bytes_of_operations_are_those_of_the_program():
    f = jax.jit(lambda x, w: jnp.tanh(x @ w) @ w.T)
    text = f.lower(jnp.ones((48, 32)), jnp.ones((32, 64))).compile().as_text()
    known = ops.instructions(text)
    entry = [op for op in known.values() if op.kind in ("dot", "custom-call", "fusion")]
    assert max(op.flops for op in entry) >= 2 * 48 * 32 * 64
    assert max(op.moved for op in entry) >= 4 * (48 * 32 + 32 * 64)


def test_a_profile_knows_the_operations_of_the_program_that_ran():
    f, x = jax.jit(lambda x: jnp.sin(x @ x).sum()), jnp.ones((64, 64))
    names = ops.instructions(f.lower(x).compile().as_text())
    seconds = ops.profiled(lambda: jax.block_until_ready(f(x)))
    assert seconds.keys() & names.keys() and all(s > 0 for name, s in seconds.items() if name in names)


def test_operations_that_are_alike_are_told_together():
    f, x = jax.jit(lambda x, w: functools.reduce(lambda x, w: jnp.tanh(x @ w), w, x)), jnp.ones((64, 64))
    w = list(jax.random.normal(jax.random.key(0), (6, 64, 64)))
    found = ops.costliest(f.lower(x, w).compile(), lambda: jax.block_until_ready(f(x, w)), LIMITS, dtype="float32")
    products = [figure for figure in found if f"{2 * 64**3:.3g} FLOPs" in figure.how]
    assert products and sum(int(figure.name.partition(" × ")[2] or 1) for figure in products) >= 6


def test_limits_are_of_each_dtype_and_way():
    found = limits.measured(shapes=((16, 8, 24),), streamed=2**12, turns=2)
    assert len(found.figures) == len(limits.DTYPES) * len(limits.WAYS) + 1
    assert found.flops.keys() == {"float32", "bfloat16"} and found.memory > 0
    of_float = [figure.value for figure in found.figures if figure.name.startswith("GEMM float32")]
    assert found.flops["float32"] == max(of_float)
    assert found.seconds(3 * found.flops["float32"], 0, "float32") == pytest.approx(3)
    assert found.seconds(0, 2 * found.memory, "float32") == pytest.approx(2)


@pytest.mark.parametrize("way", limits.WAYS)
def test_each_way_is_the_product_that_it_is_named_after(way):
    x_mk, w_kn, y_mn = (np.random.default_rng(0).standard_normal(shape) for shape in ((3, 4), (4, 5), (3, 5)))
    expected = {"x·w": (x_mk, w_kn, x_mk @ w_kn), "dy·wᵀ": (y_mn, w_kn, y_mn @ w_kn.T),
                "xᵀ·dy": (x_mk, y_mn, x_mk.T @ y_mn)}[way]
    got = limits._product(*map(jnp.asarray, expected[:2]), way=way, out="float32")
    np.testing.assert_allclose(got, expected[2], rtol=1e-5)


def test_sides_take_turns_and_each_is_called_as_often():
    called = []
    sides = {name: lambda name=name: called.append(name) for name in "ab"}
    seconds = timing.interleaved(sides, turns=3, warm=1, rest=0)
    assert called == list("ab" + "ab" + "ba" + "ab") and [len(s) for s in seconds.values()] == [3, 3]


def test_what_a_turn_took_is_known_when_the_next_is_interrupted():
    said, calls = [], iter([1, 2, 3])  # a warm-up, and two turns
    with pytest.raises(StopIteration):
        timing.interleaved({"a": lambda: next(calls) and timing.Spent(0.5)}, turns=7, warm=1, say=said.append)
    assert said == ["turn 1 of 7: a 0.5 s", "turn 2 of 7: a 0.5 s"]


def test_a_ratio_is_of_pairs_and_above_one_where_ours_is_faster():
    spent = lambda *seconds: [timing.Spent(s, 2 * s * s) for s in seconds]
    found = timing.times_as_fast("", spent(1.0, 2.0, 4.0), spent(3.0, 2.0, 8.0))
    assert (found.value, found.low, found.high) == (2.0, 1.5, 2.5) and "4.00 by CPU time" in found.how


def test_a_table_says_value_unit_spread_and_what_is_nominal():
    one = figures.rate("GEMM", 2e9, [1e-3, 2e-3, 4e-3], "FLOP/s")
    assert figures.told(one) == "1.00 TFLOP/s"
    page = figures.markdown("limits", [one, Figure("peak", 9.89e14, "FLOP/s", nominal=True)])
    assert "| 1.00 TFLOP/s | 0.75 to 1.50 |" in page and "| 989 TFLOP/s |  | nominal |" in page
    assert json.loads(json.dumps(one.record()))["low"] == 7.5e11
    long = figures.duration("", [timing.Spent(12.0, 9.0)] * 2)
    assert json.loads(json.dumps(long.record()))["value"] == 12 and long.unit == "s"


def test_points_together_make_the_same_steps_as_those_alone():
    c = stacked.config(5e4, vocab=64, length=16, batch=2)
    found = {figure.name: figure for figure in stacked.measured(c, points=2, steps=2, turns=2)}
    assert found["together"].value > 0 and found["one after another"].value > 0
    assert found["together is as fast as one after another, times"].times == 2


def test_the_loader_is_measured_over_its_own_rows():
    rows, batches, larger, _ = loader.measured(tiny(), turns=2)
    assert rows.value == pytest.approx(256 * batches.value) and rows.unit == larger.unit == "tokens/s"
    assert rows.name == "loader, 8 rows of 32" and larger.name == "loader, 64 rows of 512"


def test_the_entropy_of_many_parts_holds_a_chunk_and_not_all():
    found = {f.name: f for f in entropy.measured(vocab=65_536, width=64, rows=4, length=1024)}
    assert found["one chunk of logits"].value < found["all logits"].value
    assert found["temporaries of loss and gradients"].value < found["all logits"].value


def test_flags_say_what_is_wrong_with_them():
    with pytest.raises(ConfigError, match="--turns=0: at least 1"):
        bench.parse(["bench", "--turns=0"])
    assert bench.parse(["bench", "--against=torch"]).parts == []
    assert bench.parse(["bench", "--config=configs/tiny.py"]).parts == ["limits", "training"]
    with pytest.raises(SystemExit):
        bench.parse(["bench", "--parts=limit"])


def test_a_part_of_a_config_wants_one():
    done = run("--parts=loader", "--pages=plain")
    assert done.returncode == 2 and "--config=configs/tiny.py" in done.stderr


def test_help_is_a_table_of_contents_without_jax():
    begun = time.monotonic()
    done = run("--help")
    assert done.returncode == 0 and all(name in done.stdout for name in bench.PARTS | bench.AGAINST)
    assert all(f"{what}\n" in done.stdout and "minutes" in what for what in bench.AGAINST.values())
    assert time.monotonic() - begun < 60
    loaded = subprocess.run([sys.executable, "-c", "import sys, lm_jax.bench; print('jax' in sys.modules)"], cwd=ROOT,
                            capture_output=True, text=True)
    assert loaded.stdout.strip() == "False"


def test_a_whole_benchmark_is_lines_of_json():
    done = run("--parts=loader", "--config=configs/tiny.py", "--turns=1", "--json", "--pages=plain")
    assert done.returncode == 0, done.stderr
    head, part, end = map(json.loads, done.stdout.splitlines())
    assert head["command"].startswith("python -m lm_jax.bench --parts=loader") and head["pages"] == "plain"
    assert part["part"] == "loader" and part["figures"][0]["unit"] == "tokens/s"
    assert end["part"] == "end" and len(end["load"]) == len(head["load"]) == 3


def run(*flags):
    return subprocess.run([sys.executable, "-m", "lm_jax.bench", *flags], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"XLA_FLAGS": ""})
