"""Bytes that a training step needs on each device, from its types alone.

The state is counted. What the forward pass keeps for the backward pass is asked of JAX: the step is traced, never run,
and every residual of its gradient has a type with a layout, whatever the architecture, the kernels and the remat. A
step is fullest in the backward pass of a layer or as the loss is made; what each needs for a moment is estimated, and
docs/preflight.md holds the whole against the TPU compiler's own peak.
"""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp

from lm_jax import losses, parallel, update
from lm_jax.config import Config
from lm_jax.models import flops
from lm_jax.preflight import program
from lm_jax.recipes.pretrain import row_lengths

# Fitted to the TPU compiler's peaks of 1B to 70B models (docs/preflight.md).
IN_FLIGHT = 1.5  # of a layer's weights and of the largest gradient: the next ones come while these are used
WRITTEN = 0.45  # of what a layer computes again, the share that XLA writes out; the rest is fused into what reads it


def estimate(config: Config, mesh) -> dict[str, int]:
    """Bytes a device by part, and their "total": the predicted peak of a step on `mesh`, abstract or of devices."""
    step, part = program.abstract(config, mesh), _microbatch(config)
    weights = held(update.parameters(step.state.model))
    own, outer = _layer(part, mesh, config.model.remat)
    again = max(0, _layer(part, mesh, "none")[0] - own) * WRITTEN
    cast = 0 if config.model.dtype == "float32" else weights // 2  # shards in bfloat16, made once for all layers
    layer, head = _passing(part, mesh)
    sizes = {
        "weights": weights,
        "optimizer": held(step.state.opt),
        "batch": held(step.batch),
        "gradients": weights * (2 if config.train.microbatches > 1 else 1),  # of the microbatch, and their sum
        "activations": held(residuals(part, mesh)) - outer,  # of layers
        "workspace": int(cast + max(layer + again, head + outer - weights)),  # at the head no gradients are there yet
    }
    return sizes | {"total": sum(sizes.values())}


def residuals(config: Config, mesh) -> list:
    """The arrays that the forward pass of a step keeps for its backward pass, weights and batch themselves excepted."""
    step = program.abstract(config, mesh)

    def kept(model, batch, key):
        params = update.parameters(model)

        def scored(params):
            metrics = step.loss(update.with_parameters(model, params), batch, key)
            return metrics["objective"].total, metrics

        _, backward, _ = jax.vjp(scored, params, has_aux=True)
        known = {id(x) for x in jax.tree.leaves((params, batch))}
        return list({id(x): x for x in jax.tree.leaves(backward) if id(x) not in known}.values())

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.eval_shape(kept, step.state.model, step.batch, step.key)


def held(tree) -> int:
    """Bytes of arrays that one device holds."""
    def local(a):
        shape = a.shape if a.sharding is None else a.sharding.shard_shape(a.shape)
        return math.prod(shape) * a.dtype.itemsize
    return sum(local(a) for a in jax.tree.leaves(tree) if not jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key))


def _layer(config: Config, mesh, remat: str) -> tuple[int, int]:
    """Bytes that a layer (of each stack) keeps for the backward pass, and those that are kept besides layers."""
    def kept(depth):
        model = replace(config.model, depth=depth, encoder_depth=min(depth, config.model.encoder_depth), remat=remat)
        return held(residuals(replace(config, model=model), mesh))
    one, two = kept(1), kept(2)
    own = max(0, two - one)
    return own, max(0, one - own)


def _passing(config: Config, mesh) -> tuple[int, int]:
    """Bytes for a moment in the backward pass of a layer, besides what is computed again, and while the loss is made.

    Weights as a product takes them, brought together from the tokens' devices; one gradient in float32 before it is
    scattered (the output table's grows from part to part); a part of the logits, and of their gradient.
    """
    cfg, (tokens, _) = config.model, row_lengths(config)
    item = jnp.dtype(cfg.dtype).itemsize
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        layered = [_together(w) for w in flops.weights(cfg) if w.kind.letters[0] == "L"]
        tables = [_together(w) for w in flops.weights(cfg) if "V" in w.kind.letters and "D" in w.kind.letters]
        logits = parallel.local_size("BTV", (config.train.batch, tokens, cfg.vocab))
        parts = losses.parts_of(config.train.batch, tokens, cfg.vocab)
    layer = IN_FLIGHT * (item * sum(layered) + 4 * max(layered))
    return int(layer), int((item + IN_FLIGHT * 4) * max(tables)) + (4 + item) * logits // parts


def _microbatch(config: Config) -> Config:
    """The config with one microbatch as its batch."""
    t = config.train
    return replace(config, train=replace(t, batch=t.batch // t.microbatches, microbatches=1))


def _together(w: flops.Weight) -> int:
    """Numbers of a weight, of one layer, that a device holds as a product takes it."""
    _, kept = parallel.weight_axes(w.kind.letters, w.shape)
    layers = w.shape[0] if w.kind.letters[0] == "L" else 1
    return w.size // layers // parallel.devices_along(kept)
