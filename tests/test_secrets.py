"""Secrets of the environment are found nowhere: not in records, logs, renderings, checkpoints or commands; in a config
they are refused, and not even the refusal shows them."""

import os
import pathlib
import subprocess
import sys
import time

import pytest

from lm_jax import command, credentials
from lm_jax.errors import ConfigError

ROOT = pathlib.Path(__file__).parent.parent
CANARY = "canary5up3rs3cr3t"
SECRETS = {"HF_TOKEN": f"hf_{CANARY}{CANARY}", "WANDB_API_KEY": f"{CANARY}0123456789abcdef", "MY_SECRET": f"ab{CANARY}",
           "GOOGLE_APPLICATION_CREDENTIALS": f"/keys/{CANARY}.json", "DB_PASSWORD": f"pw-{CANARY}",
           "AWS_SECRET_ACCESS_KEY": f"aws{CANARY}", "SOME_TOKEN": f"{CANARY}-token",
           "OPENAI_KEY": f"sk-{CANARY}{CANARY}",
           "INDEX_URL": f"https://me:{CANARY}@packages.example/simple"}
CONFIG = """
from lm_jax import config

def get_config():
    c = config.default()
    c.name = "little"
    c.model.update(dict(width=16, depth=1, heads=2, head_size=8, hidden=32, dtype="float32"))
    c.data.update(dict(tokenizer="byte", length=32, sources="markov:documents=300,length=31", root={root!r}))
    c.train.update(dict(steps=4, batch=8, eval_every=2, checkpoint_every=2, loggers="tensorboard"))
    c.optim.warmup = 1
    return c

def get_points(c):
    return [{{"optim.lr": 1e-3}}]
"""


def program(main: str, *argv: str, cwd, seen: list) -> str:
    """What a real program prints; `seen` gets the commands of all processes of this folder, its children too."""
    process = subprocess.Popen([sys.executable, "-m", f"lm_jax.{main}", *argv], cwd=cwd, text=True,
                               stdout=open(cwd / "out.txt", "w"), stderr=subprocess.STDOUT,
                               env=os.environ | SECRETS | {"PYTHONPATH": str(ROOT)})
    while process.poll() is None:
        for place in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
            try:
                line = place.read_bytes().decode(errors="replace").replace("\0", " ")
            except OSError:
                continue
            if str(cwd) in line and line not in seen:
                seen.append(line)
        time.sleep(0.2)
    text = (cwd / "out.txt").read_text()
    assert process.returncode == 0, text
    return text


def test_nothing_that_is_written_printed_or_passed_on_holds_a_secret(tmp_path):
    """A sweep with a real run in it, what clusters would get, a plan, the doctor, a conversion with its card."""
    (tmp_path / "little.py").write_text(CONFIG.format(root=str(tmp_path / "data")))
    seen, said = [], []
    config, out = f"--config={tmp_path}/little.py", f"--out={tmp_path}/sweep"
    run = lambda main, *argv: said.append(program(main, *argv, cwd=tmp_path, seen=seen))
    run("sweep", config, out, "--jobs=1")
    clusters = (("jobset", "v5e-4", "image=lm:1 bucket=results"), ("slurm", "8xh100", "home=."),
                ("sky", "v5e-4", "bucket=gs://results"))
    for launcher, topology, settings in clusters:
        run("sweep", config, f"--out=/bucket/{launcher}", f"--launcher={launcher}", f"--topology={topology}",
            f"--settings={settings}", "--dry_run", "--config.train.batch=32")
    point = next((tmp_path / "sweep" / "points").iterdir())
    run("plan", config, "--topology=v5e-4", "--json", "--config.train.batch=32")
    run("train", f"--doctor={point}")
    run("convert", str(point), str(tmp_path / "exported"))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"config.json", "manifest.json", "metrics.jsonl", "summary.json", "log.txt", "runs.jsonl", "README.md",
            "MANIFEST.json", "phases.json"} <= names, names
    assert any(name.startswith("events.out") for name in names), "TensorBoard's"
    assert {pathlib.Path(name).suffix for name in names} >= {".yaml", ".sbatch"}, "what clusters get"
    assert any("lm_jax.train" in line or "lm_jax.together" in line for line in seen), "the point's own process"
    leaks = [str(path) for path in files if CANARY.encode() in path.read_bytes()]
    assert not leaks and CANARY not in "".join(said) and CANARY not in "".join(seen)


@pytest.mark.parametrize("value", [*(one for one in SECRETS.values() if one[0] != "/"), f"text:https://me:{CANARY}@example.com/x"])
@pytest.mark.parametrize("key", ["name", "data.sources", "data.root"])
def test_a_credential_in_a_config_is_refused_and_not_shown(key, value, monkeypatch):
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    with pytest.raises(ConfigError) as error:
        command.parse(["train", f"--config={ROOT}/configs/tiny.py", f"--config.{key}={value}"], doc="")
    assert CANARY not in credentials.masked(str(error.value))


def test_an_error_of_a_program_shows_no_credential():
    bad = [f"--config.train.steps={SECRETS['HF_TOKEN']}", f"--config.optim.lr={SECRETS['WANDB_API_KEY']}"]
    done = subprocess.run([sys.executable, "-m", "lm_jax.train", "--config=configs/tiny.py", *bad], cwd=ROOT, text=True,
                          capture_output=True, env=os.environ | SECRETS)
    assert done.returncode == 2 and "train.steps" in done.stderr and "optim.lr" in done.stderr
    assert CANARY not in done.stdout + done.stderr


@pytest.mark.parametrize("text", ["hf_short", "text:my/*.txt", "https://example.com/a:b@c", "gs://bucket/x", "sk-8",
                                  "a" * 40, "localhost:1234"])
def test_ordinary_words_are_no_credentials(text):
    assert not credentials.shown(text, {"PATH": "/usr/bin", "KEY": "short", "A_TOKEN": "another-long-value"})
