"""Training curves beside a table: smoothed, a shared trunk once; approach 1 takes of them what is converged."""

import json

import numpy as np
import pytest
from test_laws import TRUE

from lm_jax.scaling import curves, envelope, table, valleys
from lm_jax.scaling.checks import Refused
from lm_jax.scaling.laws import additive

TOKENS = 2e7  # of a step
GAP = 0.2  # of loss, that a cool-down gains


def run(folder, N: float, D: float, schedule: str, *, seed: int = 0, noise: float = 0.0) -> dict:
    """A run's folder and its record: cosine falls all the way, wsd over the last fifth of the run."""
    steps = round(D / TOKENS)
    tokens = TOKENS * np.arange(1, steps + 1)
    share = np.arange(1, steps + 1) / steps
    above = np.cos(np.pi / 2 * share) if schedule == "cosine" else np.clip((1 - share) / 0.2, 0, 1)
    rng = np.random.default_rng([round(N), seed])
    loss = additive(TRUE, {"N": N, "D": tokens}) + GAP * above + noise * rng.standard_normal(10**5)[:steps]
    name = f"N{N:.0f}-D{D:.0f}-{seed}"
    (folder / "points" / name).mkdir(parents=True)
    rows = [{"step": i + 1, "loss": value, "tokens": tokens[i]} for i, value in enumerate(loss)]
    rows.insert(steps // 2, {"step": steps // 2, "tag": "validation", "val_loss": 99.0, "loss": 99.0, "tokens": 1})
    (folder / "points" / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "points" / name / "manifest.json").write_text(json.dumps({"config": {"optim": {"schedule": schedule}}}))
    return {"run": name, "params": N, "tokens": D, "loss": loss[-1], "seed": seed, "flags": []}


def sweep(folder, sizes, lengths, schedule: str, **more) -> table.Table:
    records = [run(folder, N, D, schedule, **more) for N in sizes for D in lengths(N)]
    (folder / "runs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return table.read(folder / "runs.jsonl")


def test_a_smoothed_curve_follows_its_run_and_ignores_evaluations(tmp_path):
    (curve,) = sweep(tmp_path, [1e8], lambda N: [2e10], "cosine", noise=0.02).curves
    true = additive(TRUE, {"N": 1e8, "D": curve.D}) + GAP * np.cos(np.pi / 2 * curve.D / 2e10)
    late = curve.D > 2e9
    assert np.abs(curve.loss - true)[late].max() < 0.02 and np.diff(curve.D).min() > 0
    assert curve.D[0] == pytest.approx(TOKENS) and 0.97 < curve.D[-1] / 2e10 <= 1 and 40 < len(curve.D) < 120
    assert curve.C == pytest.approx(6e8 * curve.D)


def test_a_trunk_that_runs_share_counts_once(tmp_path):
    runs = sweep(tmp_path, [1e8], lambda N: [4e9, 8e9, 1.6e10], "wsd", noise=0.02)
    longest, *branches = sorted(runs.curves, key=lambda curve: -curve.D[-1])
    assert longest.D[0] == pytest.approx(TOKENS)
    for curve, D in zip(branches, (8e9, 4e9)):
        assert curve.D[0] == pytest.approx(0.8 * D, rel=0.02) and curve.D[-1] > 0.97 * D


def test_damaged_rows_are_told_and_a_run_without_a_folder_has_no_curve(tmp_path):
    sweep(tmp_path, [1e8], lambda N: [4e9, 8e9], "cosine")
    first, second = sorted((tmp_path / "points").glob("*/metrics.jsonl"))
    first.write_text(first.read_text() + '{"step": 201, "lo')
    second.unlink()
    runs = table.read(tmp_path / "runs.jsonl")
    assert [curve.run for curve in runs.curves] == [first.parent.name]
    assert any("passed over" in note and f"{first.parent.name} (1)" in note for note in runs.notes)


def test_a_sweep_of_sizes_and_lengths_carries_approach_1_under_any_schedule(tmp_path, rng):
    sizes, lengths = np.geomspace(3e7, 3e9, 9), lambda N: np.geomspace(4e8, 4e10, 6)
    runs = sweep(tmp_path, sizes, lengths, "wsd")
    found = envelope.envelope(runs, rng, draws=20)
    assert "ends" in found.curves and found.exponent == pytest.approx(0.37 / 0.72, abs=0.01)
    bare = table.from_rows([(i, {"N": n, "D": d, "loss": loss}) for i, (n, d, loss) in enumerate(
        zip(runs["N"], runs["D"], runs.loss))])
    assert envelope.envelope(bare, rng, draws=20).exponent == found.exponent, "what is not converged has no part in it"


def test_curves_of_single_runs_carry_it_where_their_rate_falls_all_the_way(tmp_path, rng):
    sizes, lengths = np.geomspace(3e7, 1e9, 7), lambda N: [3e10]
    (tmp_path / "cosine").mkdir()
    found = envelope.envelope(sweep(tmp_path / "cosine", sizes, lengths, "cosine"), rng, draws=20)
    assert "lie above" in found.curves and len(found.valleys) > 2
    (tmp_path / "wsd").mkdir()
    with pytest.raises(Refused, match="inside of 7 training curves, whose learning rate does not fall all the way"):
        envelope.envelope(sweep(tmp_path / "wsd", sizes, lengths, "wsd"), rng)


def test_of_a_size_with_several_runs_the_lowest_counts_at_each_budget(rng):
    N = np.repeat(np.geomspace(3e7, 3e10, 11), 25)
    D = np.tile(np.geomspace(1, 300, 25), 11) * N
    rows = [{"N": n, "D": d, "loss": loss} for n, d, loss in zip(N, D, additive(TRUE, {"N": N, "D": D}))]
    once = [row | {"run": f"{row['N']:.0f}"} for row in rows]
    twice = once + [row | {"run": f"{row['N']:.0f} worse", "loss": row["loss"] + 0.1} for row in rows]
    found = [envelope.envelope(table.from_rows(list(enumerate(each))), rng, draws=5) for each in (once, twice)]
    assert found[0].exponent == found[1].exponent == pytest.approx(0.37 / 0.72, abs=0.01)


def test_valleys_of_a_learning_rate_are_of_one_size_and_length(rng):
    """A rate that only follows size and length, as a ladder has it, has no valley; in a grid every D has its own."""
    sizes, lengths = np.geomspace(1e7, 1e9, 4), np.geomspace(1e9, 1e11, 4)
    N, D, factor = (x.ravel() for x in np.meshgrid(sizes, lengths, [1.0, 2.0, 4.0, 8.0]))
    best = 3.0 * N**-0.4 * (D / 1e10) ** -0.3
    loss = additive(TRUE, {"N": N, "D": D}) + 0.05 * np.log(factor / 3) ** 2
    rows = [{"N": n, "D": d, "loss": y, "lr": lr} for n, d, y, lr in zip(N, D, loss, best * factor)]
    found = valleys.dial(table.from_rows(list(enumerate(rows))), "lr", "N", rng, draws=5)
    assert len(found.valleys) == 16 and found.exponent == pytest.approx(-0.4, abs=1e-3)
    ladder = table.from_rows(list(enumerate(rows))).tuned()
    assert len(ladder) == 16 and "48 rows are of learning rates" in ladder.notes[-1]
    with pytest.raises(Refused, match="0 of 16 profiles"):
        valleys.dial(ladder, "lr", "N", rng)


def test_a_table_without_runs_has_no_curves():
    assert curves.within({"N": np.ones(9), "D": np.arange(1.0, 10)}) == ()
