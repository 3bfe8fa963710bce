"""How cost grows: a step over model size, length, vocabulary and devices, with exponents, and what the FLOPs explain.

Every point is counted by types (FLOPs, bytes of the plan, seconds to trace the step); those that this machine has room
and patience for are timed too. Cost y over x is fitted as a power; where the exponent of the seconds is above that of
the FLOPs, something grows that the FLOPs do not explain.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass

import jax
import numpy as np

from lm_jax import losses, optim, parallel, update
from lm_jax.config import Config, DataConfig, OptimConfig, TrainConfig, TransformerConfig
from lm_jax.hosts import put_batch
from lm_jax.measure import timing
from lm_jax.measure.figures import Figure, duration
from lm_jax.models import flops, transformer, zoo
from lm_jax.models.layers import kinds
from lm_jax.preflight import memory, program, room

PATIENCE = 3e12  # FLOPs of a step that is timed on a CPU
FASTER = {"cpu": 1, "gpu": 100, "tpu": 100}  # times the patience
LAST = 1000


def config(*, params: float = 1e6, length: int = 256, vocab: int = 4096, tokens: int = 2048, devices: int = 1
           ) -> Config:
    """A decoder of so many parameters outside its table, and batches of so many tokens."""
    model = TransformerConfig(**zoo.ladder(params=params), vocab=vocab, dtype="float32")
    return Config(model=model, data=DataConfig(length=length), optim=OptimConfig(warmup=9),
                  train=TrainConfig(batch=max(devices, tokens // length), steps=LAST))


@dataclass(frozen=True)
class Axis:
    """What is varied, its values, and what is held."""

    unit: str
    values: tuple
    held: str
    apart: bool = False  # each value in a process of its own


AXES = {
    "params": Axis("parameters without embeddings", (1e6, 3e6, 1e7, 3e7, 1e8, 3e8, 1e9),
                   "T 256, V 4,096, 2,048 tokens a step"),
    "length": Axis("tokens a row", (128, 256, 512, 1024, 2048, 4096), "1M parameters, V 4,096, 4,096 tokens a step"),
    "vocab": Axis("ids", (1024, 4096, 16384, 65536, 131072), "1M parameters, T 256, 2,048 tokens a step"),
    "devices": Axis("devices", (1, 2, 4, 8), "1M parameters, T 256, 2,048 tokens a step; CPU devices share the cores, "
                    "so that no change is the best", apart=True),
}
MORE = {"length": dict(tokens=4096)}


def measured(axis: str, values: tuple = (), *, turns: int = timing.TURNS, **held) -> list[Figure]:
    """Each value's counts and times, and the exponents; `held` replaces what the axis holds."""
    how = AXES[axis]
    point = _apart if how.apart else _here
    rows = [point(MORE.get(axis, {}) | held | {axis: value}, axis, turns) for value in values or how.values]
    found = []
    for row in rows:
        said = (f"{row['flops']:.3g} FLOPs; planned {row['bytes'] / 2**30:.3g} GiB a device; traced in "
                f"{row['trace']:.1f} s")
        name = f"{row['x']:,.4g} {how.unit}"
        if row["seconds"]:
            found.append(duration(name, row["seconds"], said))
        else:
            found.append(Figure(name, row["flops"], "FLOP a step", f"{said}; counted alone: {row['why']}"))
    return found + _exponents(rows, how)


def exponent(x, y) -> float:
    """b of y = a x^b, by least squares of the logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def _exponents(rows: list[dict], how: Axis) -> list[Figure]:
    """Of what is counted over all values, of seconds over those that were timed, beside the FLOPs over the same."""
    over = lambda rows, key: exponent([row["x"] for row in rows], [row[key] for row in rows])
    found = [Figure(f"exponent of {name}", over(rows, key), "", f"over {how.unit}; {how.held}")
             for name, key in (("FLOPs", "flops"), ("planned bytes a device", "bytes"), ("seconds to trace", "trace"))
             if len(rows) > 1]
    timed = [row | {"s": float(np.median(row["seconds"]))} for row in rows if row["seconds"]]
    if len(timed) > 1:
        seconds, work = over(timed, "s"), over(timed, "flops")
        found += [Figure("exponent of seconds a step", seconds, "", f"over the {len(timed)} that were timed"),
                  Figure("  of it the FLOPs explain", work, "", "over the same"),
                  Figure("  left unexplained", seconds - work, "", "above 0 grows beyond the FLOPs")]
    return found


def _here(asked: dict, axis: str, turns: int) -> dict:
    """One value, counted, and timed where it fits."""
    c = config(**asked)
    mesh = parallel.make_mesh(c.mesh, jax.devices()[:asked.get("devices", 1)])
    seconds, why = [], _too_much(c, mesh)
    with jax.sharding.set_mesh(mesh):
        if not why:
            seconds = _timed(c, turns)
    x = flops.parameters(c.model)["non_embedding"] if axis == "params" else asked[axis]
    trace = timing.once(lambda: program.check(c, mesh))
    return {"x": x, "flops": _flops(c), "bytes": memory.estimate(c, mesh)["total"], "trace": trace,
            "seconds": seconds, "why": why}


def _apart(asked: dict, axis: str, turns: int) -> dict:
    """One number of CPU devices, in a process that has as many; of accelerators, those that are here."""
    if jax.default_backend() != "cpu":
        return _here(asked, axis, turns)
    flag = f"--xla_force_host_platform_device_count={asked[axis]}"
    path = os.pathsep.join(filter(None, (os.getcwd(), *sys.path)))
    done = subprocess.run([sys.executable, "-m", "lm_jax.measure.growth", json.dumps(asked), axis, str(turns)],
                          capture_output=True, text=True, check=True,
                          env=os.environ | {"XLA_FLAGS": flag, "PYTHONPATH": path})
    return json.loads(done.stdout.splitlines()[-1])


def _too_much(c: Config, mesh) -> str:
    """Why a step is not timed here, or nothing."""
    here, needed = room.present(), memory.estimate(c, mesh)["total"]
    if here is not None and needed > 0.5 * here.device.usable / here.device.per_chip:
        return "more than half of the memory"
    patience = PATIENCE * FASTER[jax.default_backend()]
    return "" if _flops(c) <= patience else f"more than {patience:.0e} FLOPs a step"


def _flops(c: Config) -> int:
    return c.train.batch * flops.train(c.model, c.data.length)


def _timed(c: Config, turns: int) -> list[float]:
    """Seconds of a step, warm, on the mesh in use."""
    model, rng = transformer.make(c.model, seed=0), np.random.default_rng(0)
    tx = optim.make(c.optim, LAST, kinds(model))
    step = jax.jit(update.make_step(losses.next_token, tx, optim.schedule(c.optim, LAST)), donate_argnums=0)
    shape = c.train.batch, c.data.length
    ids, places = rng.integers(0, c.model.vocab, shape, np.int32), np.arange(shape[1], dtype=np.int32)
    batch = put_batch({"tokens": ids, "targets": ids, "weights": np.ones(shape, np.float32),
                       "positions": np.broadcast_to(places, shape).copy(), "segments": np.ones_like(ids)})
    state, key = update.begin(model, tx), jax.random.key(0)

    def run():
        nonlocal state
        state, _ = step(state, batch, key)
        jax.block_until_ready(state)

    run()
    count = min(5, timing.calls(timing.once(run)))
    return [seconds / count for seconds in timing.alone(lambda: [run() for _ in range(count)], turns=turns, warm=0)]


if __name__ == "__main__":
    print(json.dumps(_here(json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3]))))
