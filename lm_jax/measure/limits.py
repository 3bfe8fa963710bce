"""What this machine can do at most: products of matrices at training shapes, each way round, and memory.

A training step makes three products of each weight: x w going forward, dy w' and x' dy going back, and a backend may
be good at one and poor at another. The best rate over shapes and ways is the peak that a step is measured against.
"""

import functools
import json
import os
import subprocess
import sys
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lm_jax import pages
from lm_jax.measure import timing
from lm_jax.measure.figures import Figure, rate

# Tokens, fan-in and fan-out of a step's products: (a) and (b) of the comparison with PyTorch; wider on an accelerator.
SHAPES = {"cpu": ((4096, 384, 1536), (4096, 768, 3072), (2048, 2048, 2048)),
          "gpu": ((16384, 2048, 2048), (16384, 2048, 8192), (8192, 8192, 8192)),
          "tpu": ((16384, 2048, 2048), (16384, 2048, 8192), (8192, 8192, 8192))}
WAYS = {"x·w": "mk,kn->mn", "dy·wᵀ": "mn,kn->mk", "xᵀ·dy": "mk,mn->kn"}
DTYPES = {  # of operands and of the result
    "float32": ("float32", "float32"),
    "bfloat16": ("bfloat16", "bfloat16"),
    "bfloat16 into float32": ("bfloat16", "float32"),
}
STREAMED = {"cpu": 2**26, "gpu": 2**29, "tpu": 2**28}  # float32 numbers, more than any cache holds


@dataclass(frozen=True)
class Limits:
    """The best rates: `flops` by dtype of the operands in FLOP/s, `memory` in bytes read and written a second."""

    flops: dict[str, float]
    memory: float
    figures: tuple[Figure, ...]

    def seconds(self, flops: float, moved: float, dtype: str) -> float:
        """The least time that so many FLOPs and bytes take: the slower of the two."""
        return max(flops / self.flops[dtype], moved / self.memory)


def measured(*, shapes=None, streamed: int = 0, turns: int = timing.TURNS) -> Limits:
    """The limits of the first device, warm, medians over turns."""
    platform = jax.default_backend()
    found = {(name, way): _best(name, way, shapes or SHAPES[platform], turns) for name in DTYPES for way in WAYS}
    memory = _memory(streamed or STREAMED[platform], turns)
    operands = {operand for operand, _ in DTYPES.values()}
    best = {one: max(f.value for (name, _), f in found.items() if DTYPES[name][0] == one) for one in operands}
    return Limits(best, memory.value, (*found.values(), memory))


def on_other_pages(kind: str, *, shapes=None, turns: int = timing.TURNS) -> list[Figure]:
    """The same products in a process of its own under another kind of pages."""
    program = ("import json, sys; from lm_jax.measure import limits; shapes, turns = json.loads(sys.argv[1]); "
               "print(json.dumps([f.record() for f in limits.measured(shapes=shapes, turns=turns, streamed=2**20)"
               ".figures[:-1]]))")
    asked = json.dumps([shapes or SHAPES[jax.default_backend()], turns])
    done = subprocess.run([sys.executable, "-c", program, asked], capture_output=True, text=True, check=True,
                          env=pages.environment(kind) | {"PYTHONPATH": os.pathsep.join(sys.path)})
    return [Figure(**one | {"name": f"{one['name']}, {kind} pages"})
            for one in json.loads(done.stdout.splitlines()[-1])]


def _best(dtype: str, way: str, shapes, turns: int) -> Figure:
    """The best rate of one kind of product over the shapes."""
    found = []
    for m, k, n in shapes:
        letters = dict(m=m, k=k, n=n)
        operands = [jnp.ones([letters[a] for a in side], DTYPES[dtype][0]) for side in WAYS[way][:5].split(",")]
        run = lambda: jax.block_until_ready(_product(*operands, way=way, out=DTYPES[dtype][1]))
        found.append(rate(f"GEMM {dtype}, {way}", 2 * m * k * n, timing.alone(run, turns=turns), "FLOP/s",
                          f"{m:,} tokens, {k:,} to {n:,}"))
    return max(found, key=lambda figure: figure.value)


@functools.partial(jax.jit, static_argnames=("way", "out"))
def _product(a, b, *, way: str, out: str):
    return jnp.einsum(WAYS[way], a, b, preferred_element_type=out)


def _memory(numbers: int, turns: int) -> Figure:
    """A stream that is read and written where it is."""
    x = jnp.ones(numbers, jnp.float32)

    def run():
        nonlocal x
        x = jax.block_until_ready(_scaled(x))

    return rate("memory, read and written", 8 * numbers, timing.alone(run, turns=turns), "B/s",
                f"{4 * numbers / 2**20:,.0f} MiB in place")


@functools.partial(jax.jit, donate_argnums=0)
def _scaled(x):
    return x * 1.0001
