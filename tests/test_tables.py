"""Tables of runs: anybody's CSV and records are read, what cannot be fitted is refused with its line or its reason."""

import json
import re
import warnings

import numpy as np
import pytest
from test_laws import TRUE, grid

from lm_jax import fit
from lm_jax.errors import ConfigError, DataError
from lm_jax.scaling import checks, envelope, fitting, report, results, table, tuning, valleys
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


@pytest.mark.parametrize("count", (1, 3, 6))
def test_a_few_rows_end_in_a_sentence_or_in_numbers(count, tmp_path, capsys, monkeypatch):
    """No traceback, no warning of numpy's, and nothing that is not a number, however little there is to fit."""
    monkeypatch.setattr(report, "write", lambda folder, *a, **k: folder / "report.html")  # is tested where it is drawn
    rng = np.random.default_rng(count)
    x = {"N": np.geomspace(1e7, 1e9, count), "D": 10 ** rng.uniform(8.5, 10.5, count)}
    loss = additive(TRUE, x) * np.exp(0.003 * rng.standard_normal(count))
    text = "".join(f"{n},{d},{l}\n" for n, d, l in zip(x["N"], x["D"], loss))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            fit.main(["fit", str(write(tmp_path, f"{HEADER}\n{text}")), "--draws=0", f"--out={tmp_path}"])
        except ConfigError as error:
            assert count < 4 and "carries no law" in str(error)
        else:
            assert "nan" not in capsys.readouterr().out.replace("nats", "")


def test_losses_without_an_error_and_losses_that_are_all_alike(tmp_path):
    x = grid(3, 3)
    exact = table.from_rows(rows(x, additive(TRUE, x)))
    for delta in (fitting.HUBER, np.inf):
        assert np.isfinite(fitting.fit(LAWS["chinchilla"], exact.columns, exact.loss, delta=delta).aic)
    with pytest.raises(Refused, match="the loss is 3 in every run"):
        results.study(table.from_rows(rows(x, np.full(9, 3.0))), draws=0)


@pytest.mark.parametrize("flag, said", [
    ("--draws=15", "15 draws tell no interval"), ("--level=1.5", "--level=1.5: a number from"),
    ("--predict=-1", "--predict=-1: a number from"), ("--mfu=0", "--mfu=0: a number from"),
    ("--fix=alpha=x", "'x' is no number"), ("--fix=alpha=-1", "parameters are positive"),
    ("--start=alpha=0.3", "a start has all parameters")])
def test_flags_that_cannot_be_are_refused(flag, said, tmp_path):
    x = grid(3, 3)
    text = "".join(f"{n},{d},{l}\n" for n, d, l in zip(x["N"], x["D"], additive(TRUE, x)))
    with pytest.raises(ConfigError, match=re.escape(said)):
        fit.main(["fit", str(write(tmp_path, f"{HEADER}\n{text}")), flag, f"--out={tmp_path}"])


@pytest.mark.parametrize("raw, said", [
    (b"params,tokens,lo\xdf\n1,2,3\n", "no text in UTF-8"),
    (b"params;tokens;loss\n1;2;3\n", "separate columns by commas"),
    (b"params,tokens,loss,lr\n1e6,2e7,5.0,\n1e6,3e7,5.0,1e-3\n", "no lr on lines 2.*--ignore=lr"),
    (b"params,tokens,loss,lr\n1e6,2e7,5.0,0\n", "lr is not a positive number on lines 2")])
def test_what_is_no_table_is_said(raw, said, tmp_path):
    path = tmp_path / "runs.csv"
    path.write_bytes(raw)
    with pytest.raises(ConfigError, match=said):
        table.read(path)


def test_marks_and_line_ends_of_other_systems_are_read_and_a_missing_last_one_is_told(tmp_path):
    path = tmp_path / "runs.csv"
    for text in (f"\ufeff{HEADER}\n1e6,2e7,5.0\n\n", f"{HEADER}\r\n1e6,2e7,5.0\r\n"):
        path.write_bytes(text.encode())
        assert table.read(path).loss.tolist() == [5.0] and not table.read(path).notes
    path.write_bytes(f"{HEADER}\n1e6,2e7,5.012\n1e6,4e7,4.".encode())
    assert "no line break ends line 3" in table.read(path).notes[0]


def test_flagged_runs_are_left_out_by_reason_and_an_edge_of_a_grid_is_told(tmp_path):
    x = grid(4, 3)
    records = [{"params": n, "tokens": d, "loss": l, "seed": 0, "flags": ["edge-of-lr-grid"] if i < 2 else []}
               for i, (n, d, l) in enumerate(zip(x["N"], x["D"], additive(TRUE, x)))]
    records += [dict(records[0], loss=None, status="diverged"), dict(records[1], loss=9.0, flags=["under-cooled"]),
                {"status": "failed", "flags": ["failed"], "loss": None}]
    text = "".join(json.dumps(record) + "\n" for record in records)
    runs = table.read(write(tmp_path, text, "runs.jsonl"))
    assert len(runs) == 12
    for line, why in ((13, "diverged"), (14, "under-cooled"), (15, "failed")):
        assert f"1 rows left out, {why}: lines {line}" in runs.notes
    assert len(table.read(tmp_path / "runs.jsonl", where={"seed": "0"})) == 12
    found = fitting.fit(LAWS["power_D"], runs.columns, runs.loss)
    said = results.describe(found, runs, np.random.default_rng(0), level=0.9, draws=0, settings={})["warnings"]
    assert any("2 of 12 runs have their best" in line for line in said)


def test_corpora_of_different_sizes_are_told_and_others_refused():
    x, n = grid(), len(clean())
    digests = np.where(np.arange(n) % 2, "small", "large").tolist()
    epochs = x["D"] / np.where(np.arange(n) % 2, 1e9, 1e11)
    checks.comparable(runs := clean(data_digest=digests, epochs=epochs))
    assert any("2 corpora, of 1e+09, 1e+11 tokens" in line for line in checks.cautions(runs))
    with pytest.raises(Refused, match="data_digest"):
        checks.comparable(clean(data_digest=digests, epochs=x["D"] / 1e9))
