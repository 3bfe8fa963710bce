"""Odd places are places too: names with spaces and letters of any script, no home, no room for temporary files."""

import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest

from lm_jax.workdir import Workdir

ROOT = pathlib.Path(__file__).parent.parent
ODD = "a b 汉字 é"
HOMELESS = {"HOME": "/proc/nowhere", "TMPDIR": "/proc/nothing", "XDG_CACHE_HOME": "", "XDG_CONFIG_HOME": ""}
READ_ONLY = ("unshare", "-rm", "sh", "-c", 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"')


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with texts, all of odd names."""
    texts = tmp_path_factory.mktemp("odd") / ODD / "texts"
    texts.mkdir(parents=True)
    for i in range(8):
        (texts / f"页 {i}.txt").write_text("plain words of 汉字 " * 40, "utf-8")
    return texts.parent


def flags(place, workdir) -> list[str]:
    small = {"model.width": 16, "model.depth": 1, "model.hidden": 32, "model.heads": 2, "model.head_size": 8,
             "data.tokenizer": "byte", "data.length": 32, "data.validation": 0.3, "train.steps": 4, "train.batch": 8,
             "optim.warmup": 1, "train.checkpoint_every": 2, "data.root": place / "data",
             "data.sources": f"text:{place}/texts/*.txt"}
    return ["--config=configs/tiny.py", f"--workdir={workdir}", *(f"--config.{key}={to}" for key, to in small.items())]


def program(main, *argv, before=(), env=None) -> subprocess.CompletedProcess:
    homeless = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"} | HOMELESS
    return subprocess.run([*before, sys.executable, "-m", f"lm_jax.{main}", *argv], cwd=ROOT, text=True,
                          capture_output=True, env=homeless | (env or {}), timeout=300)


@pytest.fixture(scope="module")
def trained(place):
    done = program("train", *flags(place, place / "run"))
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return place / "run", done.stdout


def test_a_run_needs_no_home_no_temporary_folder_and_no_plain_name(trained):
    run, said = trained
    assert (run / "plots" / "loss.png").stat().st_size and (run / "summary.json").exists()
    offered = [shlex.split(line, comments=True) for line in said.splitlines() if line.startswith("  python -m")]
    assert f"--workdir={run}-long" in offered[0], "a command that is offered can be pasted"
    done = program("generate", f"--model={run}", "--prompt=汉字", "--length=4")
    assert done.returncode == 0, done.stderr


def test_a_folder_that_takes_no_files_is_read_and_named_where_it_must_be_written(trained, place, tmp_path):
    """A real mount that is read-only: its data train a run elsewhere; a run in it is refused with the cure."""
    tried = subprocess.run([*READ_ONLY, str(place), "true"], capture_output=True) if shutil.which("unshare") else None
    if not tried or tried.returncode:
        pytest.skip("no mounts of one's own here")
    here = (*READ_ONLY, str(place))
    done = program("train", *flags(place, tmp_path / "run"), before=here)
    assert done.returncode == 0, done.stderr
    done = program("train", *flags(place, place / "run"), before=here)
    assert done.returncode == 2 and "Read-only file system" in done.stderr and "Pass a folder" in done.stderr


@pytest.mark.parametrize("path", ["/proc/nothing/run", "/dev/null/run", "/" + "x" * 300])
def test_what_can_be_no_folder_is_named(path):
    with pytest.raises(ValueError, match="cannot be used"):
        Workdir(path).open({})
