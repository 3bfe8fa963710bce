"""Tables of runs: anybody's CSV and records are read, what cannot be fitted is refused with its line or its reason."""

import json

import numpy as np
import pytest
from test_laws import TRUE, grid

from lm_jax import fit
from lm_jax.errors import ConfigError, DataError
from lm_jax.scaling import checks, envelope, table, tuning, valleys
from lm_jax.scaling.checks import Refused
from lm_jax.scaling.laws import LAWS, additive

HEADER = "params,tokens,loss"


def write(tmp_path, text: str, name: str = "runs.csv"):
    path = tmp_path / name
    path.write_text(text)
    return path


def rows(x: dict, loss, **more) -> list:
    return [(i + 2, {"N": n, "D": d, "C": c, "loss": l} | {key: value[i] for key, value in more.items()})
            for i, (n, d, c, l) in enumerate(zip(x["N"], x["D"], x["C"], loss))]


def clean(**more) -> table.Table:
    x = grid()
    return table.from_rows(rows(x, additive(TRUE, x), **more))


def test_a_csv_needs_no_flops_and_may_name_columns_its_own_way(tmp_path):
    runs = table.read(write(tmp_path, "N,training_tokens,val_loss\n1e6,2e7,5.0\n2e6,4e7,4.5\n"))
    assert runs["C"].tolist() == [1.2e14, 4.8e14] and runs.flops_convention == "6 N D"


@pytest.mark.parametrize("text, said", [
    (f"{HEADER}\n1e6,2e7,5.0\n1e6,2e\n", "line 3: 2 values for 3 columns"),
    (f"{HEADER}\n1e6,2e7,five\n", "line 2: loss is 'five', not a number"),
    (f"{HEADER}\n1e6,2e7,5.0\n1e6,,5.0\n", "no tokens on lines 3"),
    (f"{HEADER}\n1e6,-4,5.0\n", "tokens is not a positive number on lines 2"),
    (f"{HEADER}\n1e6,2e7,5.0\n1e6,2e7,4.0\n", "lines 2 and 3 are the same point"),
    (f"{HEADER}\n", "no rows"), ("", "no rows"),
    (f"{HEADER},excluded\n1e6,2e7,5.0,1\n", "no row is left"),
])
def test_a_damaged_csv_is_an_error_with_its_line(tmp_path, text, said):
    with pytest.raises(DataError, match=said):
        table.read(write(tmp_path, text))


def test_unknown_and_missing_columns_name_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match="unknown column 'parms', is it 'params'"):
        table.read(write(tmp_path, "parms,tokens,loss\n1,2,3\n"))
    with pytest.raises(ConfigError, match="no column for D"):
        table.read(write(tmp_path, "params,loss\n1,2\n"))
    assert len(table.read(write(tmp_path, "params,tokens,loss,mine\n1,2,3,4\n"), ignore=("mine",))) == 1


def test_the_same_point_twice_counts_once_and_seeds_are_two_points(tmp_path):
    twice = table.read(write(tmp_path, f"{HEADER}\n1e6,2e7,5.0\n1e6,2e7,5.0\n"))
    assert len(twice) == 1 and "1 rows say what another said" in twice.notes[0]
    assert len(table.read(write(tmp_path, f"{HEADER},seed\n1e6,2e7,5.0,0\n1e6,2e7,5.1,1\n"))) == 2


@pytest.mark.parametrize("line, said", [('{"params": 1e6, "tok', "line 2 is half-written"),
                                        ("{}", "line 2 is no record"), ("[1]", "line 2 is no record"),
                                        ('{"params": {"total": 1}, "tokens": 2, "loss": 3}', "no count 'active'")])
def test_a_damaged_record_is_an_error_with_its_line(tmp_path, line, said):
    good = json.dumps({"params": {"active": 1e6, "total": 2e6}, "tokens": 2e7, "loss": 5.0, "whatever": [1]})
    with pytest.raises(ConfigError, match=said):
        table.read(write(tmp_path, f"{good}\n{line}\n", "runs.jsonl"), params="active")


def test_records_say_which_parameters_they_count_and_failed_runs_are_told(tmp_path):
    records = [{"params": {"total": 2e6, "non_embedding": 1e6}, "tokens": 2e7, "loss": 5.0, "status": "ok"},
               {"params": {"total": 2e6, "non_embedding": 1e6}, "tokens": 3e7, "loss": None, "status": "diverged"}]
    path = write(tmp_path, "".join(json.dumps(r) + "\n" for r in records), "runs.jsonl")
    runs = table.read(path, params="non_embedding")
    assert runs["N"].tolist() == [1e6] and runs.params_convention == "non_embedding"
    assert "1 rows left out" in runs.notes[0] and "lines 2" in runs.notes[0]


def test_runs_that_cannot_be_compared_are_refused():
    n = len(clean())
    for name in ("tokenizer", "params_convention", "flops_convention", "code_revision", "data_digest"):
        with pytest.raises(Refused, match=name):
            checks.comparable(clean(**{name: ["a"] * 3 + ["b"] * (n - 3)}))
    x = grid()
    with pytest.raises(Refused, match="not a positive number on lines 4"):
        checks.comparable(table.from_rows(rows(x, np.where(np.arange(n) == 2, np.nan, 3.0))))
    mixed = x | {"C": np.where(np.arange(n) < n // 2, x["C"], 1.3 * x["C"])}
    with pytest.raises(Refused, match="two conventions are mixed"):
        checks.comparable(table.from_rows(rows(mixed, additive(TRUE, x))))
    checks.comparable(clean())


def test_too_few_points_and_a_fixed_ratio_are_refused():
    runs = clean()
    with pytest.raises(Refused, match="5 parameters and there are 4 different points"):
        checks.enough(LAWS["chinchilla"], runs.take(np.arange(4)))
    with pytest.raises(Refused, match="at least 3 values of D"):
        checks.enough(LAWS["chinchilla"], runs.take(runs["D"] < 2e9))
    N = np.geomspace(1e7, 1e9, 9)
    ratio = {"N": N, "D": 20 * N, "C": 120 * N**2}
    with pytest.raises(Refused, match="they rise together"):
        checks.enough(LAWS["chinchilla"], table.from_rows(rows(ratio, additive(TRUE, ratio))))
    with pytest.raises(Refused, match="needs U"):
        checks.enough(LAWS["data_constrained"], runs)


@pytest.mark.parametrize("loss, said", [((1, 2, 3, 2.1, 1), "concave"), ((5, 4, 3.2, 2.6, 2.2), "outside"),
                                        ((3.0, 3.05, 3.2, 3.2, 2.9), "concave|edge|outside"), ((3, 2, 3), "takes 4")])
def test_a_valley_without_a_bottom_is_refused(loss, said):
    with pytest.raises(Refused, match=said):
        valleys.minimum(np.geomspace(1, 100, len(loss)), np.array(loss, float))


@pytest.mark.parametrize("method", valleys.METHODS)
def test_every_curve_finds_the_bottom_of_a_parabola(method):
    x = np.geomspace(1, 100, 9)
    best, low = valleys.minimum(x, 2 + 0.1 * (np.log(x) - np.log(8)) ** 2, method=method)
    assert best == pytest.approx(8, rel=0.05) and low == pytest.approx(2, abs=3e-3)


def isoflop(rng, noise: float) -> table.Table:
    C = np.repeat(np.geomspace(1e18, 1e21, 5), 7)
    a, G = 0.37 / 0.72, (0.35 * 480 / (0.37 * 2100)) ** (1 / 0.72)
    N = G * (C / 6) ** a * np.tile(np.geomspace(0.25, 4, 7), 5)
    x = {"N": N, "D": C / 6 / N, "C": C}
    return table.from_rows(rows(x, additive(TRUE, x) * np.exp(noise * rng.standard_normal(len(N)))))


def curves(rng, noise: float) -> table.Table:
    N, points = np.geomspace(3e7, 3e10, 11), 25
    run = np.repeat(np.arange(11), points)
    x = {"N": N[run], "D": np.tile(np.geomspace(1, 300, points), 11) * N[run]}
    x["C"] = 6 * x["N"] * x["D"]
    return table.from_rows(rows(x, additive(TRUE, x) * np.exp(noise * rng.standard_normal(11))[run], run=run))


@pytest.mark.parametrize("approach, made", [(valleys.isoflop, isoflop), (envelope.envelope, curves)])
def test_intervals_of_approaches_1_and_2_hold_the_truth_as_often_as_they_say(approach, made):
    rng, held = np.random.default_rng(2), 0
    for _ in range(30):
        low, high = approach(made(rng, 0.002), rng, draws=50).interval(level=0.9)
        held += low <= 0.37 / 0.72 <= high
    assert held >= 22  # a binomial of 30 at 0.9 is below once in 500 times


def test_valleys_are_of_runs_that_do_not_repeat_their_data(rng):
    runs = isoflop(rng, 0.001)
    mixed = {name: np.tile(runs[name], 2) for name in ("N", "D", "C")}
    loss = np.concatenate([runs.loss, runs.loss + 0.2 * (runs["D"] / 1e10) ** 0.3])
    U = np.concatenate([runs["D"], runs["D"] / 20])
    both = table.from_rows(rows(mixed, loss, U=U, run=np.arange(len(loss))))
    assert valleys.isoflop(both, rng, draws=5).valleys == valleys.isoflop(runs, rng, draws=5).valleys


def test_runs_between_two_budgets_do_not_make_one_of_them():
    C = np.concatenate([np.full(7, 1e20), np.full(7, 2e20), 1e20 * 2 ** np.linspace(0.1, 0.9, 8)])
    found = valleys.budgets(C)
    assert len(set(found[:7])) == len(set(found[7:14])) == 1
    assert found[0] == pytest.approx(1e20, rel=0.1) and found[7] == pytest.approx(2e20, rel=0.1)


def test_a_best_learning_rate_and_its_law(rng):
    N = np.repeat(np.geomspace(1e6, 1e8, 4), 7)
    lr = 3.0 * N**-0.4 * np.tile(np.geomspace(0.2, 5, 7), 4)
    loss = 3 + 0.05 * np.log(lr / (3.0 * N**-0.4)) ** 2 + 0.002 * rng.standard_normal(28)
    runs = table.from_rows(rows({"N": N, "D": 20 * N, "C": 120 * N**2}, loss, lr=lr))
    law = valleys.dial(runs, "lr", "N", rng)
    assert law.exponent == pytest.approx(-0.4, abs=0.05) and law.interval()[0] < -0.4 < law.interval()[1]
    with pytest.raises(Refused, match="no column 'batch'"):
        valleys.dial(runs, "batch", "N", rng)


def test_the_critical_batch_of_known_noise(rng):
    draw = lambda B: (1.0 + rng.standard_normal((400, 50)) * np.sqrt(20 / B)) ** 2
    found = tuning.noise_scale(8, 256, draw(8).sum(1), draw(256).sum(1), rng)
    assert found.interval[0] < 20 < found.interval[1] and found.batch == pytest.approx(20, rel=0.1)
    with pytest.raises(Refused, match="must be positive"):
        tuning.noise_scale(8, 256, [1.0, 1.1], [1.0, 1.2], rng)


def test_the_main_fits_predicts_and_writes_a_record(tmp_path, capsys, rng):
    x = grid()
    loss = additive(TRUE, x) * np.exp(0.002 * rng.standard_normal(len(x["N"])))
    text = "".join(f"{n},{d},{l}\n" for n, d, l in zip(x["N"], x["D"], loss))
    path = write(tmp_path, f"{HEADER}\n{text}")
    assert fit.main(["fit", str(path), "--predict=1e22", "--draws=0", f"--out={tmp_path}"]) == 0
    record = json.loads((tmp_path / "law.json").read_text())
    for found in record["laws"].values():
        assert {"params", "stderr", "interval", "objective", "aic", "holdout_error", "warnings"} <= found.keys()
    assert min(record["laws"], key=lambda name: record["laws"][name]["aic"]) in ("chinchilla", "overtrained")
    low, high = record["predict"][0]["loss"]["interval"]
    assert low < record["predict"][0]["loss"]["value"] < high
    shown = capsys.readouterr().out
    assert "6 N D" in shown and "refused: data_constrained" in shown
