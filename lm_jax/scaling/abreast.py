"""Steps of several runs at once, by the way that keeps a device busy with small models.

An accelerator is idle between the operations of a small model's step: there the runs are `Stacked`. A core is busy with
one run's, and its caches hold that run's arrays and not eight's, but cores that share an operation of a few
microseconds mostly wait for each other: there the runs are `Spread`, and each core is sent the steps of other runs.
"""

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax import devices, optim, parallel, update
from lm_jax.config import Config
from lm_jax.models import transformer
from lm_jax.models.layers import kinds
from lm_jax.recipes import pretrain


def begin(configs: Sequence[Config], states: Sequence[update.State], *, room: int) -> "Stacked | Spread":
    """Runs whose configs, with their vocabulary, are `alike`, after the same step; `room` is how many a call makes at
    most. The states are given away."""
    return (Spread if parallel.on_cpu() else Stacked)(configs, states, room=room)


def alike(c: Config) -> Config:
    """What such runs have in common: their config with what may vary at values of no meaning."""
    optimizer = replace(c.optim, lr=1.0, weight_decay=0.0)
    return replace(c, name="", seed=0, optim=optimizer, model=replace(c.model, init_std=0.0))


class Stacked:
    """The same arrays of all runs beside each other (R, the first axis), and one program that makes steps of all."""

    def __init__(self, configs: Sequence[Config], states: Sequence[update.State], *, room: int):
        self.room = room
        leaves, self.structures = zip(*map(jax.tree.flatten, states))
        common = _common(configs[0])
        self.states_R = jax.tree.unflatten(_structure(common), map(jnp.stack, zip(*leaves)))
        self.own_R = [jnp.stack(values) for values in zip(*map(_own, configs))]
        self.program = _many_steps(common)

    def __str__(self):
        return f"one program of {len(self.structures)} runs"

    def advance(self, rows: dict[int, dict], *, of: int, count: int):
        """Send the next `count` steps of runs of so many; rows by the number of the run, in host memory, as arrays
        [count B, ...]. A run without rows has ended: this program makes its steps from another's, for nobody."""
        rows = [rows.get(r, next(iter(rows.values()))) for r in range(len(self.structures))]
        batches = jax.tree.map(partial(_filled, count=count, room=self.room), *rows)
        self.states_R, metrics = self.program(self.states_R, batches, *self.own_R, of, count)
        return metrics

    @staticmethod
    def metrics(sent) -> dict[int, dict]:
        """Of each run that had rows, and of others what nobody asks for, by its number: arrays [steps] of the steps
        that were sent, once they are made."""
        found = jax.device_get(sent)
        return {r: {name: values[:, r] for name, values in found.items()} for r in range(found["loss"].shape[1])}

    def states(self) -> list[update.State]:
        """Of each run."""
        return list(map(jax.tree.unflatten, self.structures, _apart(jax.tree.leaves(self.states_R))))

    def close(self):
        """No step is sent any more; nothing of the host's is held."""


class Spread:
    """Each run's arrays by themselves; a thread for each core sends the steps of its own runs, one after another.

    JAX runs what one thread has sent in the order in which it was sent, and beside it what another has.
    """

    def __init__(self, configs: Sequence[Config], states: Sequence[update.State], *, room: int):
        leaves, self.structures = zip(*map(jax.tree.flatten, states))
        common = _common(configs[0])
        self.each = [jax.tree.unflatten(_structure(common), own) for own in leaves]
        self.own = list(map(_own, configs))
        self.program, self.step = _one_step(common), None
        self.threads = [ThreadPoolExecutor(1) for _ in range(min(len(states), devices.cores()))]
        self.sent, self.closed = {}, False  # the latest of each run

    def __str__(self):
        return f"{len(self.each)} runs, {len(self.threads)} at a time on {devices.cores()} cores"

    def advance(self, rows: dict[int, dict], *, of: int, count: int):
        """As `Stacked.advance`, but no step is made of a run that has ended."""
        batches = {r: [{name: a.reshape(count, -1, *a.shape[1:])[i] for name, a in own.items()} for i in range(count)]
                   for r, own in rows.items()}
        if self.step is None:  # here, or each thread would compile it; JAX knows a program that it has compiled
            r, own = next(iter(batches.items()))
            self.step = self.program.lower(self.each[r], own[0], *self.own[r], of).compile()
        threads = {r: self.threads[r % len(self.threads)] for r in batches}
        sent = {r: threads[r].submit(self._advance, r, own, of) for r, own in batches.items()}
        self.sent |= sent
        return sent

    @staticmethod
    def metrics(sent) -> dict[int, dict]:
        """As `Stacked.metrics`."""
        runs = {r: jax.device_get(one.result()) for r, one in sent.items()}
        return {r: {name: np.array([step[name] for step in run]) for name in run[0]} for r, run in runs.items()}

    def states(self) -> list[update.State]:
        """As `Stacked.states`."""
        for one in self.sent.values():
            one.result()
        return list(map(jax.tree.unflatten, self.structures, map(jax.tree.leaves, self.each)))

    def close(self):
        """End the threads; what was sent and has not begun is not done."""
        self.closed = True
        for thread in self.threads:
            thread.shutdown(cancel_futures=True)

    def _advance(self, r: int, batches: list[dict], of: int) -> list[dict]:
        """Metrics of a run's steps; no more than two are on their way."""
        found = []
        for batch in batches:
            if self.closed:
                break
            self.each[r], metrics = self.step(self.each[r], batch, *self.own[r], of)
            jax.block_until_ready(found[-1:])
            found.append(metrics)
        return jax.block_until_ready(found)


def _common(c: Config) -> Config:
    """What a program depends on: not the run's length, which is an argument."""
    c = alike(c)
    return replace(c, train=replace(c.train, steps=1))


def _own(c: Config):
    """What a run has for itself: its key, learning rate and weight decay."""
    return jax.random.key(c.seed), jnp.float32(c.optim.lr), jnp.float32(c.optim.weight_decay)


@functools.cache
def _structure(c: Config):
    """Of the state of a run that is `alike` this config. A run's own knows its init_std: programs of it would be as
    many as there are."""
    def begun():
        model = transformer.make(c.model, seed=0)
        return update.begin(model, optim.make(c.optim, c.train.steps, kinds(model)))

    return jax.tree.structure(jax.eval_shape(begun))


@functools.cache
def _one_step(c: Config):
    """The jitted (state, batch, key, learning rate, weight decay, steps of the run) -> (state, metrics) of a run that
    is `alike` this config."""
    groups, loss = kinds(jax.eval_shape(partial(transformer.make, c.model, seed=0))), pretrain.loss(c)

    def step(state, batch, key, lr, decay, steps):
        o = replace(c.optim, lr=lr, weight_decay=decay)
        one = update.make_step(loss, optim.make(o, steps, groups), optim.schedule(o, steps),
                               microbatches=c.train.microbatches)
        return one(state, batch, jax.random.fold_in(key, state.step))

    return jax.jit(step, donate_argnums=0)


@functools.cache
def _many_steps(c: Config):
    """The jitted (states, batches [room, R, ...], keys_R, rates_R, decays_R, steps of the run, steps to make) ->
    (states, metrics [room, R]) of runs that are `alike` this config."""
    step = jax.vmap(_one_step(c), in_axes=(0, 0, 0, 0, 0, None))

    def advance(states, batches, keys_R, rates_R, decays_R, steps, count):
        every = lambda states, batch: step(states, batch, keys_R, rates_R, decays_R, steps)

        def body(i, carry):
            states, rows = carry
            batch = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), batches)
            states, metrics = every(states, batch)
            return states, jax.tree.map(lambda row, new: row.at[i].set(new), rows, metrics)

        metrics = jax.eval_shape(every, states, jax.tree.map(lambda a: a[0], batches))[1]
        room = len(jax.tree.leaves(batches)[0])
        rows = jax.tree.map(lambda a: jnp.zeros((room, *a.shape), a.dtype), metrics)
        return jax.lax.fori_loop(0, count, body, (states, rows))

    return jax.jit(advance, donate_argnums=0)


@jax.jit
def _apart(leaves: list) -> list[list]:
    """The leaves of each run."""
    return [[leaf[r] for leaf in leaves] for r in range(len(leaves[0]))]


def _filled(*leaves, count: int, room: int):
    """So many steps' rows of each run as a batch [room, R, B, ...], filled up with zeros."""
    batches = np.zeros((room, len(leaves), len(leaves[0]) // count, *leaves[0].shape[1:]), leaves[0].dtype)
    for r, leaf in enumerate(leaves):
        batches[:count, r] = leaf.reshape(count, *batches.shape[2:])
    return batches
