"""A sweep's points: what a config file's `get_points(c)` varies, resolved, checked and named before anything runs.

A point is named by the digest of the keys that decide its numbers, so that the same plan has the same names anywhere,
and a finished point is known whatever file asked for it. Its data are named by `data`'s keys; their content, which only
a store on this machine can tell, is held against that of the finished points (`unchanged`).
"""

import copy
import dataclasses
import difflib
import runpy
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import ml_collections

from lm_jax import config, optim
from lm_jax.config import Config, ConfigError
from lm_jax.data import store
from lm_jax.devices import STACKED
from lm_jax.launchers.job import Job
from lm_jax.preflight import show
from lm_jax.preflight.forecast import Forecast
from lm_jax.preflight.topology import Topology
from lm_jax.recipes.pretrain import planned, row_lengths
from lm_jax.scaling import abreast, ladder
from lm_jax.workdir import FREE

LOGITS = 2**28  # most logits of a step of points that share a program: 1 GiB


@dataclass(frozen=True)
class Point:
    """One run of a sweep: its name, what it changes of the base config, and the config that it is.

    A wsd run whose shorter sibling is a point too begins as that one was before its cool-down: they share a trunk.
    """

    id: str
    overrides: dict
    config: Config
    sibling: str = ""  # the longest shorter point on the same trunk
    begins: int = 0  # the step up to which it is the sibling's

    @cached_property
    def planned(self) -> Config:
        """The config with its vocabulary."""
        return planned(self.config)

    @property
    def tokens(self) -> int:
        c = self.planned
        return c.train.steps * c.train.batch * sum(row_lengths(c))

    @property
    def flops(self) -> float:
        """Of the whole path to its loss, trunk and cool-down: the C of a law."""
        return self.tokens * ladder.flops_per_token(self.planned)

    @property
    def own(self) -> float:
        """Share of its steps that no shorter point makes for it: what the sweep spends on it."""
        return 1 - self.begins / self.config.train.steps

    def __str__(self):
        model, train = self.config.model, self.config.train
        return f"{self.id}, {model.depth} layers of {model.width}, {train.batch} rows a step"


def points(path: str, base: ml_collections.ConfigDict) -> list[Point]:
    """The points of a config file over its base config, which may have been overridden.

    One ConfigError lists all that cannot run, and those that are equal.
    """
    functions = runpy.run_path(path.split(":")[0])  # what follows a colon is the argument of get_config
    if "get_points" not in functions:
        raise ConfigError(f"{path} has no get_points(c): a sweep's config says what varies, as a list of overrides "
                          "such as {'optim.lr': 1e-3}; without it, it is a config for python -m lm_jax.train")
    given = functions["get_points"](copy.deepcopy(base))
    if not isinstance(given, list) or not given or not all(isinstance(point, dict) for point in given):
        raise ConfigError(f"get_points of {path} returned {str(given)[:80]!r}: a list of dicts of overrides is wanted, "
                          "one a point")
    found, problems = {}, []
    for number, overrides in enumerate(given, 1):
        try:
            point = resolved(base, overrides)
        except ConfigError as error:
            lines = str(error).removeprefix("this config cannot run:\n  ")
            problems.append(f"point {number}, {overrides}:\n    {lines}")
            continue
        if point.id in found:
            first, other = found[point.id]
            problems.append(f"points {first} and {number} are the same run: {other.overrides} and {overrides}: take "
                            "one out, or give them different seeds")
        found.setdefault(point.id, (number, point))
    if problems:
        raise ConfigError(f"{path}: these points cannot run:\n  " + "\n  ".join(problems))
    return on_trunks([point for _, point in found.values()])


def on_trunks(points: Sequence[Point]) -> list[Point]:
    """The points, each with the sibling that it may begin as."""
    trunks, found = {}, {}
    for point in sorted(points, key=lambda point: point.config.train.steps):
        c = point.config
        key = identity(dataclasses.replace(c, train=dataclasses.replace(c.train, steps=1)))
        staged = any(isinstance(stage, tuple) for stage in c.data.weights)  # shares of a run's length
        shorter = trunks.get(key)
        if shorter and not staged and (begins := optim.trunk(c.optim, shorter.config.train.steps)):
            point = dataclasses.replace(point, sibling=shorter.id, begins=begins)
        trunks[key] = found[point.id] = point
    return [found[point.id] for point in points]


def resolved(base: ml_collections.ConfigDict, overrides: dict) -> Point:
    """A point from its flat overrides; ConfigError with everything that is wrong with it."""
    values, kept = base.to_dict(), {}
    for key, value in overrides.items():
        inner, (*sections, leaf) = values, key.split(".")
        for section in sections:
            inner = inner.setdefault(section, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"unknown key {key}: {section} has no keys of its own")
        if isinstance(inner.get(leaf), dict):
            raise ConfigError(f"{key} is a section: override its keys, as in {key}.{next(iter(inner[leaf]))}")
        inner[leaf] = kept[key] = value.item() if hasattr(value, "item") else value
    c = config.resolve(ml_collections.ConfigDict(values))
    return Point(identity(c), kept, c)


def identity(c: Config) -> str:
    """Twelve digits that name the numbers a config will give: keys that may change while a run goes on don't count."""
    return config.digest({key: value for key, value in _flat(config.to_dict(c)) if not f"{key}:".startswith(FREE)})


def jobs(points: Sequence[Point], left: set[str], argv: Sequence[str], out: Path, *, minutes: float = 0,
         stacked: float = STACKED, least: int = 1) -> list[Job]:
    """Points as commands: a point by itself is a run of `lm_jax.train`; those that share a trunk, or are small and
    differ in what `together` stacks, up to so many parameters, are one of `lm_jax.together`.

    Only what is in `left` is run, but all points are grouped, in `least` jobs if they can be: a job is the same one, of
    the same name, whatever of it is done. A time limit is of each length that a job trains.
    """
    made = []
    for group in groups(points, stacked, least=least):
        todo = [point for point in group if point.id in left]
        results = tuple(str(out / "points" / point.id / "summary.json") for point in todo)
        if not todo:
            continue
        if len(group) == 1:
            command = alone(group[0], argv, out)
        else:
            base = [argument for _, argument in _of_config(argv)]
            command = ("python", "-m", "lm_jax.together", *base, f"--out={out}", f"--stacked={stacked:.0f}",
                       f"--points={','.join(point.id for point in todo)}")
        made.append(Job(group[0].id, command, minutes * len({point.config.train.steps for point in todo}), results))
    return made


def alone(point: Point, argv: Sequence[str], out: Path) -> tuple[str, ...]:
    """A point as a command: what the sweep was asked of the base config, what the point overrides, and a folder."""
    base = [argument for key, argument in _of_config(argv) if key not in point.overrides]
    own = [f"--config.{key}={_written(value)}" for key, value in point.overrides.items()]
    return ("python", "-m", "lm_jax.train", *base, *own, f"--workdir={out / 'points' / point.id}")


def groups(points: Sequence[Point], stacked: float, *, least: int = 1) -> list[list[Point]]:
    """Points that one process runs: all lengths of runs that share a trunk, and of as many runs as may be stacked."""
    sets = {}
    for point in points:
        steps = 1 if point.config.optim.schedule == "wsd" else point.config.train.steps
        c = dataclasses.replace(point.config, train=dataclasses.replace(point.config.train, steps=steps))
        sets.setdefault(abreast.alike(c), {}).setdefault(c, []).append(point)
    found, parts = [], -(-least // max(1, len(sets)))
    for runs in map(list, map(dict.values, sets.values())):
        most = min(_most(runs[0][0].planned, stacked), -(-len(runs) // parts))
        found += [[point for run in runs[i:i + most] for point in run] for i in range(0, len(runs), most)]
    return found


def _most(c: Config, stacked: float) -> int:
    """How many runs like this one share a program."""
    if "wandb" in c.train.loggers:  # knows one run a process
        return 1
    logits = c.train.batch // c.train.microbatches * sum(row_lengths(c)) * c.model.vocab
    return max(1, int(min(stacked / ladder.counts(c)["total"], LOGITS / logits)))


def unchanged(points: Sequence[Point], records: dict[str, dict], *, say=print):
    """Prepare what the points train on, and raise ConfigError where a finished one saw other data under that name."""
    digests = {}
    for point in points:
        key = dataclasses.replace(point.config.data, epochs=(), weights=())
        if key not in digests:
            digests[key] = store.prepare(point.config.data, say=say).digest
        seen = records.get(point.id, {}).get("data_digest") or digests[key]
        if seen != digests[key]:
            raise ConfigError(f"{point.config.data.sources!r} has changed: point {point.id} was trained on {seen} and "
                              f"it is now {digests[key]}. Bring the old data back, or pass another --out")


@dataclass(frozen=True)
class Prices:
    """What each point takes on a topology; points of one model and batch are forecast once."""

    topology: Topology
    seen: dict = dataclasses.field(default_factory=dict)

    def forecast(self, point: Point) -> Forecast:
        """Of a run like the point's, whose steps are not to be believed."""
        c = point.planned
        alike = dataclasses.replace(
            c, seed=0, optim=dataclasses.replace(c.optim, lr=1.0, weight_decay=0.0, warmup=0),
            train=dataclasses.replace(c.train, steps=1))
        if alike not in self.seen:
            self.seen[alike] = Forecast(alike, self.topology)
        return self.seen[alike]

    def hours(self, point: Point) -> float:
        """Of the steps that are its own."""
        return self.forecast(point).hours * point.config.train.steps * point.own

    def dollars(self, point: Point) -> float:
        return self.hours(point) * self.topology.chips * self.topology.device.dollars

    def refuse(self, points: Sequence[Point]):
        """ConfigError that lists the points which do not fit, each with the cure."""
        problems = []
        for point in points:
            try:
                fits, why = (f := self.forecast(point)).fits, show.verdict(f)
            except ConfigError as error:  # the mesh, or the batch on it
                fits, why = False, error
            if not fits:
                problems.append(f"{point}: {why}")
        if problems:
            raise ConfigError(f"on {self.topology} these points cannot run:\n  " + "\n  ".join(problems))


def chosen(name: str, choices: Sequence[str], flag: str) -> str:
    """A name that is one of the choices; ConfigError with the nearest if it is none."""
    if name not in choices:
        near = difflib.get_close_matches(name, choices, n=1, cutoff=0)[0]
        raise ConfigError(f"{flag}={name}: did you mean {near!r}? There are {', '.join(choices)}")
    return name


def command(argv: Sequence[str]) -> str:
    """The sweep's command as a user types it."""
    return shlex.join(["python", "-m", "lm_jax.sweep", *argv[1:]])


def _flat(values: dict, prefix: str = ""):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _of_config(argv: Sequence[str]):
    """(key, argument) of the flags that make the base config, "" for the file; be they --flag=value or --flag value."""
    rest = iter(argv[1:])
    for argument in rest:
        if argument.split("=")[0].split(".")[0] == "--config":
            argument = argument if "=" in argument else f"{argument}={next(rest)}"
            yield argument.split("=")[0].removeprefix("--config").removeprefix("."), argument


def _written(value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
