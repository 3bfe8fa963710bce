"""Nobody waits for what is not asked for: `--help` loads no library of arrays, a second start compiles nothing."""

import ast
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
COMMANDS = sorted(path.stem for path in (ROOT / "lm_jax").glob("*.py") if "__main__" in path.read_text("utf-8"))
HEAVY = {"jax", "flax", "optax", "orbax", "tensorstore", "tensorflow", "tensorflow_datasets", "matplotlib", "torch",
         "transformers", "tokenizers", "pyarrow", "scipy.stats"}
HELP = """
import atexit, runpy, sys
atexit.register(lambda: print(sorted(sys.modules), file=sys.stderr))
name, sys.argv = sys.argv[1], ["a command", *sys.argv[2:]]
runpy.run_module(f"lm_jax.{name}", run_name="__main__")
"""
# A run that tells how many programs were asked of the compilation cache before its first step was sent, how many in
# all, and how many of those it had.
COUNTED = """
import sys
from collections import Counter
import jax
from lm_jax import meter, train
counts, before, sent = Counter(), [], meter.Meter.sent
jax.monitoring.register_event_listener(lambda name, **_: counts.update([name.split("/")[-1]]))
def told(*args):
    before.append(counts["compile_requests_use_cache"])
    return sent(*args)
meter.Meter.sent = told
assert train.main(["train", *sys.argv[1:]]) == 0
print(f"\\n[{before[0]}, {counts['compile_requests_use_cache']}, {counts['cache_hits']}]")
"""
SETTINGS = ["--config=configs/tiny.py", "--config.model.width=16", "--config.model.depth=1", "--config.data.length=16",
            "--config.data.sources=markov:documents=300,length=15", "--config.data.tokenizer=byte",
            "--config.train.steps=2", "--config.train.batch=8"]
MOST = 12  # programs before the first step's end; the model, the optimizer's state and the step are three of them


def run(*argv: str, **variables: str):
    """A process of its own, on one device."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("XLA_", "JAX_PERSISTENT"))}
    done = subprocess.run([sys.executable, *argv], cwd=ROOT, env=environment | variables, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("name", COMMANDS)
def test_help_comes_before_any_library_of_arrays(name):
    done = run("-c", HELP, name, "--help")
    assert _says(name) in done.stdout
    loaded = HEAVY.intersection(ast.literal_eval(done.stderr.splitlines()[-1]))
    assert not loaded, f"--help of lm_jax.{name} loads {loaded}: import them after the flags are read"


def _says(name: str) -> str:
    """The first line of a command's docstring."""
    return ast.get_docstring(ast.parse((ROOT / "lm_jax" / f"{name}.py").read_text("utf-8"))).splitlines()[0]


def test_importing_the_house_loads_nothing_but_python():
    before, after = (set(json.loads(run("-c", f"{load}import json, sys; print(json.dumps(list(sys.modules)))").stdout))
                     for load in ("", "import lm_jax; "))
    assert after - before == {"lm_jax"}


def test_a_second_start_compiles_nothing_and_the_first_little(tmp_path):
    def counts(name):
        done = run("-c", COUNTED, *SETTINGS, f"--workdir={tmp_path / name}", f"--config.data.root={tmp_path / 'data'}",
                   JAX_COMPILATION_CACHE_DIR=str(tmp_path / "cache"))
        return json.loads(done.stdout.splitlines()[-1])

    before, programs, _ = counts("first")
    assert before <= MOST, f"{before} programs before the first step"
    _, again, read = counts("second")
    assert again == read, f"{again - read} of {again} programs, {programs} at the first start, were compiled anew"
