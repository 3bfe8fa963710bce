"""The training step of a config by types alone: what preflight measures and compiles."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from lm_jax import losses, optim, parallel, update
from lm_jax.config import Config
from lm_jax.models.layers import kinds
from lm_jax.models.transformer import Transformer
from lm_jax.recipes.pretrain import row_lengths


@dataclass(frozen=True)
class Program:
    """A step and the types, laid out on a mesh, of what it takes."""

    loss: Callable
    step: Callable
    state: update.State
    batch: dict
    key: Any


def abstract(config: Config, mesh) -> Program:
    """The step that `train` would run on `mesh`, abstract or of devices. The model's vocabulary must be known."""
    c = config.train
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        make = lambda: Transformer(config.model, rngs=nnx.Rngs(0))
        tx = optim.make(config.optim, c.steps, kinds(jax.eval_shape(make)))
        loss = partial(losses.next_token, z_loss=c.z_loss, smoothing=c.smoothing)
        step = update.make_step(loss, tx, optim.schedule(config.optim, c.steps), microbatches=c.microbatches)
        state = jax.eval_shape(lambda: update.begin(make(), tx))
        types = state, batch(config), jax.eval_shape(lambda: jax.random.key(0))
    return Program(loss, step, *parallel.on_mesh(types, mesh))


def check(config: Config, mesh) -> dict:
    """Trace the whole step on `mesh`, abstract or of devices: losses, backward pass, microbatches and update. The types
    of its metrics; what is laid out wrong is an error of JAX's on the line that caused it, or a TypeError here."""
    step = abstract(config, mesh)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        state, metrics = jax.eval_shape(step.step, step.state, step.batch, step.key)
    for (path, new), old in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(step.state), strict=True):
        if (new.shape, new.dtype, _layout(new)) != (old.shape, old.dtype, _layout(old)):
            raise TypeError(f"a step makes of {jax.tree_util.keystr(path)} {old} another array: {new}")
    return metrics


def batch(config: Config) -> dict:
    """The types of a step's batch, laid out as rows are on the mesh in use."""
    tokens, source = row_lengths(config)
    B, mesh = config.train.batch, jax.sharding.get_abstract_mesh()

    def rows(T, *keys):
        layout = NamedSharding(mesh, parallel.activation("BT", (B, T)))
        types = {"weights": jnp.float32, "pair_weights": jnp.float32}
        return {key: jax.ShapeDtypeStruct((B, T), types.get(key, jnp.int32), sharding=layout) for key in keys}

    whole = rows(tokens, "tokens", "targets", "weights", "positions", "segments")
    if config.data.objective == "prefix":
        whole |= rows(tokens, "order")
    if config.model.head == "mlm_pairs":
        whole |= rows(tokens, "types", "pair_targets", "pair_weights")
    if source:
        whole["source"] = rows(source, "tokens", "positions", "segments")
    return whole


def _layout(a) -> tuple:
    """The axes that divide each dimension of an array."""
    spec = () if a.sharding is None else a.sharding.spec
    return (*spec, *(None,) * (len(a.shape) - len(spec)))
