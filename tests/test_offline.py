"""No network is needed: what a user runs runs where there is none but the machine itself."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
ALONE = ("unshare", "-rn", "sh", "-c", 'ip link set lo up 2>/dev/null; exec "$@"', "sh")  # a network of its own, empty
SMALL = ["--config=configs/tiny.py", "--config.model.width=16", "--config.model.depth=1", "--config.model.hidden=32",
         "--config.model.heads=2", "--config.model.head_size=8", "--config.data.tokenizer=byte",
         "--config.data.length=32", "--config.data.sources=markov:documents=300,length=31", "--config.train.steps=4",
         "--config.train.batch=8", "--config.optim.warmup=1", "--config.train.checkpoint_every=2"]


def alone(*argv: str, env=None) -> subprocess.CompletedProcess:
    return subprocess.run([*ALONE, *argv], cwd=ROOT, text=True, capture_output=True, env=os.environ | (env or {}))


@pytest.fixture(scope="module", autouse=True)
def without_network():
    """Skip where this machine gives no network of one's own; what is tried there must fail, else nothing is shown."""
    try:
        tried = alone(sys.executable, "-c", "import socket; socket.create_connection(('192.0.2.1', 80), timeout=2)")
    except FileNotFoundError:
        pytest.skip("there is no unshare here")
    if "unshare" in tried.stderr:
        pytest.skip(f"unshare is not allowed here: {tried.stderr.strip()}")
    assert "Network is unreachable" in tried.stderr, tried.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that was made there."""
    place = tmp_path_factory.mktemp("offline")
    done = alone(sys.executable, "-m", "lm_jax.train", *SMALL, f"--workdir={place / 'run'}",
                 f"--config.data.root={place / 'data'}")
    assert done.returncode == 0, done.stderr
    return place / "run"


@pytest.mark.parametrize("argv", [
    ("generate", "--model=RUN", "--prompt=1 2", "--length=4"),
    ("plan", "--topology=v5e-8", *SMALL), ("fit", "--help"),
], ids=lambda argv: argv[0])
def test_programs_need_no_network(argv, trained):
    main, *rest = [word.replace("RUN", str(trained)) for word in argv]
    done = alone(sys.executable, "-m", f"lm_jax.{main}", *rest)
    assert done.returncode == 0, done.stderr


def test_a_model_that_is_not_here_is_told_in_a_sentence(tmp_path):
    done = alone(sys.executable, "-m", "lm_jax.generate", "--model=nobody/nothing", "--prompt=x",
                 env={"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "0"})
    assert done.returncode == 2 and "could not be fetched" in done.stderr and "Traceback" not in done.stderr
