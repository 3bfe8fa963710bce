"""What packing costs: attention over rows of several documents against rows of one, and against JAX's plain causal
attention, which knows of no documents at all."""

import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax import hosts
from lm_jax.config import Config
from lm_jax.errors import ConfigError
from lm_jax.measure import timing
from lm_jax.measure.figures import Figure, duration
from lm_jax.measure.subject import Subject
from lm_jax.models import kernels
from lm_jax.models.layouts import Layout

DOCUMENTS = 8  # in a packed row


def measured(subject: Subject, *, turns: int = timing.TURNS) -> list[Figure]:
    """Of a causal config: the step, and one layer's attention forward and backward, in turns."""
    if not subject.config.model.causal:
        raise ConfigError("--parts=packing compares with causal attention: pass a config of a decoder")
    steps, layers = _steps(subject), _layers(subject.config)
    found = _compared("a step", timing.interleaved(steps, turns=turns))
    kernel = kernels.choose(subject.config.model, subject.config.data.length)
    return found + _compared(f"a layer's attention by {kernel}", timing.interleaved(layers, turns=turns))


def _compared(what: str, seconds: dict[str, list[float]]) -> list[Figure]:
    """Each way's time, and what the packed one costs over each other."""
    packed = statistics.median(seconds["packed"])
    found = [duration(f"{what}, {name}", s) for name, s in seconds.items()]
    return found + [Figure(f"  packed costs over {name}", 100 * (packed / statistics.median(s) - 1), "%",
                           f"{DOCUMENTS} documents a row; medians")
                    for name, s in seconds.items() if name != "packed"]


def _steps(subject: Subject) -> dict:
    """One program, the same tokens: only where documents begin differs."""
    run, key = subject.trainer, jax.random.key(0)
    whole = subject.pretraining.loader.batch(0)

    def step(batch):
        run.state, _ = run.step(run.state, batch, key)
        jax.block_until_ready(run.state)

    batches = {name: hosts.put_batch(whole | layout(*whole["tokens"].shape, documents=count))
               for name, count in (("packed", DOCUMENTS), ("unpacked", 1))}
    return {name: functools.partial(step, batch) for name, batch in batches.items()}


def _layers(c: Config) -> dict:
    """The chosen kernel over packed rows and rows of one document, and JAX's own without documents."""
    sizes, shape = c.model.sizes, (c.train.batch // c.train.microbatches, c.data.length)
    draw = lambda heads, seed: jax.random.normal(jax.random.key(seed), (*shape, heads, sizes["H"]), c.model.dtype)
    arrays, name = (draw(sizes["N"], 0), draw(sizes["K"], 1), draw(sizes["K"], 2)), kernels.choose(c.model, shape[1])
    scale = sizes["H"] ** -0.5

    def ours(arrays, layout):
        return kernels.attend(name, *arrays, layout, layout, causal=True, scale=scale, window=0)

    def plain(arrays, layout):
        return jax.nn.dot_product_attention(*arrays, is_causal=True, scale=scale,
                                            implementation="cudnn" if name == "cudnn" else None)

    sides = {}
    for side, (kernel, count) in {"packed": (ours, DOCUMENTS), "unpacked": (ours, 1), "plain": (plain, 1)}.items():
        graded = jax.jit(jax.grad(lambda arrays, layout, kernel: kernel(arrays, layout).astype(jnp.float32).sum()),
                         static_argnums=2)
        rows = jax.device_put(Layout.of(layout(*shape, documents=count)))
        sides[side] = functools.partial(lambda *given: jax.block_until_ready(graded(*given)), arrays, rows, kernel)
    return sides


def layout(B: int, T: int, *, documents: int) -> dict[str, np.ndarray]:
    """Rows of so many documents of one length."""
    segments = np.minimum(np.arange(T) * documents // T, documents - 1).astype(np.int32)
    starts = np.searchsorted(segments, segments)
    rows = {"positions": np.arange(T) - starts, "segments": segments + 1}
    return {key: np.broadcast_to(row.astype(np.int32), (B, T)).copy() for key, row in rows.items()}
