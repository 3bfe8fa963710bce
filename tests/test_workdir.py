"""A run's folder has one owner and one config, and a kill, a full disk or a resumed run leaves its records readable."""

import json
import os
import resource
import subprocess
import sys

import numpy as np
import pytest

from lm_jax.config import ConfigError
from lm_jax.workdir import Workdir

CONFIG = {"name": "tiny", "optim": {"lr": 1e-3, "betas": (0.9, 0.95)}}


def test_the_same_config_may_come_back_and_another_is_told_what_differs(tmp_path):
    for _ in range(2):
        run = Workdir(tmp_path / "runs" / "tiny")
        run.open(CONFIG)
        run.close()
    run.metrics.write_text('{"step": 1, "loss": 3.0}\n')
    with pytest.raises(ConfigError, match=r"optim.lr: 0.001 -> 0.002(.|\n)*") as error:
        Workdir(tmp_path / "runs" / "tiny").open(CONFIG | {"optim": {"lr": 2e-3, "betas": (0.9, 0.95)}})
    assert "--workdir" in str(error.value) and "betas" not in str(error.value)
    run.open(CONFIG)  # the refused one holds nothing


def test_a_run_that_ended_before_its_first_step_leaves_the_folder_to_any_config(tmp_path):
    for name in ("mistyped", "mended"):
        run = Workdir(tmp_path)
        run.open({"seed": name})
        run.metrics.touch()
        run.close()
    assert run.read_json("config.json") == {"seed": "mended"}
    (run.checkpoints / "3").mkdir(parents=True)
    with pytest.raises(ConfigError, match="seed: 'mended' -> 'mistyped'"):
        run.open({"seed": "mistyped"})


def test_what_cannot_be_a_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ConfigError, match=f"--workdir={path} cannot be used"):
            Workdir(path).open(CONFIG)


def test_two_trainers_cannot_share_a_folder_and_a_killed_one_lets_go(tmp_path):
    code = ("import sys; from lm_jax.workdir import Workdir; run = Workdir(sys.argv[1]); run.open({'name': 'tiny'})\n"
            "print('open', flush=True); sys.stdin.read()")
    other = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"open\n"
    with pytest.raises(ConfigError, match=f"in use by process {other.pid} on .*--workdir"):
        Workdir(tmp_path).open({"name": "tiny"})
    other.kill()
    other.wait()
    Workdir(tmp_path).open({"name": "tiny"})


def test_a_process_that_only_reads_writes_nothing(tmp_path):
    run = Workdir(tmp_path / "run", writes=False)
    run.open(CONFIG)
    run.write_json("summary.json", {})
    assert run.keep_metrics(0) == (0, 0.0) and not run.path.exists()


def test_records_are_strict_json(tmp_path):
    run = Workdir(tmp_path)
    run.write_json("summary.json", {"loss": np.float32("nan"), "steps": np.int64(3), "list": [float("inf"), 1.5]})
    assert json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail) == {
        "loss": None, "steps": 3, "list": [None, 1.5]}
    assert run.read_json("none.json") is None
    (tmp_path / "config.json").write_text('{"name": ')
    with pytest.raises(ConfigError, match="config.json is no JSON"):
        run.open(CONFIG)


def test_a_full_disk_leaves_the_record_that_was_there(tmp_path):
    run = Workdir(tmp_path)
    run.write_json("summary.json", {"status": "ok"})
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError):
            run.write_json("summary.json", {"text": "x" * 10_000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert run.read_json("summary.json") == {"status": "ok"} and os.listdir(tmp_path) == ["summary.json"]


def test_metrics_end_where_a_run_resumes(tmp_path):
    run = Workdir(tmp_path)
    rows = [{"step": step, "loss": 1.0 / step} for step in range(1, 8)] + [{"step": 4, "tag": "en", "val_loss": 2.0}]
    whole = "".join(json.dumps(row) + "\n" for row in rows)
    for cut in ('{"step": 8, "lo', '{"step": 3}', "\x00\x00", "17\n"):  # the second would be whole, but for its end
        run.metrics.write_text(whole + cut)
        assert run.keep_metrics(5)[0] == 3
        assert [json.loads(line) for line in run.metrics.read_text().splitlines()] == rows[:5] + rows[7:]
    assert run.keep_metrics(5)[0] == 0
    assert run.keep_metrics(5, evaluated=3)[0] == 1
    assert [json.loads(line) for line in run.metrics.read_text().splitlines()] == rows[:5]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]
