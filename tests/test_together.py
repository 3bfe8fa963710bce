"""Points that share a program or a trunk come out as they would alone, whatever stops them meanwhile."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import jax
import numpy as np
import pytest
from test_sweep import read

from lm_jax import devices, update
from lm_jax import together as program
from lm_jax.clock import Clock
from lm_jax.errors import ConfigError
from lm_jax.measure import stacked as measured
from lm_jax.preflight import topology
from lm_jax.recipes import run
from lm_jax.scaling import abreast, records, sweep, together, watch
from lm_jax.scaling import points as scaling_points
from lm_jax.workdir import Workdir

WSD = "[{{'optim.schedule': 'wsd', 'optim.decay': 0.3, 'train.steps': s, 'seed': k}} for s in {} for k in {}]".format


def losses(folder):
    rows = map(json.loads, (folder / "metrics.jsonl").open())
    return np.array([row["loss"] if row["loss"] is not None else np.nan for row in rows if "tag" not in row])


def alone(point, folder) -> dict:
    """The summary of a point trained by itself, on one device as stacks are."""
    workdir = Workdir(folder)
    with Clock() as clock:
        summary, _ = run.train(run.opened(point.config, workdir, clock), workdir, clock, {})
    workdir.close()
    return summary


def stacked(points, out) -> list[dict]:
    members = []
    with Clock() as clock:
        for point in points:
            workdir = Workdir(out / point.id)
            members.append(together.Member(run.opened(point.config, workdir, clock), workdir))
        found = together.train(members, clock, {})
    for member in members:
        member.workdir.close()
    return found


@pytest.mark.parametrize("way", (abreast.Stacked, abreast.Spread), ids=lambda way: way.__name__)
def test_each_loss_curve_is_the_single_runs(tmp_path, monkeypatch, way):
    monkeypatch.setattr(abreast, "begin", way)
    varied = ("[{'seed': 0}, {'seed': 1, 'optim.lr': 1e-2}, {'optim.weight_decay': 0.7}, {'model.init_std': 0.1}]")
    points, _ = read(tmp_path, varied, "--config.train.steps=40", "--config.train.eval_every=25")
    found = stacked(points, tmp_path / "stack")
    for point, summary in zip(points, found):
        single = alone(point, tmp_path / "alone" / point.id)
        both = [losses(tmp_path / way / point.id) for way in ("stack", "alone")]
        assert len(both[0]) == 40
        np.testing.assert_allclose(*both, rtol=1e-5)
        assert summary["val_loss"] == pytest.approx(single["val_loss"], rel=1e-5)
        assert (summary["tokens"], summary["flops"], summary["steps"]) == (
            single["tokens"], single["flops"], single["steps"])
        files = [{path.name for path in (tmp_path / way / point.id).iterdir()} for way in ("stack", "alone")]
        assert files[1] - files[0] <= {"plots", "phases.json"} and not files[0] - files[1]
    assert len({summary["val_loss"] for summary in found}) == 4, "they are four runs"


@pytest.mark.parametrize("way", (abreast.Stacked, abreast.Spread), ids=lambda way: way.__name__)
def test_a_run_that_diverges_ends_alone(tmp_path, monkeypatch, way):
    made = []
    monkeypatch.setattr(abreast, "begin", lambda *a, **more: made.append(way(*a, **more)) or made[-1])
    points, _ = read(tmp_path, "[{'seed': 0}, {'optim.lr': 1e30}]", "--config.train.steps=60",
                     "--config.train.checkpoint_every=10")
    fine, wild = stacked(points, tmp_path)
    steps = [int(state.step) for state in made[0].states()]
    assert steps == [60, 10 if way is abreast.Spread else 60], "one program makes all of them, a thread only its own"
    assert wild["status"] == "diverged" and 4 <= wild["steps"] < 60 and "val_loss" not in wild
    assert len(losses(tmp_path / points[1].id)) == wild["steps"]
    assert fine["status"] == "ok" and fine["steps"] == 60
    assert fine["val_loss"] == pytest.approx(alone(points[0], tmp_path / "alone")["val_loss"], rel=1e-5)


def test_runs_of_a_stack_go_back_as_they_would_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("LM_JAX_FAULTS", ",".join(f"nan@step={step}" for step in (13, 14, 16, 17)))  # each time again
    points, _ = read(tmp_path, "[{'seed': 0}, {'seed': 1}]", "--config.train.checkpoint_every=10",
                     "--config.optim.eps=2e-8", "--config.train.steps=20")
    for summary in (*stacked(points, tmp_path), alone(points[0], tmp_path / "alone")):
        assert summary["status"] == "diverged" and summary["rollbacks"] == 3 * [{"from": 17, "to": 10}]
    both = [losses(tmp_path / points[0].id)[:12], losses(tmp_path / "alone")[:12]]
    np.testing.assert_allclose(*both, rtol=1e-5)


def test_trunks_and_stacks_go_on_where_they_were_stopped_and_are_charged_once(tmp_path):
    points, argv = read(tmp_path, WSD((40, 70), (0, 1)), "--config.train.checkpoint_every=10")
    out = tmp_path / "out"
    (job,) = sweep.jobs(points, {point.id for point in points}, argv, out)
    assert job.argv[:3] == ("python", "-m", "lm_jax.together") and set(job.points) == {p.id for p in points}
    command = [sys.executable, *job.argv[1:]]
    one = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    first = subprocess.Popen(command, env=one, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    longer = out / "points" / points[2].id / "metrics.jsonl"
    deadline = time.time() + 120
    while not (longer.exists() and '"step": 32,' in longer.read_text()):
        assert time.time() < deadline and first.poll() is None, first.communicate()[0]
        time.sleep(0.01)
    first.send_signal(signal.SIGTERM)
    said = first.communicate()[0]
    assert first.returncode in (0, 75), said  # 0: the last steps were on their way
    again = subprocess.run(command, env=one, text=True, capture_output=True)
    assert again.returncode == 0, again.stderr
    found, _ = records.rebuild(out, {})
    for point in points:
        assert found[point.id]["flops"] == pytest.approx(point.flops)
        assert found[point.id]["flops_spent"] == pytest.approx(point.flops * point.own)
    alone(points[2], tmp_path / "alone")
    np.testing.assert_allclose(losses(out / "points" / points[2].id), losses(tmp_path / "alone"), rtol=1e-5)
    short, long = (losses(out / "points" / points[i].id) for i in (0, 2))
    trunk = points[2].begins
    assert 20 < trunk < 30 and points[2].sibling == points[0].id and not points[0].begins
    np.testing.assert_array_equal(short[:trunk], long[:trunk])
    assert short[-1] != long[39]


def test_runs_on_several_cores_are_each_the_run_that_it_would_be_on_one(monkeypatch):
    c = measured.config(5e4, vocab=64, length=16, batch=2)
    configs = [replace(c, seed=seed) for seed in range(3)]
    two = lambda seed: jax.tree.map(lambda *a: np.concatenate(a), measured.batch(c, seed), measured.batch(c, seed + 1))
    calls = [{r: two(10 * r + i) for r in range(3) if r < 2 or i < 4} for i in (0, 2, 4)]  # the last has ended by then
    found = []
    for cores in (1, 3):
        monkeypatch.setattr(devices, "cores", lambda: cores)
        runs = abreast.Spread(configs, measured.begun(c, 3), room=2)
        sent = [runs.advance(rows, of=20, count=2) for rows in calls]  # the next before the last are made
        found.append(([runs.metrics(one) for one in sent], jax.tree.leaves(runs.states())))
        assert [int(state.step) for state in runs.states()] == [6, 6, 4]
    assert [list(one) for one in found[0][0]] == [[0, 1, 2], [0, 1, 2], [0, 1]]
    assert found[0][0][0][2]["loss"].shape == (2,)
    jax.tree.map(np.testing.assert_array_equal, *found)


@pytest.mark.parametrize("way", (abreast.Stacked, abreast.Spread), ids=lambda way: way.__name__)
def test_runs_of_one_shape_are_one_program(monkeypatch, way):
    abreast._one_step.cache_clear()  # or it is known from other tests
    traced = []
    monkeypatch.setattr(abreast.update, "make_step", lambda *a, make=update.make_step, **more:
                        traced.append(a) or make(*a, **more))
    c, counts = measured.config(5e4, vocab=68, length=16, batch=2), []
    for std, of in ((0.02, 20), (0.1, 30)):  # the first run's own, which its state knows
        one = replace(c, seed=of, model=replace(c.model, init_std=std))
        runs = way([one] * 2, measured.begun(one, 2), room=2)
        runs.metrics(runs.advance(dict.fromkeys(range(2), measured.batch(c)), of=of, count=1))
        assert [state.model.cfg.init_std for state in runs.states()] == [std, std], "each gets its own back"
        counts.append(len(traced))
    assert counts[0] == counts[1] > 0


def test_a_damaged_member_or_trunk_costs_no_other_point_anything(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    points, _ = read(tmp_path, WSD((20, 30), (0, 1)))
    out = tmp_path / "out"
    broken = out / "points" / points[1].id
    broken.mkdir(parents=True)
    (broken / "config.json").write_text('{"name": ')
    (broken / "metrics.jsonl").write_text("{}\n")
    ended = dict(zip((point.id for point in points[:2]), scaling_points.trained(points[:2], out, stack=True)))
    assert "ok" in ended.values() and any(isinstance(one, ConfigError) for one in ended.values())
    assert "config.json is no JSON" in capsys.readouterr().out
    (trunk,) = (out / "points" / points[0].id / "checkpoints").glob(str(points[2].begins))
    file = max((path for path in trunk.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1])
    assert scaling_points.trained(points[2:3], out, stack=True) == ["ok"]
    assert "begins at its first step" in capsys.readouterr().out
    summary = json.loads((out / "points" / points[2].id / "summary.json").read_text())
    assert summary["flops_spent"] == summary["flops"]


def test_points_share_a_command_only_where_their_numbers_stay(tmp_path):
    points, argv = read(tmp_path, WSD((40, 70), (0, 1)) + " + [{'seed': 2}, {'seed': 3}, {'model.depth': 2}]")
    jobs = lambda left=points, **more: sweep.jobs(points, {point.id for point in left}, argv, tmp_path, **more)
    split = lambda **more: sorted(len(job.points) for job in jobs(**more))
    assert split() == [1, 2, 4], "a trunk's lengths, and seeds of one length; not another model"
    assert split(stacked=0) == [1, 1, 1, 2, 2], "without stacks there are still trunks"
    assert split(least=4) == [1, 1, 1, 2, 2], "where more could be at work, stacks are cut"
    long = next(point for point in points if point.begins)
    (rest,) = jobs([long])
    assert rest.argv[2] == "lm_jax.together" and rest.points == (long.id,)
    assert rest.id in {job.id for job in jobs()}, "a job keeps its name, whatever of it is done"
    assert [job.minutes for job in jobs(minutes=3) if len(job.points) == 4] == [6], "once a length"
    assert watch.spent(points) < sum(point.flops for point in points)
    prices = sweep.Prices(topology.parse("v5e-1"))
    assert prices.hours(long) == pytest.approx(prices.forecast(long).hours * (70 - long.begins))
    staged, _ = read(tmp_path, "[{'optim.schedule': 'wsd', 'train.steps': s, 'data.weights': ((0.0, 1.0), (0.5, 1.0))}"
                     " for s in (40, 70)]")
    assert not any(point.begins for point in staged), "stages are shares of a run's length"


def test_a_point_that_the_config_does_not_have_is_told(tmp_path):
    (point,), argv = read(tmp_path, "[{'seed': 0}]")
    with pytest.raises(ConfigError, match=f"no point cafe; it has {point.id}"):
        program.main(["together", argv[1], f"--out={tmp_path}", "--points=cafe"])
    with pytest.raises(ConfigError, match="pass --out"):
        program.main(["together", argv[1]])


def test_threads_end_with_their_runs_and_do_nothing_more():
    c = measured.config(5e4, vocab=64, length=16, batch=2)
    runs = abreast.Spread([c], measured.begun(c, 1), room=2)
    runs.close()
    with pytest.raises(RuntimeError, match="shutdown"):
        runs.threads[0].submit(print)
