"""Every number that is logged is a record on disk, whoever watches; what is not known is left out, never guessed."""

import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from lm_jax import plots
from lm_jax.config import ConfigError
from lm_jax.log import Log, peak_memory
from lm_jax.workdir import Workdir


def test_rows_are_flat_strict_json_on_disk_at_once(tmp_path):
    run = Workdir(tmp_path)
    log = Log(run, steps=2)
    log.row(1, {"loss": jnp.float32(2.5), "tokens": np.int64(10)})
    log.row(2, {"loss": float("nan"), "tokens": 20})
    log.evaluation(2, "stdlib", {"val_loss": 2.25, "tokens": 20})
    rows = [json.loads(line, parse_constant=pytest.fail) for line in run.metrics.read_text().splitlines()]
    assert rows == [{"step": 1, "loss": 2.5, "tokens": 10}, {"step": 2, "loss": None, "tokens": 20},
                    {"step": 2, "tag": "stdlib", "val_loss": 2.25, "tokens": 20}]
    log.close()


def test_without_a_terminal_the_first_and_the_last_step_are_plain_lines(tmp_path, capsys):
    log = Log(Workdir(tmp_path), steps=100)
    for step in range(1, 101):
        log.row(step, {"loss": 3.0, "tokens_per_second": 1_234_567.0, "mfu": 0.417, "data_wait_fraction": 0.02})
    log.say("[bold]said[/bold]")
    log.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 1/100 · loss 3.000 · 1.2M tokens/s · MFU 42% · wait 2% · left ")
    assert lines[1].startswith("step 100/100") and lines[2:] == ["[bold]said[/bold]"]


def test_a_process_that_does_not_write_is_silent(tmp_path, capsys):
    log = Log(Workdir(tmp_path / "run", writes=False), steps=1, loggers="wandb")
    log.row(1, {"loss": 3.0})
    log.say("hello")
    log.close()
    assert capsys.readouterr().out == "" and not (tmp_path / "run").exists()


@pytest.mark.parametrize("extra, package", [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_logger_without_its_package_says_what_to_install(tmp_path, monkeypatch, extra, package):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(ConfigError, match=rf"{package}: pip install 'lm_jax\[{extra}\]'"):
        Log(Workdir(tmp_path), steps=1, loggers=extra)


def test_tensorboard_gets_every_number(tmp_path):
    pytest.importorskip("tensorboardX")
    log = Log(Workdir(tmp_path), steps=1, loggers="tensorboard")
    log.row(1, {"loss": 2.5, "accuracy": None})
    log.evaluation(1, "stdlib", {"val_loss": 2.25})
    log.close()
    events = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert b"train/loss" in events and b"stdlib/val_loss" in events and b"accuracy" not in events


def test_memory_is_counted_in_bytes():
    assert 10e6 < peak_memory()["host_memory_peak"] < 1e12


@pytest.mark.parametrize("steps, tags", [(300, ["en", "zh"]), (1, []), (0, ["en"])])
def test_a_picture_can_be_drawn_of_any_run(tmp_path, steps, tags):
    run = Workdir(tmp_path)
    log = Log(run, steps=steps)
    for step in range(1, steps + 1):
        log.row(step, {"loss": np.nan if step == 7 else 2 + 5 / step, "tokens": step * 1000})
    for tag in tags:
        log.evaluation(steps, tag, {"val_loss": 2.1, "val_loss_stderr": 0.1, "tokens": steps * 1000})
    log.close()
    assert plots.loss_curve(run).read_bytes().startswith(b"\x89PNG")


def test_the_moving_mean_skips_what_is_not_finite():
    loss = np.array([5.0, 1.0, np.nan, 3.0, 4.0, 5.0])
    np.testing.assert_allclose(plots._smooth(loss, 1), [5.0, 3.0, 2.0, 3.5, 4.0, 4.5])
