"""The training loop: one step for any objective, and a Trainer that knows neither objective nor model."""

import contextlib
from dataclasses import dataclass
from functools import partial
from typing import Any, Callable, Iterator

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from lm_jax import checkpoint, faults, hosts, log, optim, parallel, signals
from lm_jax.batch import Batch, Loss, Mean
from lm_jax.clock import Clock
from lm_jax.config import Config, ConfigError, difference, from_dict, to_dict
from lm_jax.meter import Meter, Profile
from lm_jax.models.layers import kinds
from lm_jax.workdir import FREE, Workdir

# Keys in which runs may differ that begin alike.
LENGTH = ("train.steps:", "optim.schedule:", "optim.decay:", "optim.floor:")
PATIENCE = 50  # refused updates in a row after which a run is diverged


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """All that a run changes: donated, checkpointed and sharded as a whole."""

    step: jax.Array
    model: Any
    opt: Any


@dataclass(frozen=True)
class Every:
    """Call `do(trainer)` after every so many steps, and after the run's last one."""

    steps: int
    do: Callable[["Trainer"], None]

    def due(self, step: int, last: int) -> bool:
        return step % self.steps == 0 or step == last


@dataclass(frozen=True)
class After:
    """Call `do(trainer)` after one step."""

    step: int
    do: Callable[["Trainer"], None]

    def due(self, step: int, last: int) -> bool:
        return step == self.step


@dataclass(frozen=True)
class Recipe:
    """What a run learns: a loss, a source of batches, what may move, what to look at now and then.

    `batches(step)` is a context manager over the batches from that step on, host arrays of the rows that are needed
    here. `tokens` and `flops` are of one step over all devices, for the rates; `derived` adds to a step's row what
    follows from its numbers. `data` is a digest of what the batches are made from: a run goes on with the same or not
    at all.
    """

    loss: Loss
    batches: Callable[[int], contextlib.AbstractContextManager[Iterator[Batch]]]
    tokens: int
    flops: float
    data: str
    trainable: Any = nnx.Param
    hooks: tuple[Every | After, ...] = ()
    derived: Callable[[dict], dict] = lambda numbers: {}


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
        norms = {"grad_norm": optax.tree.norm(grads), "update_norm": optax.tree.norm(updates),
                 "param_norm": optax.tree.norm(params), "lr": rate(state.opt.accepted),
                 "skipped": opt.skipped, "streak": opt.streak}
        values = {name: m.value if isinstance(m, Mean) else m for name, m in metrics.items()}
        return State(state.step + 1, with_parameters(state.model, params), opt), values | norms

    return step


class Trainer:
    """Runs a recipe to `config.train.steps`, from where the workdir's checkpoints end.

    Where there are none yet it may `start` from those of another run, which the config would have made alike up to
    there: such runs share a trunk, and a wsd run keeps the state before its cool-down for them.
    The host never waits for the step it has just sent: a step's numbers are read while the next one runs. SIGTERM and
    SIGINT save and stop; a second signal, of several processes a second SIGINT, stops at once. `quiet` shows no bar.
    """

    def __init__(self, config: Config, model, recipe: Recipe, workdir, *, start=None, clock: Clock | None = None,
                 say=print, quiet: bool = False):
        self.config, self.recipe, self.workdir, self.clock = config, recipe, workdir, clock or Clock()
        c, trunk = config.train, optim.trunk(config.optim, config.train.steps)
        tx = optim.make(config.optim, c.steps, kinds(model, recipe.trainable))
        rate = optim.schedule(config.optim, c.steps)
        step = make_step(recipe.loss, tx, rate, trainable=recipe.trainable, microbatches=c.microbatches)
        self.step = jax.jit(step, donate_argnums=0)
        self.state = begin(model, tx, trainable=recipe.trainable)
        self.hooks = (Every(c.checkpoint_every, self.save), After(trunk, self.save), *recipe.hooks)
        self.checkpoints = checkpoint.Checkpoints(workdir.checkpoints, keep=c.keep, spare=trunk, say=say)
        self.begun = 0  # step of another run that this one started from
        with self.clock.phase("restore"):
            self.done, seconds = self.restore(start, say)  # steps, as the host counts them, and what they took
        self.log = log.Log(workdir, steps=c.steps, start=self.done, loggers=c.loggers, config=to_dict(config),
                           quiet=quiet)
        self.meter = Meter(self.log, recipe.tokens, recipe.flops, recipe.derived, every=c.log_every, clock=self.clock,
                           seconds=seconds)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.log.close()

    def restore(self, start, say) -> tuple[int, float]:
        """Go on from the newest intact checkpoint, if there is one; its step, and the seconds of training before it."""
        found = self.checkpoints.restore(saved(self.state))
        if found is None and start is not None:
            return self._branch(start, say)
        step, tree, extra = found or (0, None, {"seconds": 0.0, "begun": 0})
        if tree:
            self._same_data(extra["data"], self.workdir.path)
        evaluated = min(step, self.config.train.steps - 1)  # the last evaluation comes after the last checkpoint
        gone, lost = self.workdir.keep_metrics(step, evaluated=evaluated)
        self.clock.replayed(lost * self.config.train.log_every)
        if tree:
            self.state, self.begun = resumed(self.state, tree), extra.get("begun", 0)  # 0: from before there were branches
            say(f"resumed at step {step}" + (f"; {gone} later rows of metrics.jsonl are made again" if gone else ""))
        return step, extra["seconds"]

    def _branch(self, start, say) -> tuple[int, float]:
        """Begin as the run in folder `start` was, at the last of its checkpoints that this run would have made too."""
        most = self._shared(start)
        with contextlib.closing(checkpoint.Checkpoints(f"{start}/checkpoints", say=say)) as theirs:
            found = theirs.restore(saved(self.state), most=most)
        if found is None:
            raise ConfigError(f"--start={start} has no checkpoint of its first {most} steps, after which its learning "
                              f"rate is another (it has {theirs.steps()}): a wsd run keeps one before its cool-down")
        step, tree, extra = found
        self._same_data(extra["data"], start)
        self.workdir.take_metrics(start, step)
        self.state, self.begun = resumed(self.state, tree), step
        say(f"starts at step {step} of {start}")
        return step, extra["seconds"]

    def _shared(self, start) -> int:
        """How many first steps of the run in folder `start` this run would make too; ConfigError where it is another.
        """
        recorded = Workdir(start, writes=False).read_json("config.json")
        if recorded is None:
            raise ConfigError(f"--start={start} is no run's folder: it has no config.json")
        c, theirs = self.config, from_dict(recorded)
        if lines := [line for line in difference(recorded, to_dict(c)) if not line.startswith((*FREE, *LENGTH))]:
            raise ConfigError(f"--start={start} is of another run, which cannot be this one's beginning\n  "
                              + "\n  ".join(lines))
        if any(isinstance(stage, tuple) for stage in c.data.weights):
            raise ConfigError(f"--start={start}: data.weights has stages, which are shares of a run's length: another "
                              "length is another run from its first step")
        return optim.common(c.optim, c.train.steps, theirs.optim, theirs.train.steps)

    def _same_data(self, data: str, folder):
        if data != self.recipe.data:
            raise ConfigError(f"{folder} was trained on data {data} and the store now holds "
                              f"{self.recipe.data}: bring the old data back, or pass another --workdir")

    def save(self, *_):
        """Begin to save the state; the data position is the number of steps done."""
        c = self.config
        extra = {"config": to_dict(c), "seed": c.seed, "batches": self.done, "data": self.recipe.data,
                 "seconds": self.meter.seconds, "begun": self.begun}
        with self.clock.phase("save"):
            self.checkpoints.save(self.done, saved(self.state), extra)

    def finish(self):
        """Save the state, if the last step was not saved just now, and wait until it is on the disk."""
        self.save()
        with self.clock.phase("save"):
            self.checkpoints.wait()

    def fit(self) -> str:
        """Train; returns "ok", "stopped" (by a signal) or "diverged" (every update refused); saved."""
        c, status = self.config.train, "ok"
        key = jax.random.key(self.config.seed)
        with signals.caught() as stop, self.clock.phase("step"), self.recipe.batches(self.done) as batches, \
                Profile(c.profile, self.workdir) as profile:
            while self.done < c.steps and status == "ok":
                faults.reach("step", self.done + 1)
                profile.before(self.done + 1)
                batch = hosts.put_batch(self.meter.waited(batches), c.batch)
                with self.clock.phase("step" if self.meter.compile_seconds else "compile"):
                    self.state, metrics = self.step(self.state, batch, jax.random.fold_in(key, self.done))
                self.done += 1
                self.state = faults.struck(self.state, self.done)
                self.meter.sent(self.done, metrics)
                self.checkpoints.poll()
                profile.after(self.done, self.state)
                diverged = self.meter.streak >= PATIENCE
                status = "stopped" if signals.agreed(stop, self.done) else "diverged" if diverged else "ok"
                due = [hook for hook in self.hooks if hook.due(self.done, c.steps)]
                if due or status != "ok":
                    self.meter.flush()
                if status == "stopped":
                    self.finish()  # before anything that takes time: whoever sent the signal may not wait
                for hook in due:
                    hook.do(self)
                    self.meter.restart()
        self.finish()
        return "ok" if status == "stopped" and self.done == c.steps else status


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
