"""Sweeps: points checked and named before they run, run once, and recorded from what they left."""

import copy
import io
import json
import types

import numpy as np
import pytest
import rich.console

from lm_jax import command, config
from lm_jax import sweep as program
from lm_jax.errors import ConfigError, DataError
from lm_jax.launchers.local import Pool
from lm_jax.preflight import topology
from lm_jax.scaling import conduct, records, sweep, table, watch

CONFIG = """
from lm_jax import config
from lm_jax.scaling import grid

def get_config():
    c = config.default()
    c.name = "little"
    c.model.update(dict(width=32, depth=1, heads=2, head_size=16, hidden=64, dtype="float32"))
    c.data.update(dict(tokenizer="byte", length=32, sources="markov:documents=300,length=31", root={root!r}))
    c.train.update(dict(steps=6, batch=8, eval_every=100, checkpoint_every=100))
    c.optim.warmup = 2
    return c

def get_points(c):
    return {points}
"""


def written(tmp_path, points: str):
    path = tmp_path / "little.py"
    path.write_text(CONFIG.format(root=str(tmp_path / "data"), points=points))
    return path


def read(tmp_path, points: str, *flags):
    """The points of a config file that returns `points`, and the arguments that ask for it."""
    path = written(tmp_path, points)
    argv = ["sweep", f"--config={path}", *flags]
    return sweep.points(str(path), command.parse(argv, doc="")[1].config), argv


def test_what_does_not_decide_the_numbers_does_not_name_a_point(tmp_path):
    one, _ = read(tmp_path, "[{'optim.lr': 1e-3, 'seed': 1}]")
    free = ("train.eval_every", 7), ("data.root", "elsewhere"), ("mesh.data", 2), ("model.remat", "full")
    for key, value in free:
        again, _ = read(tmp_path, f"[{{'optim.lr': 1e-3, 'seed': 1, {key!r}: {value!r}}}]")
        assert again[0].id == one[0].id, key
    others = [read(tmp_path, f"[{{'optim.lr': {lr}, 'seed': {seed}}}]")[0][0].id for lr, seed in ((1e-4, 1), (1e-3, 2))]
    longer = read(tmp_path, "[{'optim.lr': 1e-3, 'seed': 1}]", "--config.train.steps=7")[0][0].id
    assert len({one[0].id, *others, longer}) == 4 and len(one[0].id) == 12


def test_all_points_that_cannot_run_are_told_at_once_and_so_are_equal_ones(tmp_path):
    bad = ("[{'optim.lr': 1e-3}, {'optim.lrr': 1}, {'seed': 1, 'train.steps': 'many'}, {'optim.lr': 0.001},"
           "{'seed.x': 1}]")
    with pytest.raises(ConfigError) as error:
        read(tmp_path, bad)
    said = str(error.value)
    assert "unknown key optim.lrr: did you mean optim.lr?" in said and "point 2" in said
    assert "train.steps='many': wanted int" in said and "seed has no keys of its own" in said
    assert "points 1 and 4 are the same run: {'optim.lr': 0.001} and {'optim.lr': 0.001}" in said
    with pytest.raises(ConfigError, match="points 1 and 2 are the same run"):
        read(tmp_path, "grid.product(grid.axis('model.remat', ('none', 'full')))")
    with pytest.raises(ConfigError, match="a list of dicts"):
        read(tmp_path, "{'optim.lr': 1}")
    with pytest.raises(ConfigError, match="has no get_points"):
        sweep.points("configs/tiny.py", config.default())


def test_a_points_command_makes_exactly_its_config(tmp_path):
    """Base flags are passed on, but for those that the point overrides; every type finds its way through a shell."""
    every = ("[{'optim.lr': 1, 'model.tied': False, 'optim.betas': (0.8, 0.9), 'data.epochs': (2.0,),"
             "'model.norm': 'layer', 'train.steps': 9}]")
    points, argv = read(tmp_path, every, "--config.train.steps=7", "--config.optim.eps",
                        "1e-9", "--config.data.epochs=()")
    (job,) = sweep.jobs(points, {points[0].id}, argv, tmp_path / "out", minutes=3)
    assert job.argv[:3] == ("python", "-m", "lm_jax.train") and "--config.train.steps=7" not in job.argv
    parsed, values = command.parse(list(job.argv[2:]), doc="")
    assert parsed == points[0].config and parsed.optim.eps == 1e-9 and parsed.data.epochs == (2.0,)
    assert values.workdir == str(tmp_path / "out/points" / job.id) and job.minutes == 3
    numpy = sweep.resolved(values.config, {"optim.lr": np.float64(1.0), "seed": np.int64(3)})
    assert type(numpy.config.seed) is int


def test_points_that_do_not_fit_are_refused_before_anything_runs(tmp_path):
    points, _ = read(tmp_path, "[{'seed': 0}, {'seed': 1}, {'model.hidden': 2**25}]")
    prices = sweep.Prices(topology.parse("v5e-1"))
    with pytest.raises(ConfigError, match="does not fit") as error:
        prices.refuse(points)
    assert points[2].id in str(error.value) and points[0].id not in str(error.value)
    assert len(prices.seen) == 2, "points of one model and batch are forecast once"
    assert prices.dollars(points[0]) > 0 and prices.hours(points[0]) == prices.hours(points[1])


MANIFEST = {"config": config.to_dict(config.Config()), "parameters": {"total": 1000, "non_embedding": 600},
            "flops_per_token": 4800.0, "tokenizer": "abc", "data_digest": "def", "code_revision": "123"}
SUMMARY = {"status": "ok", "steps": 10, "tokens": 640, "flops": 1e6, "flops_spent": 1e6,
           "seconds": 2.0, "val_loss": 3.0, "val_loss_stderr": 0.1, "val_bits_per_byte": 1.2, "epochs": 0.5}


def leave(out, name, *, lr=3e-3, schedule="cosine", **summary):
    """The folder of a point that ended."""
    folder = out / "points" / name
    folder.mkdir(parents=True)
    manifest = copy.deepcopy(MANIFEST)
    manifest["config"]["optim"] |= {"lr": lr, "schedule": schedule}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "summary.json").write_text(json.dumps(SUMMARY | summary))
    return folder


def test_records_are_what_a_fit_reads(tmp_path):
    leave(tmp_path, "a")
    leave(tmp_path, "b", tokens=1280, steps=20, flops=2e6, val_loss=2.5)
    leave(tmp_path, "stopped", status="stopped")
    leave(tmp_path, "diverged", status="diverged", val_loss=None, tokens=1)
    failed = leave(tmp_path, "failed", status="stopped")
    failure = {"code": 1, "tries": 3, "why": "exit code 1", "last_line": "no", "log": "points/failed/log.txt"}
    (failed / "failure.json").write_text(json.dumps(failure))
    found, notes = records.rebuild(tmp_path, {"a": {"seed": 4}})
    assert set(found) == {"a", "b", "diverged", "failed"} and notes == []
    assert found["a"]["config"] == {"seed": 4} and found["a"]["batch"] == 64 and found["a"]["flags"] == []
    assert found["diverged"]["flags"] == ["diverged"] and found["failed"]["status"] == "failed"
    runs = table.read(tmp_path / "runs.jsonl")
    assert list(runs["N"]) == [1000, 1000] and list(runs["D"]) == [640, 1280] and list(runs.loss) == [3.0, 2.5]
    assert table.read(tmp_path / "runs.jsonl", params="non_embedding")["N"][0] == 600
    assert table.read(tmp_path / "runs.jsonl", params="effective")["N"][0] == 800
    assert runs.flops_convention == records.CONVENTION and runs.params_convention == "total"


def test_flags_tell_a_run_that_was_not_cooled_and_a_best_rate_at_the_edge(tmp_path):
    for name, lr, loss in (("low", 1e-3, 3.0), ("middle", 2e-3, 2.9), ("high", 4e-3, 2.8)):
        leave(tmp_path, name, lr=lr, val_loss=loss)
    leave(tmp_path, "flat", schedule="constant", tokens=1)
    flags = lambda: {name: record["flags"] for name, record in records.rebuild(tmp_path, {})[0].items()}
    assert flags() == {"low": [], "middle": [], "high": ["edge-of-lr-grid"], "flat": ["under-cooled"]}
    leave(tmp_path, "higher", lr=8e-3, val_loss=3.0)
    assert flags()["high"] == [], "once the grid goes on, its old edge is none"


def test_damaged_records_and_folders_that_are_gone_are_told_and_nothing_is_lost(tmp_path):
    for name in "abc":
        leave(tmp_path, name)
    before, _ = records.rebuild(tmp_path, {})
    file = tmp_path / "runs.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], lines[1], lines[2][:40]]))
    gone = tmp_path / "points" / json.loads(lines[0])["run"]
    for path in gone.iterdir():
        path.unlink()
    gone.rmdir()
    found, notes = records.rebuild(tmp_path, {})
    assert found == before and [json.loads(line) for line in file.read_text().splitlines()] == list(found.values())
    assert any("line 3 of runs.jsonl was half-written" in note for note in notes)
    assert any(f"{gone.name} is gone; its record stays" in note for note in notes)
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(DataError, match="delete it; results stay"):
        records.rebuild(tmp_path, {})
    (tmp_path / "sweep.json").unlink()
    (tmp_path / "points/c/summary.json").write_text('{"status": "ok", "st')
    found, notes = records.rebuild(tmp_path, {})
    assert "c" not in found and any("points/c has a damaged record" in note for note in notes)


def test_a_sweep_runs_its_points_once_and_later_only_what_was_added(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
    out = tmp_path / "out"
    run = lambda *flags: program.main(["sweep", f"--config={tmp_path / 'little.py'}", f"--out={out}", *flags])
    written(tmp_path, "[{'seed': 0}]")
    assert run("--dry_run") == 0 and not out.exists()
    assert "1 of 1 points are to be run" in capsys.readouterr().out
    assert run() == 0
    first = (out / "runs.jsonl").read_text()
    written(tmp_path, "[{'seed': 0}, {'seed': 1}]")
    capsys.readouterr()
    assert run() == 0
    said = capsys.readouterr().out
    assert "1 of 2 points are to be run" in said and "ok: 2 of 2 points have a loss" in said
    lines = (out / "runs.jsonl").read_text().splitlines()
    assert first.strip() in lines and len(lines) == 2
    runs = table.read(out / "runs.jsonl")
    assert list(runs["D"]) == [6 * 8 * 32] * 2 and runs.loss[0] != runs.loss[1] and "epochs" in runs
    monkeypatch.setattr(Pool, "run", lambda *_: pytest.fail("everything has a result"))
    assert run() == 0
    written(tmp_path, "[{'seed': 0}, {'seed': 1}, {'seed': 2}]")
    record = json.loads(lines[0])
    manifest = out / "points" / record["run"] / "manifest.json"
    manifest.write_text(manifest.read_text().replace(record["data_digest"], "other data"))
    with pytest.raises(ConfigError, match="has changed: point .* was trained on other data"):
        run()


def test_a_terminal_sees_what_runs_what_it_came_to_and_how_much_is_done(tmp_path):
    points, _ = read(tmp_path, "[{'seed': 0}, {'seed': 1}, {'seed': 2, 'train.steps': 12}]")
    leave(tmp_path, points[0].id)
    (tmp_path / "points" / points[1].id).mkdir()
    (tmp_path / "points" / points[1].id / "metrics.jsonl").write_text('{"step": 4, "loss": 2.5}\n{"step": 5, "lo')
    console, ended = rich.console.Console(file=io.StringIO(), force_terminal=True, width=100), []
    with watch.Watch(points, tmp_path, console, ended=lambda: ended.append(1)) as show:
        for states in (("running", "waiting", "waiting"), ("ok", "running", "waiting")):
            show(types.SimpleNamespace(states={point.id: state for point, state in zip(points, states)}))
    said = console.file.getvalue()
    for expected in ("loss 3.0000 ± 0.1000", "step 4 of 6 · loss 2.500", "1 of 3 points", "42% of"):
        assert expected in said, said
    assert ended == [1], "records are made anew when a point ends"


def test_flags_that_cannot_be_are_told_with_the_cure(tmp_path):
    written(tmp_path, "[{'seed': 0}]")
    run = lambda *flags: program.main(["sweep", f"--config={tmp_path / 'little.py'}", "--dry_run", *flags])
    for flag, said in (("--launcher=lokal", "did you mean 'local'"), ("--jobs=many", "--jobs=many: a number"),
                       ("--workdir=x", "the folder of a sweep is --out"), ("--topology=v5e", "no number of chips"),
                       ("--launcher=slurm", "on which hardware"),
                       ("--settings=image=x", "does nothing with --launcher=local")):
        with pytest.raises(ConfigError, match=said):
            run(flag)
    with pytest.raises(ConfigError, match="'imagex' is not key=value"):
        conduct.settings("imagex")
    assert conduct.settings("a=1 b='c d' e=x,y=2") == {"a": "1", "b": "c d", "e": "x,y=2"}


def test_a_cluster_gets_only_the_points_that_have_no_result(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    two = "[{'seed': 0}, {'seed': 1, 'model.depth': 2}]"  # which no program can share
    path = written(tmp_path, two)
    done, todo = read(tmp_path, two)[0]
    leave(tmp_path / "out", done.id)
    assert program.main(["sweep", f"--config={path}", f"--out={tmp_path / 'out'}", "--launcher=slurm",
                         "--topology=h100-1", "--dry_run"]) == 0
    said = capsys.readouterr().out
    script = (tmp_path / "sweeps/little/slurm/little.sbatch").read_text()
    assert "1 of 2 points are to be run" in said and "sbatch --array=0-0" in said
    assert todo.id in script and done.id not in script and "--config.seed=1" in script
