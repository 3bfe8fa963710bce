"""Training beside PyTorch: the same model, weights, batch, optimizer step and precision, in turns."""

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
from dataclasses import asdict

import jax
import numpy as np

from lm_jax import log, optim, update
from lm_jax.losses import next_token
from lm_jax.measure import timing, torch_reference
from lm_jax.measure.figures import Figure, duration, rate
from lm_jax.measure.torch_reference import ADAMW, Case
from lm_jax.models import flops, transformer
from lm_jax.models.layers import kinds

CASES = {"a": Case("10M parameters, d 384, 6 layers", depth=6, width=384, heads=6, vocab=8192, length=256, batch=16),
         "b": Case("GPT-2 small", depth=12, width=768, heads=12, vocab=50257, length=512, batch=8)}
SIDES = ("lm_jax", "torch eager", "torch compiled")


def measured(case: Case, dtype: str, *, turns: int = timing.TURNS, sides=SIDES, say=timing.quiet) -> list[Figure]:
    """Tokens a second of each side, how many times as fast ours is as the best of the others, and memory."""
    torch_reference.package("torch")
    with contextlib.ExitStack() as stack:
        steps = {name: stack.enter_context(Apart(case, dtype, name)) for name in sides}
        first = []
        for name, step in steps.items():
            first.append(Figure(f"first step, {name}", timing.once(step), "s", "compiling included"))
            say(f"{first[-1].name}, {first[-1].value:.3g} s")
        seconds = timing.interleaved(steps, turns=turns, warm=2, say=say)
        memory = [Figure(f"memory of the host, {name}", (step.peak - step.bare) / 2**30, "GiB", "the process's peak, "
                         f"compiling included, above the {step.bare / 2**30:.2f} GiB of both packages imported")
                  for name, step in steps.items()]
    tokens, cfg = case.batch * case.length, case.config(dtype)
    work = case.batch * flops.train(cfg, case.length)
    best = timing.faster({name: s for name, s in seconds.items() if name != "lm_jax"})
    what = f"{case.batch} rows of {case.length}, {flops.parameters(cfg)['non_embedding']:,} parameters + tables"
    found = [rate(name, tokens, s, "tokens/s", f"{what}; {work / statistics.median(s) / 1e9:,.0f} GFLOP/s of the model")
             for name, s in seconds.items()]
    found += [duration(f"  a step of {name}", s) for name, s in seconds.items()]
    found.append(timing.times_as_fast(f"lm_jax is as fast as {best}, times", seconds["lm_jax"], seconds[best]))
    return found + first + memory


class Apart:
    """A side's training step in a process of its own: called, it makes one there. Two in one process would share an
    allocator and get in the way of each other's threads."""

    def __init__(self, case: Case, dtype: str, name: str):
        path = os.pathsep.join(filter(None, (os.getcwd(), *sys.path)))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lm_jax.measure.against_torch", json.dumps(asdict(case)), dtype, name], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
            env=os.environ | {"PYTHONPATH": path})
        self.bare = self.peak = json.loads(self.process.stdout.readline() or self._failed())

    def __call__(self) -> timing.Spent:
        print(file=self.process.stdin, flush=True)
        seconds, cpu, self.peak = json.loads(self.process.stdout.readline() or self._failed())
        return timing.Spent(seconds, cpu)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        end(self.process)

    def _failed(self):
        raise RuntimeError(f"this side ended with code {self.process.wait()}; its last words are above")


def end(process: subprocess.Popen):
    """Kill a process that leads a session, and what it has forked there, as PyTorch's compiler does. What has left the
    session may hold the pipes for as long as it likes: their end is not waited for."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=10)
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(BrokenPipeError):  # of a line that was never read
            pipe.close()


def side(name: str, case: Case, dtype: str):
    """One side's training step, which returns when it is done."""
    if name == "lm_jax":
        return ours(case, dtype)
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    return torch_reference.step(case, dtype=dtype, compiled=name == "torch compiled", device=device)


def ours(case: Case, dtype: str, model=None):
    """A function that makes one training step of ours and gives its loss."""
    model = model or transformer.make(case.config(dtype), seed=0)
    tx = optim.make(ADAMW, 1000, kinds(model))
    state = update.begin(jax.tree.map(lambda a: a + 0, model), tx)  # a copy, as the step takes what it is given
    step = jax.jit(update.make_step(next_token, tx, optim.schedule(ADAMW, 1000)), donate_argnums=0)
    rows, key = jax.device_put(batch(case)), jax.random.key(0)

    def once() -> float:
        nonlocal state
        state, metrics = step(state, rows, key)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return once


def batch(case: Case) -> dict:
    """The case's rows, one document each."""
    tokens, targets = case.rows()
    places = np.broadcast_to(np.arange(case.length, dtype=np.int32), tokens.shape)
    return {"tokens": tokens, "targets": targets, "weights": np.ones(tokens.shape, np.float32), "positions": places,
            "segments": np.ones_like(tokens)}


def answer(case: Case, dtype: str, name: str):
    """A step for each line of standard input: its seconds, those of all threads, and the process's peak of memory."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed
    torch_reference.package("torch")
    peak = lambda: log.peak_memory()["host_memory_peak"]
    print(peak(), file=replies, flush=True)
    run = side(name, case, dtype)
    for _ in sys.stdin:
        spent = timing.once(run)
        print(json.dumps([spent, spent.cpu, peak()]), file=replies, flush=True)


if __name__ == "__main__":
    answer(Case(**json.loads(sys.argv[1])), *sys.argv[2:])
