"""Does it hold on a GPU, and how fast is it there? One call, under eight minutes, on one machine with a GPU:

    python experiments/gpu_check.py --out=gpu_check          # needs pip install -e ".[test,cuda]"
    python experiments/gpu_check.py --out=dry --dry          # the same jobs, tiny, on a CPU: whether they run at all

The tests that need a GPU; a 1B decoder (d 2048, 16 layers, T 2048) and the 125m config in bfloat16 without
rematerialisation: rate, MFU against the measured and the nominal peak, split of a step, memory against the plan,
costliest operations; packed rows against unpacked ones. Each job is a process of its own with a limit, so that one that
fails leaves the others their time; what is left out says so. Writes gpu_check.json and gpu_check.md into --out.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

from lm_jax.measure.figures import Figure, markdown

ROOT = pathlib.Path(__file__).parent.parent
MINUTES = 7.5  # for all jobs
GOALS = {"1b": "MFU of the nominal peak at least 55 %, memory within 10 % of the plan",
         "125m": "MFU of the nominal peak at least 40 %", "packing": "packed costs less than 5 % over unpacked"}
BIG = ("--config=configs/1b.py", "--config.model.depth=16", "--config.model.hidden=8192", "--config.model.remat=none",
       "--config.train.batch=8")
SMALL = ("--config=configs/125m.py", "--config.train.batch=64", "--config.train.microbatches=1")
TINY = ("--config=configs/tiny.py", "--config.model.depth=1", "--config.model.width=32", "--config.model.heads=2",
        "--config.model.head_size=16", "--config.model.hidden=64", "--config.data.vocab=384", "--config.data.length=32",
        "--config.train.batch=2")


@dataclass(frozen=True)
class Job:
    """A command and the most seconds that it may take."""

    name: str
    command: tuple[str, ...]
    seconds: float


def jobs(dry: bool) -> list[Job]:
    """What is to be done, the most important first."""
    bench = ("-m", "lm_jax.bench", "--json", "--pages=plain", f"--turns={1 if dry else 5}")
    tests = "test_where_there_is_no_gpu" if dry else "test_cudnn_shows"  # the latter is skipped without a GPU
    big, small = (TINY, TINY) if dry else (BIG, SMALL)
    pytest = ("-m", "pytest", "-q", "-o", "addopts=", "tests/test_kernels.py", "-k", tests)  # wants no pytest-xdist
    return [Job("tests", pytest, 120),
            Job("1b", (*bench, "--parts=limits,training", *big), 200),
            Job("packing", (*bench, "--parts=packing", *big), 120),
            Job("125m", (*bench, "--parts=training", *small), 150)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="gpu_check", help="folder of gpu_check.json and gpu_check.md")
    parser.add_argument("--dry", action="store_true", help="tiny, on a CPU")
    args = parser.parse_args()
    out, begun = pathlib.Path(args.out), time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    done = []
    with tempfile.TemporaryDirectory() as cache:
        for job in jobs(args.dry):
            left = 60 * MINUTES - (time.monotonic() - begun)
            done.append(run(job, min(job.seconds, left), environment(args.dry, cache)))
            written(out, done)  # after each, so that whoever is stopped early has what there is
            print(f"{job.name}: {done[-1]['status']}, {done[-1]['seconds']:.0f} s", flush=True)
    print((out / "gpu_check.md").read_text())
    return 0 if all(one["status"] == "ok" for one in done) else 1


def environment(dry: bool, cache: str) -> dict[str, str]:
    """A GPU or nothing, programs kept from job to job, and most of the card's memory for them."""
    return os.environ | {"JAX_PLATFORMS": "cpu" if dry else "cuda", "JAX_COMPILATION_CACHE_DIR": cache,
                         "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", "PYTHONPATH": str(ROOT)}


def run(job: Job, seconds: float, env: dict[str, str]) -> dict:
    """What became of a job: its status, its lines of JSON, and the end of what else it said."""
    record = {"name": job.name, "command": "python " + " ".join(job.command), "goal": GOALS.get(job.name, "")}
    begun = time.monotonic()
    if seconds < 20:
        return record | {"status": "left out: no time", "seconds": 0.0, "parts": [], "said": ""}
    try:
        ended = subprocess.run([sys.executable, *job.command], cwd=ROOT, env=env, capture_output=True, text=True,
                               timeout=seconds)
        status, told, said = "ok" if not ended.returncode else f"code {ended.returncode}", ended.stdout, ended.stderr
    except subprocess.TimeoutExpired as late:
        status = f"stopped after {seconds:.0f} s"
        told, said = ((text or b"").decode(errors="replace") for text in (late.stdout, late.stderr))
    lines = told.splitlines()
    parts = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
    words = [line for line in lines if not line.startswith("{")][-5:] + said.splitlines()[-15:]
    return record | {"status": status, "seconds": time.monotonic() - begun, "parts": parts, "said": "\n".join(words)}


def written(out: pathlib.Path, done: list[dict]):
    """The record for programs, and the tables for people."""
    (out / "gpu_check.json").write_text(json.dumps(done, indent=1, ensure_ascii=False))
    page = []
    for one in done:
        page.append(f"## {one['name']}: {one['status']}, {one['seconds']:.0f} s\n\n`{one['command']}`\n")
        page += [f"Goal: {one['goal']}.\n"] if one["goal"] else []
        for part in one["parts"]:
            if "figures" in part:
                page.append(markdown(part["title"], [Figure(**figure) for figure in part["figures"]]))
            elif part["part"] == "machine":
                page.append(f"{part['devices']} × {part['device']}, load {part['load']}, {part['versions']}\n")
        if one["status"] != "ok" or not one["parts"]:
            page.append(f"```\n{one['said']}\n```\n")
    (out / "gpu_check.md").write_text("\n".join(page))


if __name__ == "__main__":
    sys.exit(main())
