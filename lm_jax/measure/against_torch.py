"""Training beside PyTorch: the same model, weights, batch, optimizer step and precision, in turns in one process."""

import json
import os
import statistics
import subprocess
import sys

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


def measured(case: Case, dtype: str, *, turns: int = timing.TURNS, sides=SIDES) -> list[Figure]:
    """Tokens a second of each side, and how many times as fast ours is as the best of the others."""
    torch_reference.package("torch")
    steps, first = {}, []
    for name in sides:
        steps[name] = side(name, case, dtype)
        first.append(Figure(f"first step, {name}", timing.once(steps[name]), "s", "compiling included"))
    seconds = timing.interleaved(steps, turns=turns, warm=1)  # after the first step
    tokens, cfg = case.batch * case.length, case.config(dtype)
    work = case.batch * flops.train(cfg, case.length)
    best = timing.faster({name: s for name, s in seconds.items() if name != "lm_jax"})
    what = f"{case.batch} rows of {case.length}, {flops.parameters(cfg)['non_embedding']:,} parameters + tables"
    found = [rate(name, tokens, s, "tokens/s", f"{what}; {work / statistics.median(s) / 1e9:,.0f} GFLOP/s of the model")
             for name, s in seconds.items()]
    found += [duration(f"  a step of {name}", s) for name, s in seconds.items()]
    found.append(timing.times_as_fast(f"lm_jax is as fast as {best}, times", seconds["lm_jax"], seconds[best]))
    return found + first


def memory(name: str, key: str, dtype: str) -> Figure:
    """Most bytes of a process that makes three steps of one side of a case, compiling included, less those of one that
    makes none."""
    path = os.pathsep.join(filter(None, (os.getcwd(), *sys.path)))
    done = subprocess.run([sys.executable, "-m", "lm_jax.measure.against_torch", key, dtype, name],
                          capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": path})
    bare, peak = json.loads(done.stdout.splitlines()[-1])
    return Figure(f"memory of the host, {name}", (peak - bare) / 2**30, "GiB", "three steps' peak, compiling included, "
                  f"above the {bare / 2**30:.2f} GiB of both packages imported")


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


def _peaks(key: str, dtype: str, name: str) -> list[int]:
    """This process's peaks of memory before and after three steps."""
    torch_reference.package("torch")
    peak = lambda: log.peak_memory()["host_memory_peak"]
    bare, run = peak(), side(name, CASES[key], dtype)
    for _ in range(3):
        run()
    return [bare, peak()]


if __name__ == "__main__":
    print(json.dumps(_peaks(*sys.argv[1:])))
