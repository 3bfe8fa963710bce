"""Two processes on one machine, joined as the hosts of a pod are: the numbers of one, and one answer to a signal."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parent.parent
HOST = """
import sys
import jax
rank, count, port = map(int, sys.argv[1:4])
if count > 1:
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=count, process_id=rank, initialization_timeout=60)
from lm_jax import errors, train
sys.argv = ["train", *sys.argv[4:]]
errors.run(train.main)
"""
SETTINGS = ("--config=configs/tiny.py", "--config.model.width=32", "--config.model.heads=2", "--config.model.head_size=16",
            "--config.model.hidden=64", "--config.model.depth=1", "--config.data.tokenizer=byte", "--config.data.length=32",
            "--config.data.sources=markov:documents=300,length=31", "--config.optim.warmup=2", "--config.optim.name=adamw")


def start(folder, name, processes, *more):
    """The processes of one run of `train`."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1", "PYTHONPATH": str(ROOT)}
    where = (f"--workdir={folder / name}", f"--config.data.root={folder / 'data'}")
    return [subprocess.Popen([sys.executable, "-c", HOST, str(rank), str(processes), str(port), *SETTINGS, *where, *more],
                             cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            for rank in range(processes)]


def ended(running):
    """Exit codes and outputs."""
    outputs = [process.communicate(timeout=120)[0] for process in running]
    return [process.returncode for process in running], outputs


def losses(folder):
    return {(row["step"], row.get("tag")): row.get("loss", row.get("val_loss"))
            for row in map(json.loads, (folder / "metrics.jsonl").open())}


def test_two_processes_train_as_one_does(tmp_path):
    brief = ("--config.train.steps=6", "--config.train.eval_every=3", "--config.train.checkpoint_every=3")
    codes, outputs = ended(start(tmp_path, "one", 1, *brief))
    assert codes == [0], outputs
    codes, outputs = ended(start(tmp_path, "two", 2, *brief))
    assert codes == [0, 0], outputs
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert two == pytest.approx(one, rel=1e-5) and len(one) == 8
    assert "bits per byte" in outputs[0] and "bits per byte" not in outputs[1], "one process speaks"
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two")]
    assert summaries[1]["val_bits_per_byte"] == pytest.approx(summaries[0]["val_bits_per_byte"], rel=1e-5)


def test_a_signal_to_one_process_stops_both_after_the_same_step_saved(tmp_path):
    running = start(tmp_path, "run", 2, "--config.train.steps=100000", "--config.train.eval_every=100000")
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.time() + 100
    while time.time() < deadline and not (metrics.exists() and '"step": 5,' in metrics.read_text()):
        time.sleep(0.2)
    running[1].send_signal(signal.SIGTERM)
    codes, outputs = ended(running)
    assert codes == [75, 75], outputs
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "stopped"
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [str(summary["steps"])]
