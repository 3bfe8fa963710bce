"""How long a user waits before anything happens: imports, `--help`, and the first step, cold and with the cache."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from lm_jax import config
from lm_jax.config import Config
from lm_jax.data import store
from lm_jax.measure import subject, timing
from lm_jax.measure.figures import Figure, duration

CACHE = "JAX_COMPILATION_CACHE_DIR"
HELPS = tuple(f"lm_jax.{name}" for name in (
    "train", "generate", "fit", "sweep", "together", "plan", "prepare", "convert", "bench"))


def imports(*, turns: int = timing.TURNS) -> list[Figure]:
    """Processes that only import, or only say what they are for."""
    empty = duration("python -c pass", _processes(["-c", "pass"], turns), "the interpreter alone")
    found = [duration("import lm_jax", _processes(["-c", "import lm_jax"], turns), "a whole process"), empty]
    return found + [duration(f"python -m {name} --help", _processes(["-m", name, "--help"], turns), "a whole process")
                    for name in HELPS]


def first_step(c: Config) -> list[Figure]:
    """Seconds from a process's start to its first step's numbers, its data prepared; each part, twice."""
    found = []
    with tempfile.TemporaryDirectory() as place:
        planned = subject.over_bytes(c, Path(place))
        store.prepare(planned.data, say=subject.tell)
        file = Path(place, "config.json")
        file.write_text(json.dumps(config.to_dict(planned)))
        for way in ("cold", "cached"):
            told = _told(["-m", "lm_jax.measure.first_step", str(file)], {CACHE: str(Path(place, "cache"))})
            found += _figures(way, told)
    return found


def _figures(way: str, told: dict) -> list[Figure]:
    ends = told["seconds"]
    how = "no compiled program is kept" if way == "cold" else "programs from the compilation cache"
    found = [Figure(f"first step, {way}", ends["first step"], "s", f"since the process began; {how}")]
    before = 0.0
    for part, end in ends.items():
        found.append(Figure(f"  {part}", end - before, "s", PARTS[part]))
        before = end
    if way == "cached":  # a compiler takes memory too
        found.append(Figure("memory of the host", (told["peak"] - told["bare"]) / 2**30, "GiB",
                            f"two steps' peak above the {told['bare'] / 2**30:.2f} GiB of a process without a model"))
    return found


PARTS = {"import": "the interpreter and all that train imports", "build": "data opened, weights and optimizer made",
         "compile": "the step traced and compiled, or read", "first step": "from a batch to its metrics"}


def _processes(arguments: list[str], turns: int) -> list[float]:
    return timing.alone(lambda: _run(arguments, {}), turns=turns, warm=1)


def _told(arguments: list[str], more: dict) -> dict:
    """What a child process says in its last line."""
    return json.loads(_run(arguments, more).stdout.splitlines()[-1])


def _run(arguments: list[str], more: dict):
    path = os.pathsep.join(filter(None, (os.getcwd(), *sys.path)))
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": path} | more)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done
