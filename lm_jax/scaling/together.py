"""Runs that differ in seed, learning rate, weight decay or initial weights alone, trained as one program by vmap.

A model of a million parameters leaves a device idle between its own small steps. Here the same arrays of all runs lie
beside each other (R, the first axis), and a program makes many steps of all of them at once, their data an argument of
it: the host is asked once for what it would be asked `STEPS` times R times. Each run keeps a folder of its own, in
which it could go on alone, and its loss curve is the one it would have alone, to the rounding of a product of matrices.
"""

import contextlib
import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax import optim, signals, trainer
from lm_jax.clock import Clock
from lm_jax.config import Config
from lm_jax.data.loader import Loader
from lm_jax.models import transformer
from lm_jax.models.layers import kinds
from lm_jax.recipes import pretrain, run
from lm_jax.trainer import Trainer
from lm_jax.workdir import Workdir

STEPS = 32  # that a program makes at most
VARIED = ("seed", "optim.lr", "optim.weight_decay", "model.init_std")


def alike(c: Config) -> Config:
    """What stacked runs have in common: their config with `VARIED` at values of no meaning."""
    optimizer = replace(c.optim, lr=1.0, weight_decay=0.0)
    return replace(c, name="", seed=0, optim=optimizer, model=replace(c.model, init_std=0.0))


@dataclass(frozen=True)
class Member:
    """One run of a stack: its recipe, its folder, its clock, and the folder of a run that it begins as."""

    recipe: pretrain.Pretraining
    workdir: Workdir
    clock: Clock
    start: str | None = None


def train(members: Sequence[Member], mesh: dict) -> list[dict]:
    """Train runs of one length to their ends or a signal; the summaries that are also in their folders."""
    begun, first = time.time(), members[0].recipe
    evaluation = pretrain.Evaluation(first)
    with contextlib.ExitStack() as stack:
        runs = []
        for member in members:
            c = member.recipe.config
            plan = member.recipe.recipe((pretrain.evaluate_every(c, evaluation),))
            one = Trainer(c, member.recipe.model(), plan, member.workdir, start=member.start, clock=member.clock,
                          quiet=bool(runs))
            runs.append(stack.enter_context(one))
            run.manifest(member.recipe, member.workdir, mesh)
        statuses = {}
        for done in sorted({one.done for one in runs}):  # where a kill left some a save behind the others
            level = [(one, member.recipe.loader) for member, one in zip(members, runs) if one.done == done]
            statuses |= dict(zip((id(one) for one, _ in level), Stack(*zip(*level)).fit()))
        return [run.ended(member.recipe, one, statuses[id(one)], evaluation, begun)
                for member, one in zip(members, runs)]


class Stack:
    """Trainers of equal configs but for `VARIED`, all after the same step, as one state; and the loader of each."""

    def __init__(self, runs: Sequence[Trainer], loaders: Sequence[Loader]):
        self.runs, self.loaders, self.done, self.last = runs, loaders, runs[0].done, runs[0].config.train.steps
        self.alive = set(range(len(runs)))
        leaves, self.structures = zip(*(jax.tree.flatten(one.state) for one in runs))  # which know each its init_std
        self.states = jax.tree.unflatten(self.structures[0], map(jnp.stack, zip(*leaves)))
        self.keys = jnp.stack([jax.random.key(one.config.seed) for one in runs])
        self.rates = tuple(jnp.array([getattr(one.config.optim, name) for one in runs])
                           for name in ("lr", "weight_decay"))
        common = alike(replace(runs[0].config, model=runs[0].state.model.cfg))
        self.advance = program(replace(common, train=replace(common.train, steps=1)))
        self._sent, self._compiled = None, False

    def fit(self) -> list[str]:
        """Train; of each run "ok", "stopped" or "diverged", as `Trainer.fit`; saved."""
        self._clock = time.perf_counter()
        with signals.caught() as stop, self._phase("step"):
            while self.done < self.last and self.alive and not stop:
                self._step()
        self._read()
        self._share()
        for one in self.runs:
            one.finish()
        over = "ok" if self.done == self.last else "stopped"
        return [over if r in self.alive else "diverged" for r in range(len(self.runs))]

    def _step(self):
        """Send as many steps as there are before anything is due, and read what was sent before."""
        due = lambda step: [hook for hook in self.runs[0].hooks if hook.due(step, self.last)]
        ends = range(self.done + 1, self.done + STEPS + 1)
        count = next((end for end in ends if due(end)), ends[-1]) - self.done
        begun = time.perf_counter()
        size = self.loaders[0].batch_size
        rows = np.arange(self.done * size, (self.done + count) * size)
        batches = _stacked([loader.rows(rows) for loader in self.loaders], count)
        waited = time.perf_counter() - begun
        with self._phase("step" if self._compiled else "compile"):
            self.states, metrics = self.advance(self.states, batches, self.keys, self.rates, self.last, count)
        self._compiled = True
        self._read()
        self._sent = (self.done, count, metrics, waited)
        self.done += count
        if due(self.done):
            self._read()
            self._share()
            for r in self.alive:
                for hook in self.runs[r].hooks:
                    if hook.due(self.done, self.last):
                        hook.do(self.runs[r])
            self._clock = time.perf_counter()

    @contextlib.contextmanager
    def _phase(self, name: str):
        with contextlib.ExitStack() as stack:
            for one in self.runs:
                stack.enter_context(one.clock.phase(name))
            yield

    def _read(self):
        """Write the rows of the steps sent last; a run whose updates are all refused is over."""
        if self._sent is None:
            return
        (first, count, metrics, waited), self._sent = self._sent, None
        metrics = jax.device_get(metrics)
        now = time.perf_counter()
        share = 1 / (count * len(self.runs))  # of the time, which the runs have in common
        seconds, self._clock = (now - self._clock) * share, now
        for r in sorted(self.alive):
            one = self.runs[r]
            for i in range(count):
                numbers = {name: values[i, r].item() for name, values in metrics.items() if name != "objective"}
                one.clock.step()
                one.meter.record(first + i + 1, numbers, seconds, waited * share)
                one.done = first + i + 1
                if one.meter.streak >= trainer.PATIENCE:
                    self.alive.discard(r)
                    break

    def _share(self):
        """Give each run its own state."""
        for one, structure, leaves in zip(self.runs, self.structures, _apart(jax.tree.leaves(self.states))):
            one.state = jax.tree.unflatten(structure, leaves)


@functools.cache
def program(c: Config):
    """The jitted (states, batches [STEPS, R, ...], keys_R, (rates_R, decays_R), steps of the run, steps to make) ->
    (states, metrics [STEPS, R]) of runs that are `alike` this config; their length is an argument too."""
    model = jax.eval_shape(partial(transformer.make, c.model, seed=0))
    loss, groups = pretrain.loss(c), kinds(model)

    def one(state, batch, key, rates, steps):
        o = replace(c.optim, lr=rates[0], weight_decay=rates[1])
        step = trainer.make_step(loss, optim.make(o, steps, groups), optim.schedule(o, steps),
                                 microbatches=c.train.microbatches)
        return step(state, batch, jax.random.fold_in(key, state.step))

    def advance(states, batches, keys_R, rates, steps, count):
        every = jax.vmap(one, in_axes=(0, 0, 0, 0, None))

        def body(i, carry):
            states, rows = carry
            batch = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), batches)
            states, metrics = every(states, batch, keys_R, rates, steps)
            return states, jax.tree.map(lambda row, new: row.at[i].set(new), rows, metrics)

        first = jax.tree.map(lambda a: a[0], batches)
        metrics = jax.eval_shape(every, states, first, keys_R, rates, steps)[1]
        rows = jax.tree.map(lambda a: jnp.zeros((STEPS, *a.shape), a.dtype), metrics)
        return jax.lax.fori_loop(0, count, body, (states, rows))

    return jax.jit(advance, donate_argnums=0)


@jax.jit
def _apart(leaves: list) -> list[list]:
    """The leaves of each run."""
    return [[leaf[r] for leaf in leaves] for r in range(len(leaves[0]))]


def _stacked(rows: list[dict], count: int):
    """So many steps' rows of each run as batches [STEPS, R, B, ...], filled up with zeros."""

    def whole(*leaves):
        batches = np.zeros((STEPS, len(leaves), len(leaves[0]) // count, *leaves[0].shape[1:]), leaves[0].dtype)
        for r, leaf in enumerate(leaves):
            batches[:count, r] = leaf.reshape(count, *batches.shape[2:])
        return batches

    return jax.tree.map(whole, *rows)
