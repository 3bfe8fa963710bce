"""Runs that differ in seed, learning rate, weight decay or initial weights alone, trained side by side in one process.

A model of a million parameters leaves a device idle in and between its own small steps: `abreast` makes those of all
runs at once, many in a call, their data an argument of it, so that the host is asked once for what it would be asked
`STEPS` times R times. Each run keeps a folder of its own, in which it could go on alone, and its loss curve is the one
it would have alone, to the rounding of a product of matrices.
"""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lm_jax import faults, hosts, signals
from lm_jax.clock import Clock
from lm_jax.data.loader import Loader
from lm_jax.errors import Failure
from lm_jax.recipes import pretrain, run
from lm_jax.scaling import abreast
from lm_jax.trainer import Every, Trainer
from lm_jax.workdir import Workdir

STEPS = 32  # that a program makes at most
PATIENT = 3.0  # seconds of steps at once: a signal waits for twice as long


@dataclass(frozen=True)
class Member:
    """One run of a stack: its recipe, its folder, and the folder of a run that it begins as."""

    recipe: pretrain.Pretraining
    workdir: Workdir
    start: str | None = None


def train(members: Sequence[Member], clock: Clock, mesh: dict) -> list[dict | Failure]:
    """Train runs of one length to their ends or a signal; of each the summary that is also in its folder, or why it
    could not begin, which keeps no other from it."""
    begun, evaluation = time.monotonic(), pretrain.Evaluation(members[0].recipe, beat=clock.beat)
    with contextlib.ExitStack() as stack:
        runs, found = {}, {}
        for member in members:
            try:
                one = _trainer(member, evaluation, clock, quiet=bool(runs))
            except Failure as reason:
                found[member] = reason
                continue
            runs[member] = stack.enter_context(one)
            run.manifest(member.recipe, member.workdir, mesh)
        statuses = dict.fromkeys(runs, "back")
        while "stopped" not in statuses.values() and (left := [m for m in runs if statuses[m] == "back"]):
            done = min(runs[member].done for member in left)  # a kill leaves some a save behind the others
            level = [member for member in left if runs[member].done == done]
            ends = Stack([runs[member] for member in level], [member.recipe.loader for member in level], clock).fit()
            statuses |= dict(zip(level, ends))
        statuses = {member: "stopped" if status == "back" else status for member, status in statuses.items()}
        found |= {member: run.ended(member.recipe, one, statuses[member], evaluation, begun)
                  for member, one in runs.items()}
    return [found[member] for member in members]


def _trainer(member: Member, evaluation, clock: Clock, *, quiet: bool) -> Trainer:
    """The trainer of a run, from its first step if what it was to begin as is damaged or another's."""
    c = member.recipe.config
    plan = member.recipe.recipe((pretrain.evaluate_every(c, evaluation),))
    make = lambda start: Trainer(c, member.recipe.model(), plan, member.workdir, start=start, clock=clock, quiet=quiet)
    if member.start is None:
        return make(None)
    try:
        return make(member.start)
    except Failure as reason:
        print(f"cannot begin as {member.start}, so from the first step: {reason}", flush=True)
        return make(None)


class Stack:
    """Trainers of configs that are `alike`, all after the same step; and the loader of each."""

    def __init__(self, runs: Sequence[Trainer], loaders: Sequence[Loader], clock: Clock):
        self.runs, self.loaders, self.clock = runs, loaders, clock
        self.done, self.last = runs[0].done, runs[0].config.train.steps
        self.room = min([STEPS, *(hook.steps for hook in runs[0].hooks if isinstance(hook, Every))])
        self.most = self.room  # steps to send at once
        self.alive = set(range(len(runs)))
        configs = [replace(one.config, model=one.state.model.cfg) for one in runs]
        self.abreast = abreast.begin(configs, [one.state for one in runs], room=self.room)
        hosts.say(f"trained side by side: {self.abreast}")
        self._sent = None

    def fit(self) -> list[str]:
        """Train; of each run "ok", "stopped" or "diverged", as `Trainer.fit`, and saved, or "back" at an earlier step.
        """
        self._clock = time.perf_counter()
        with contextlib.closing(self.abreast), signals.caught(), self.clock.phase("step"):
            stopped = self.done > 0 and self._follow(lambda one: one.recipe.hooks)
            while self.done < self.last and self.alive and not stopped:
                stopped = self._step()
            self._read()
            self._share()
            for r in self.alive:
                self.runs[r].finish()
            over = "stopped" if stopped else "ok"
            ends = lambda r, one: over if r in self.alive else "back" if one.back() else "diverged"
            return [ends(r, one) for r, one in enumerate(self.runs)]

    def _step(self) -> bool:
        """Send as many steps as there are before anything is due, and read what was sent before; whether to stop."""
        ends = range(self.done + 1, self.done + self.most + 1)
        count = next((end for end in ends if self._due(end)), ends[-1]) - self.done
        for step in range(self.done + 1, self.done + count + 1):
            faults.reach("step", step)
        begun = time.perf_counter()
        size = self.loaders[0].batch_size
        ahead = np.arange(self.done * size, (self.done + count) * size)
        rows = {r: (ahead + self.runs[r].skipped * size) % self.loaders[r].rows_needed for r in sorted(self.alive)}
        with self.clock.phase("wait"):
            rows = {r: self.loaders[r].rows(k) for r, k in rows.items()}
        waited = time.perf_counter() - begun
        metrics = self._advanced(rows, count)
        self._read()
        self._sent = (self.done, count, metrics, waited)
        self.done += count
        if signals.agreed():
            return True
        if self._due(self.done):
            self._read()
            self._share()
            return self._follow(lambda one: one.hooks)
        return False

    def _due(self, step: int) -> bool:
        return any(hook.due(step, self.last) for hook in self.runs[0].hooks)

    def _follow(self, hooks) -> bool:
        """Do what is due of each run's hooks, as `Trainer.follow`."""
        stopped = any(self.runs[r].follow(hooks(self.runs[r])) for r in sorted(self.alive))
        self._clock = time.perf_counter()
        return stopped

    def _advanced(self, rows: dict[int, dict], count: int):
        """Metrics of so many steps; the first call compiles, which is no time of a step's."""
        send = lambda: self.abreast.advance(rows, of=self.last, count=count)
        if self.runs[0].meter.compile_seconds:
            return send()
        begun = time.perf_counter()
        with self.clock.phase("compile"):
            sent = send()
        self._clock = time.perf_counter()
        for one in self.runs:
            one.meter.compile_seconds = self._clock - begun
        return sent

    def _read(self):
        """Write the rows of the steps sent last; a run with a burst of refused updates has no more part in it."""
        if self._sent is None or not self.alive:
            return
        (first, count, metrics, waited), self._sent = self._sent, None
        metrics = self.abreast.metrics(metrics)
        self.clock.step()
        now = time.perf_counter()
        each, self._clock = (now - self._clock) / count, now
        self.most = max(1, min(self.room, int(PATIENT / max(each, 1e-6))))
        share = 1 / len(self.alive)  # of the time, which the runs that go on have in common
        for r in sorted(self.alive):
            one = self.runs[r]
            for i in range(count):
                numbers = {name: values[i].item() for name, values in metrics[r].items() if name != "objective"}
                one.meter.record(first + i + 1, numbers, each * share, waited / count * share)
                one.done = first + i + 1
                if one.meter.burst:
                    self.alive.discard(r)
                    break

    def _share(self):
        """Give each run its own state."""
        for one, state in zip(self.runs, self.abreast.states()):
            one.state = state
