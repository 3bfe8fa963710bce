"""One optimizer step for any objective, and the state that it changes."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from lm_jax import faults, optim, parallel
from lm_jax.batch import Batch, Loss, Mean


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """All that a run changes: donated, checkpointed and sharded as a whole."""

    step: jax.Array
    model: Any
    opt: Any


def begin(model, tx, *, trainable=nnx.Param) -> State:
    """The state before the first step; the optimizer's arrays lie where the weights do."""
    opt = jax.jit(tx.init)(parameters(model, trainable))
    return State(jnp.zeros((), jnp.int32), model, opt)


def make_step(loss: Loss, tx, rate, *, trainable=nnx.Param, microbatches: int = 1):
    """One optimizer step for any objective: (State, Batch, key) -> (State, metrics), to be jitted with State donated.

    Gradients of the summed objective, over all microbatches, are divided once by its summed weight: the step is that of
    the whole batch however it is cut. `rate` is the learning-rate schedule, for the record.
    """

    def scored(params, model, batch, key):
        metrics = loss(with_parameters(model, params), batch, key)
        return metrics["objective"].total, metrics

    def step(state: State, batch: Batch, key):
        params = parameters(state.model, trainable)
        gradient = partial(jax.grad(scored, has_aux=True), params, state.model)
        grads, metrics = _summed(gradient, batch, key, microbatches)
        grads = jax.tree.map(lambda g: g / metrics["objective"].weight, grads)
        grads = faults.poisoned(grads, state.step + 1)
        updates, opt = tx.update(grads, state.opt, params, loss=metrics["loss"].value)
        params = optax.apply_updates(params, updates)
        first, last = optim.burst(opt.refused)
        norms = {"grad_norm": optax.tree.norm(grads), "update_norm": optax.tree.norm(updates),
                 "param_norm": optax.tree.norm(params), "lr": rate(state.opt.accepted),
                 "skipped": opt.skipped, "burst_first": first, "burst_last": last}
        values = {name: m.value if isinstance(m, Mean) else m for name, m in metrics.items()}
        return State(state.step + 1, with_parameters(state.model, params), opt), values | norms

    return step


def parameters(model, trainable=nnx.Param) -> dict:
    """A model's parameters as nested dicts of arrays: what optimizers and checkpoints see."""
    return nnx.to_pure_dict(nnx.state(model, trainable))


def with_parameters(model, params: dict):
    """The model with some of its parameters replaced."""
    graph, state = nnx.split(model)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


def saved(state: State) -> dict:
    """What a checkpoint holds of a state: nested dicts of arrays, and the optimizer's state."""
    return {"step": state.step, "params": parameters(state.model), "opt": state.opt}


def resumed(state: State, tree: dict) -> State:
    """`state` with the arrays of a checkpoint."""
    return State(tree["step"], with_parameters(state.model, tree["params"]), tree["opt"])


def evaluated(state: State):
    """The model to evaluate, sample and export: with the average of its weights where one is kept, else as it is."""
    return with_parameters(state.model, optim.ema_params(state.opt)) if state.opt.ema != () else state.model


def _summed(gradient, batch, key, parts: int):
    """Gradients and metrics of `gradient(batch, key)` summed over microbatches, rows staying on their devices."""
    if parts == 1:
        return gradient(batch, key)
    cut = jax.tree.map(lambda a_BT: parallel.split(a_BT, parts, axis=0), batch)
    keys = jax.random.split(key, parts)
    first = jax.tree.map(lambda a: a[0], cut)
    zeros = jax.tree.map(lambda a: jnp.zeros_like(a), jax.eval_shape(gradient, first, key))
    add = lambda total, xs: (jax.tree.map(jnp.add, total, gradient(*xs)), None)
    return jax.lax.scan(add, zeros, (cut, keys))[0]
