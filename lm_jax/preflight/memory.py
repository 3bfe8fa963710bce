"""Bytes that a training step needs on each device, from its types alone.

The state is counted. What the forward pass keeps for the backward pass is asked of JAX: the step is traced, never run,
and every residual of its gradient has a type with a layout, whatever the architecture, the kernels and the remat. What
is alive for a moment only, "workspace", is a sum of its parts times a share that was fitted to the compiler's figures;
docs/preflight.md holds the estimate against them.
"""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp

from lm_jax import losses, parallel, trainer
from lm_jax.config import Config
from lm_jax.models import flops
from lm_jax.preflight import program
from lm_jax.recipes.pretrain import row_lengths

AT_ONCE = 0.55  # of what is alive for a moment, as the TPU compiler packs it: between 0.5 and 0.6 where it matters


def estimate(config: Config, mesh) -> dict[str, int]:
    """Bytes a device by part, and their "total": the predicted peak of a step on `mesh`, abstract or of devices."""
    step = program.abstract(config, mesh)
    part = _microbatch(config)
    weights = held(trainer.parameters(step.state.model))
    sizes = {
        "weights": weights,
        "optimizer": held(step.state.opt),
        "batch": held(step.batch),
        "gradients": weights * (3 if config.train.microbatches > 1 else 1),  # and a sum's old and new value
        "activations": held(residuals(part, mesh)),
        "workspace": _workspace(part, mesh, weights),
    }
    return sizes | {"total": sum(sizes.values())}


def residuals(config: Config, mesh) -> list:
    """The arrays that the forward pass of a step keeps for its backward pass, weights and batch themselves excepted."""
    step = program.abstract(config, mesh)

    def kept(model, batch, key):
        params = trainer.parameters(model)

        def scored(params):
            metrics = step.loss(trainer.with_parameters(model, params), batch, key)
            return metrics["objective"].total, metrics

        _, backward, _ = jax.vjp(scored, params, has_aux=True)
        known = {id(x) for x in jax.tree.leaves((params, batch))}
        return list({id(x): x for x in jax.tree.leaves(backward) if id(x) not in known}.values())

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.eval_shape(kept, step.state.model, step.batch, step.key)


def _workspace(config: Config, mesh, weights: int) -> int:
    """Bytes that are alive for a moment: weights as products take them, a layer's backward pass, the head's.

    A product casts its weight, brings it together from the rows' devices, and leaves its gradient in float32 before that
    is scattered; a layer computes again what remat did not keep; a chunk of logits has its gradient beside it.
    """
    cfg, (tokens, _) = config.model, row_lengths(config)
    item = jnp.dtype(cfg.dtype).itemsize
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        layered = [_together(w, mesh) for w in flops.weights(cfg) if w.kind.letters[0] == "L"]
        tables = [_together(w, mesh) for w in flops.weights(cfg) if "V" in w.kind.letters and "D" in w.kind.letters]
        logits = parallel.local_size("BTV", (config.train.batch, tokens, cfg.vocab))
        parts = losses.parts_of(config.train.batch, tokens, cfg.vocab)
        cast = 0 if item == 4 else item * weights // 4
    layer = item * sum(layered) + 4 * max(layered) + (_layer(config, mesh, "none") - _layer(config, mesh, cfg.remat)) / 2
    head = ((item + 4) * max(tables) + 2 * 4 * logits) / parts
    return int(cast + AT_ONCE * (layer + head))


def _layer(config: Config, mesh, remat: str) -> int:
    """Bytes that one more layer (of each stack) keeps for the backward pass."""
    def kept(depth):
        model = replace(config.model, depth=depth, encoder_depth=min(depth, config.model.encoder_depth), remat=remat)
        return held(residuals(replace(config, model=model), mesh))
    return max(0, kept(2) - kept(1))


def _microbatch(config: Config) -> Config:
    """The config with one microbatch as its batch."""
    t = config.train
    return replace(config, train=replace(t, batch=t.batch // t.microbatches, microbatches=1))


def held(tree) -> int:
    """Bytes of arrays that one device holds."""
    def local(a):
        shape = a.shape if a.sharding is None else a.sharding.shard_shape(a.shape)
        return math.prod(shape) * a.dtype.itemsize
    return sum(local(a) for a in jax.tree.leaves(tree) if not jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key))


def _together(w: flops.Weight, mesh) -> int:
    """Numbers of a weight, of one layer, that a device holds as a product takes it."""
    _, kept = parallel.weight_axes(w.kind.letters, w.shape)
    layers = w.shape[0] if w.kind.letters[0] == "L" else 1
    return w.size // layers // math.prod(mesh.shape[axis] for axis in kept)
