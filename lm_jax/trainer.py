"""The training loop: one step for any objective, and a Trainer that knows neither objective nor model."""

import contextlib
import signal
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental import multihost_utils

from lm_jax import checkpoint, log, optim, parallel
from lm_jax.batch import Batch, Loss, Mean
from lm_jax.config import Config, to_dict
from lm_jax.models.layers import kinds

PATIENCE = 50  # refused updates in a row after which a run is diverged
PROFILED = 5  # steps in a profile


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


@dataclass(frozen=True)
class Recipe:
    """What a run learns: a loss, a source of batches, what may move, what to look at now and then.

    `batches(step)` is a context manager over the batches (host arrays) from that step on. `tokens` and `flops` are of
    one step over all devices, for the rates; `derived` adds to a step's row what follows from its numbers.
    """

    loss: Loss
    batches: Callable[[int], contextlib.AbstractContextManager[Iterator[Batch]]]
    tokens: int
    flops: float
    trainable: Any = nnx.Param
    hooks: tuple[Every, ...] = ()
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
        metrics = loss(_with(model, params), batch, key)
        return metrics["objective"].total, metrics

    def step(state: State, batch: Batch, key):
        params = parameters(state.model, trainable)
        gradient = partial(jax.grad(scored, has_aux=True), params, state.model)
        grads, metrics = _summed(gradient, batch, key, microbatches)
        grads = jax.tree.map(lambda g: g / metrics["objective"].weight, grads)
        updates, opt = tx.update(grads, state.opt, params, loss=metrics["loss"].value)
        params = optax.apply_updates(params, updates)
        norms = {"grad_norm": optax.global_norm(grads), "update_norm": optax.global_norm(updates),
                 "param_norm": optax.global_norm(params), "lr": rate(state.opt.accepted),
                 "skipped": opt.skipped, "streak": opt.streak}
        values = {name: m.value if isinstance(m, Mean) else m for name, m in metrics.items()}
        return State(state.step + 1, _with(state.model, params), opt), values | norms

    return step


class Trainer:
    """Runs a recipe to `config.train.steps`, from where the workdir's checkpoints end.

    The host never waits for the step it has just sent: a step's numbers are read while the next one runs. SIGTERM and
    SIGINT save and stop; a second signal stops at once.
    """

    def __init__(self, config: Config, model, recipe: Recipe, workdir, *, say=print):
        self.config, self.recipe, self.workdir = config, recipe, workdir
        c = config.train
        tx = optim.make(config.optim, c.steps, kinds(model))
        rate = optim.schedule(config.optim, c.steps)
        step = make_step(recipe.loss, tx, rate, trainable=recipe.trainable, microbatches=c.microbatches)
        self.step = jax.jit(step, donate_argnums=0)
        self.state = begin(model, tx, trainable=recipe.trainable)
        self.checkpoints = checkpoint.Checkpoints(workdir.checkpoints, keep=c.keep, say=say)
        self.done, seconds = self.restore(say)  # steps, as the host counts them, and what they took
        self.log = log.Log(workdir, steps=c.steps, start=self.done, loggers=c.loggers, config=to_dict(config))
        self.meter = Meter(recipe, self.log, every=c.log_every, seconds=seconds)

    def restore(self, say) -> tuple[int, float]:
        """Go on from the newest intact checkpoint, if there is one; its step, and the seconds of training before it."""
        found = self.checkpoints.restore(_saved(self.state))
        step, saved, extra = found or (0, None, {"seconds": 0.0})
        gone = self.workdir.keep_metrics(step)
        if saved:
            self.state = State(saved["step"], _with(self.state.model, saved["params"]), saved["opt"])
            say(f"resumed at step {step}" + (f"; {gone} later rows of metrics.jsonl are made again" if gone else ""))
        return step, extra["seconds"]

    def save(self, *_):
        """Begin to save the state; the data position is the number of steps done."""
        c = self.config
        extra = {"config": to_dict(c), "seed": c.seed, "batches": self.done, "seconds": self.meter.seconds}
        self.checkpoints.save(self.done, _saved(self.state), extra)

    def fit(self) -> str:
        """Train; returns "ok", "stopped" (by a signal) or "diverged" (every update refused). The last state is saved."""
        c, status = self.config.train, "ok"
        hooks = (*self.recipe.hooks, Every(c.checkpoint_every, self.save))
        with _signals() as stop, self.recipe.batches(self.done) as batches, Profile(c.profile, self.workdir) as profile:
            while self.done < c.steps and status == "ok":
                profile.before(self.done + 1)
                batch = parallel.put_batch(self.meter.waited(batches))
                key = jax.random.fold_in(jax.random.key(self.config.seed), self.done)
                self.state, metrics = self.step(self.state, batch, key)
                self.done += 1
                self.meter.sent(self.done, metrics)
                profile.after(self.done, self.state)
                status = "stopped" if _agreed(stop, self.done) else "diverged" if self.meter.streak >= PATIENCE else "ok"
                due = [hook for hook in hooks if self.done % hook.steps == 0 or self.done == c.steps]
                if due or status != "ok":
                    self.meter.flush()
                for hook in due:
                    hook.do(self)
                    self.meter.restart()
        self.save()  # nothing to do if the last step was saved just now
        self.checkpoints.wait()
        return status if self.done < c.steps else "ok"


@dataclass
class Meter:
    """Times steps and writes their rows, one step late, so that the device always has the next one waiting."""

    recipe: Recipe
    log: log.Log
    every: int
    seconds: float = 0.0  # spent in steps, those before a restart included
    streak: int = 0  # updates refused in a row, as of the last step read
    _wait: float = 0.0
    _pending: tuple | None = None
    _last: float = field(default_factory=time.perf_counter)

    def waited(self, batches) -> Batch:
        """The next batch; the time it took is data wait."""
        begun = time.perf_counter()
        batch = next(batches)
        self._wait += time.perf_counter() - begun
        return batch

    def sent(self, step: int, metrics):
        """A step has been sent to the device: read the one before."""
        previous, self._pending = self._pending, (step, metrics, self._wait)
        self._wait = 0.0
        self._read(previous)

    def flush(self):
        """Read the last step sent."""
        self._read(self._pending)
        self._pending = None

    def restart(self):
        """Do not count what a hook took as time of a step."""
        self._last = time.perf_counter()

    def _read(self, pending):
        if pending is None:
            return
        step, metrics, wait = pending
        metrics = jax.device_get(metrics)
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self.seconds += seconds
        self.streak = int(metrics.pop("streak"))
        if step % self.every == 0 or step == 1:
            numbers = _numbers(metrics)
            self.log.row(step, numbers | {"tokens": step * self.recipe.tokens} | self.recipe.derived(numbers)
                         | self._rates(seconds, wait))

    def _rates(self, seconds, wait):
        """What a step's time says; MFU only on a device whose peak is known."""
        flops = self.recipe.flops / seconds
        peak = log.peak_flops(jax.devices()[0].device_kind)
        mfu = {"mfu": flops / (peak * jax.device_count())} if peak else {}
        return {"seconds": seconds, "tokens_per_second": self.recipe.tokens / seconds, "flops_per_second": flops, **mfu,
                "data_wait": wait, "data_wait_fraction": min(wait / seconds, 1.0), **log.peak_memory()}


class Profile:
    """A trace of `PROFILED` steps from step `first` on, in <workdir>/profile, for TensorBoard or Perfetto; 0 is none."""

    def __init__(self, first: int, workdir):
        self.first, self.folder, self.running = first, str(workdir.path / "profile"), False

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.running:
            jax.profiler.stop_trace()

    def before(self, step: int):
        if step == self.first:
            jax.profiler.start_trace(self.folder)
            self.running = True

    def after(self, step: int, state: State):
        if self.running and step == self.first + PROFILED - 1:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self.running = False


def parameters(model, trainable=nnx.Param) -> dict:
    """A model's parameters as nested dicts of arrays: what optimizers and checkpoints see."""
    return nnx.to_pure_dict(nnx.state(model, trainable))


def evaluated(state: State):
    """The model to evaluate, sample and export: with the average of its weights where one is kept, else as it is."""
    return _with(state.model, optim.ema_params(state.opt)) if state.opt.ema != () else state.model


def _with(model, params: dict):
    """The model with some of its parameters replaced."""
    graph, state = nnx.split(model)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


def _summed(gradient, batch, key, parts: int):
    """Gradients and metrics of `gradient(batch, key)` summed over microbatches, rows staying on their devices."""
    if parts == 1:
        return gradient(batch, key)
    cut = jax.tree.map(lambda a_BT: parallel.split(a_BT, parts, axis=0), batch)
    keys = jax.random.split(key, parts)
    first = jax.tree.map(lambda a: a[0], cut)
    zeros = jax.tree.map(lambda a: jnp.zeros_like(a), jax.eval_shape(gradient, first, key))
    add = lambda total, xs: (jax.tree.map(jnp.add, total, gradient(*xs)), None)
    return jax.lax.scan(add, zeros, (cut, keys), unroll=parallel.on_cpu())[0]


def _saved(state: State) -> dict:
    return {"step": state.step, "params": parameters(state.model), "opt": state.opt}


def _numbers(metrics) -> dict:
    return {name: np.asarray(value).item() for name, value in metrics.items() if name != "objective"}


@contextlib.contextmanager
def _signals():
    """A list that a SIGTERM or SIGINT makes non-empty; the second one acts as it would without us."""
    seen = []

    def note(number, frame):
        seen.append(number)
        for s, handler in before.items():
            signal.signal(s, handler)

    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        for s in before:
            signal.signal(s, note)
    except ValueError:  # not the main thread: whoever owns it owns the signals
        before = {}
    try:
        yield seen
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def _agreed(stop: list, step: int) -> bool:
    """Whether to stop after this step; all processes stop after the same one."""
    if jax.process_count() == 1:
        return bool(stop)
    return multihost_utils.reached_preemption_sync_point(step)
