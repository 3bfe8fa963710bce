"""The training loop: a Trainer that knows neither objective nor model, and can be ended and begun again anywhere."""

import contextlib
import math
from dataclasses import dataclass
from typing import Any, Callable, Iterator

import jax
import numpy as np
from flax import nnx

from lm_jax import checkpoint, faults, fingerprint, hosts, log, optim, signals, update
from lm_jax.batch import Batch, Loss
from lm_jax.clock import Clock
from lm_jax.config import Config, ConfigError, difference, from_dict, to_dict
from lm_jax.meter import Meter, Profile
from lm_jax.models.layers import kinds
from lm_jax.workdir import Workdir, bound

# Keys in which runs may differ that begin alike.
LENGTH = ("train.steps:", "optim.schedule:", "optim.decay:", "optim.floor:")


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


class Trainer:
    """Runs a recipe to `config.train.steps`, from where the workdir's checkpoints end.

    Where there are none yet it may `start` from those of another run, which the config would have made alike up to
    there: such runs share a trunk, and a wsd run keeps the state before its cool-down for them.
    After a burst of refused updates it goes back to the checkpoint before it, and on with the batches after it.
    The host never waits for the step it has just sent: a step's numbers are read while the next one runs. SIGTERM and
    SIGINT save and stop; a second signal stops at once. What is due after a step follows its checkpoint, and a run that
    goes on from there does it, again or for the first time. `quiet` shows no bar.
    """

    def __init__(self, config: Config, model, recipe: Recipe, workdir, *, start=None, clock: Clock | None = None,
                 say=print, quiet: bool = False):
        self.config, self.recipe, self.workdir, self.clock = config, recipe, workdir, clock or Clock()
        c, trunk = config.train, optim.trunk(config.optim, config.train.steps)
        tx = optim.make(config.optim, c.steps, kinds(model, recipe.trainable))
        rate = optim.schedule(config.optim, c.steps)
        step = update.make_step(recipe.loss, tx, rate, trainable=recipe.trainable, microbatches=c.microbatches)
        self.step, self._key = jax.jit(step, donate_argnums=0), jax.random.key(config.seed)
        self.state = update.begin(model, tx, trainable=recipe.trainable)
        self.hooks = (Every(c.compare_every or c.steps, self.compare), Every(c.checkpoint_every, self.save_in_time),
                      After(trunk, self.save), *recipe.hooks)
        self.checkpoints = checkpoint.Checkpoints(workdir.checkpoints, keep=c.keep, spare=trunk, say=say)
        self.begun = 0  # step of another run that this one started from
        self.rollbacks = []  # {"from": step, "to": an earlier one} of each; the batches between them were skipped
        self.unsaved = 0  # saves that were left out, as the one before was still going on
        self.say = say
        with self.clock.phase("restore"):
            self.done, seconds = self.restore(start, say)  # steps, as the host counts them, and what they took
        self._log = lambda: log.Log(workdir, steps=c.steps, start=self.done, loggers=c.loggers, config=to_dict(config),
                                    quiet=quiet)
        self.log = self._log()
        burst = tuple(map(int, optim.burst(np.asarray(self.state.opt.refused))))
        self.meter = Meter(self.log, recipe.tokens, recipe.flops, recipe.derived, every=c.log_every, clock=self.clock,
                           seconds=seconds, burst=burst if burst[0] >= 0 else None)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.log.close()
        with self.clock.phase("save"), contextlib.suppress(checkpoint.CheckpointError):
            self.checkpoints.wait()  # where an error ends the run amid a save: Python's own end would wait for ever

    def restore(self, start, say) -> tuple[int, float]:
        """Go on from the newest intact checkpoint, if there is one; its step, and the seconds of training before it."""
        found = self.checkpoints.restore(update.saved(self.state), donate=True)
        if found is None and start is not None:
            return self._branch(start, say)
        step, tree, extra = found or (0, None, {"seconds": 0.0})
        if tree:
            self._same_data(extra["data"], self.workdir.path)
            self._same_config(extra["config"])
        gone = self._cut(step)
        if tree:
            self._take(tree, extra)
            say(f"resumed at step {step}" + (f"; {gone} later rows of metrics.jsonl are made again" if gone else ""))
        return step, extra["seconds"]

    def _evaluated(self, step: int) -> int:
        """The step of the last evaluation that is not made after a restart at `step`."""
        last = self.config.train.steps
        return step - 1 if step == last or any(hook.due(step, last) for hook in self.recipe.hooks) else step

    def _branch(self, start, say) -> tuple[int, float]:
        """Begin as the run in folder `start` was, at the last of its checkpoints that this run would have made too."""
        most = self._shared(start)
        with contextlib.closing(checkpoint.Checkpoints(f"{start}/checkpoints", say=say)) as theirs:
            found = theirs.restore(update.saved(self.state), most=most, donate=True)
        if found is None:
            raise ConfigError(f"--start={start} has no checkpoint of its first {most} steps, after which its learning "
                              f"rate is another (it has {theirs.steps()}): a wsd run keeps one before its cool-down")
        step, tree, extra = found
        self._same_data(extra["data"], start)
        self.workdir.take_metrics(start, step, evaluated=self._evaluated(step))
        self._take(tree, extra | {"begun": step})
        say(f"starts at step {step} of {start}")
        return step, extra["seconds"]

    def _shared(self, start) -> int:
        """How many first steps of the run in folder `start` this run would make too; ConfigError where it is another.
        """
        recorded = Workdir(start, writes=False).read_json("config.json")
        if recorded is None:
            raise ConfigError(f"--start={start} is no run's folder: it has no config.json")
        c, theirs = self.config, from_dict(recorded)
        if lines := bound(difference(recorded, to_dict(c)), *LENGTH):
            raise ConfigError(f"--start={start} is of another run, which cannot be this one's beginning\n  "
                              + "\n  ".join(lines))
        if any(isinstance(stage, tuple) for stage in c.data.weights):
            raise ConfigError(f"--start={start}: data.weights has stages, which are shares of a run's length: another "
                              "length is another run from its first step")
        return optim.common(c.optim, c.train.steps, theirs.optim, theirs.train.steps)

    def _same_config(self, saved: dict):
        """A folder may have lost its config.json; its checkpoints know."""
        if lines := bound(difference(saved, to_dict(self.config))):
            raise ConfigError(f"{self.workdir.path} has checkpoints of a run with another config: pass another "
                              "--workdir, or the config that they were saved with\n  " + "\n  ".join(lines))

    def _same_data(self, data: str, folder):
        if data != self.recipe.data:
            raise ConfigError(f"{folder} was trained on data {data} and the store now holds "
                              f"{self.recipe.data}: bring the old data back, or pass another --workdir")

    def _take(self, tree: dict, extra: dict):
        """Go on with what a checkpoint has."""
        self.state = update.resumed(self.state, tree)
        self.begun, self.rollbacks = extra["begun"], extra["rollbacks"]

    def _cut(self, step: int) -> int:
        """Take the rows of later steps, which will be made again, out of the record; how many."""
        gone, lost = self.workdir.keep_metrics(step, evaluated=self._evaluated(step))
        self.clock.replayed(lost * self.config.train.log_every)
        return gone

    @property
    def skipped(self) -> int:
        """Batches that rollbacks have skipped, by which the next one's number is larger than the steps done."""
        return sum(one["from"] - one["to"] for one in self.rollbacks)

    def compare(self, *_):
        """Raise CopiesError where devices have come to hold different copies of the state."""
        if jax.device_count() > 1:
            with self.clock.phase("compare"):
                fingerprint.of(update.saved(self.state))

    def save_in_time(self, *_):
        """Begin to save the state, unless the save before is slow and still going on."""
        if self.checkpoints.busy():
            self.unsaved += 1
            self.say(f"checkpoint {self.done} is left out ({self.unsaved} so far): the one before is still being "
                     "written; a larger train.checkpoint_every or a faster disk spares these")
        else:
            self.save()

    def save(self, *_):
        """Begin to save the state."""
        c = self.config
        extra = {"config": to_dict(c), "seed": c.seed, "batches": self.done + self.skipped, "data": self.recipe.data,
                 "seconds": self.meter.seconds, "begun": self.begun, "rollbacks": self.rollbacks}
        refused = [at for at in np.asarray(self.state.opt.refused).tolist() if 0 <= at and self.done - at <= optim.SPAN]
        with self.clock.phase("save"):  # a burst may have begun, before which the run would go back
            self.checkpoints.save(self.done, update.saved(self.state), extra, hold=min(refused, default=math.inf))

    def finish(self):
        """Save the state, if the last step was not saved just now, and wait until it is on the disk."""
        self.save()
        with self.clock.phase("save"):
            self.checkpoints.wait()

    def fit(self) -> str:
        """Train; returns "ok" or "stopped" (by a signal), saved, or "diverged" (bursts of refused updates): a restart
        finds the checkpoints from before."""
        status = "back"
        with signals.caught(), self.clock.phase("step"), \
                Profile(self.config.train.profile, self.workdir) as profile:
            while status == "back":
                with self.recipe.batches(self.done + self.skipped) as batches:
                    status = self._train(batches, profile)
            if status != "diverged":
                self.finish()
        return status

    def _train(self, batches, profile) -> str:
        """Train until the run is "ok", "stopped" or "diverged", or has gone "back"."""
        last, stopped = self.config.train.steps, self.done > 0 and self.follow(self.recipe.hooks)
        while self.done < last and not stopped and not self.meter.burst:
            self.send(batches, profile)
            if stopped := signals.agreed():
                self.meter.flush()  # and save: whoever sent the signal may not wait, and a restart does what follows
            else:
                stopped = self.follow(self.hooks)
        if self.meter.burst and not self.back():
            return "diverged"
        return "stopped" if stopped else "ok" if self.done == last else "back"

    def follow(self, hooks) -> bool:
        """Do what is due after the step just done; whether all have agreed to stop meanwhile."""
        if due := [hook for hook in hooks if hook.due(self.done, self.config.train.steps)]:
            self.meter.flush()
        try:
            for hook in due if not self.meter.burst else ():  # nothing of a burst is saved or shown
                hook.do(self)
                self.meter.restart()
        except signals.Halt:
            return True
        return False

    def send(self, batches, profile):
        """Send the next step to the devices, and read the numbers of the one before."""
        faults.reach("step", self.done + 1)
        profile.before(self.done + 1)
        batch = hosts.put_batch(self.meter.waited(batches), self.config.train.batch)
        key = jax.random.fold_in(self._key, self.done)
        with self.clock.phase("step" if self.meter.compile_seconds else "compile"):
            self.state, metrics = self.step(self.state, batch, key)
        self.done += 1
        self.state = faults.struck(self.state, self.done)
        self.meter.sent(self.done, metrics)
        self.checkpoints.poll()
        profile.after(self.done, self.state)

    def back(self) -> bool:
        """Go back to before a burst of refused updates, to go on with the batches after it; False where it cannot be,
        or was done too often, and the run is diverged."""
        first, last = self.meter.burst
        burst = f"{optim.BURST} of the updates {first + 1} to {last + 1} were refused (not finite, or spikes)"
        if len(self.rollbacks) >= self.config.train.rollbacks:
            self.say(f"{burst}, after {len(self.rollbacks)} rollbacks (train.rollbacks): the run is diverged")
            return False
        before = self.rollbacks
        with self.clock.phase("restore"):
            found = self.checkpoints.restore(update.saved(self.state), most=first, donate=True)
            if found is None:
                self.say(f"{burst}, and there is no checkpoint before them to go back to: the run is diverged")
                return False
            self.done, tree, extra = found
            self.checkpoints.forget(self.done)
            self._take(tree, extra)
            self.rollbacks = [*before, {"from": last + 1, "to": self.done}]
            self.log.close()
            self._cut(self.done)
            self.log = self._log()
            self.meter.back(self.log, extra["seconds"])
        self.say(f"{burst}: back to step {self.done}, and on with the batches after them (rollback "
                 f"{len(self.rollbacks)} of {self.config.train.rollbacks})")
        return True
