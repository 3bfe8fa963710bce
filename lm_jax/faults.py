"""Faults on demand: what must not harm a run is done to it, at a moment that can be named and repeated.

    LM_JAX_FAULTS="kill@step=17:process=1,nan@step=9,enospc@save/manifest=2,stall@wait=3:seconds=5"

Each fault is a kind, `@`, a place, `=`, which time; options follow after colons. The time is the step's number at
`step` and counts from 1 in each process elsewhere; `1..90:seed=7` draws it, always the same one. A fault happens once
in a process, and in a restart with the same variable again. Without the variable nothing here does anything.
"""

import difflib
import errno
import functools
import os
import random
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed  # its number of this process, for which no device need be started

from lm_jax.errors import ConfigError

VARIABLE = "LM_JAX_FAULTS"
# Where a phase of the run begins, a step is sent; and in a save: its folder is made, its arrays are being written, all
# but its manifest is there, all but its name, an older one has lost its own.
PLACES = ("data", "restore", "compile", "wait", "step", "record", "compare", "save", "evaluation", "end",
          "save/begin", "save/arrays", "save/manifest", "save/rename", "save/collect")
OPTIONS = {"process": "of a run of several, only this one", "seed": "draws the time, and what a flip hits",
           "seconds": "of a stall, 5 unless said", "device": "whose copy a flip hits, 0 unless said",
           "code": "that an exit ends with, 1 unless said"}


@dataclass(frozen=True)
class Fault:
    """One fault of the variable."""

    text: str
    kind: str
    place: str
    time: int
    options: dict = field(hash=False)

    def here(self) -> bool:
        """Whether it is meant for this process."""
        return self.options.get("process", distributed.global_state.process_id) == distributed.global_state.process_id


@dataclass
class Schedule:
    """The faults of a process, how often it came to each place, and which have happened."""

    faults: tuple[Fault, ...]
    times: Counter = field(default_factory=Counter)
    happened: set[Fault] = field(default_factory=set)

    def due(self, kinds, place: str, number: int) -> list[Fault]:
        """Those of these kinds that are to happen now, which then have happened."""
        found = [fault for fault in self.faults if fault.kind in kinds and (fault.place, fault.time) == (place, number)
                 and fault not in self.happened and fault.here()]
        self.happened.update(found)
        return found


def reach(place: str, number: int | None = None):
    """Come to a place where faults may happen; without its `number` it is counted how often."""
    if not (schedule := planned()):
        return
    schedule.times[place] += 1
    for fault in schedule.due(KINDS, place, number or schedule.times[place]):
        print(f"fault: {fault.text}", file=sys.stderr, flush=True)
        KINDS[fault.kind](fault)


def poisoned(grads, step):
    """The gradients of a step, to be traced: not a number at `nan@step=K`, else as they are."""
    faults = [fault for fault in (planned() or Schedule(())).faults if fault.kind == "nan" and fault.here()]
    if not faults:
        return grads
    print(f"fault: {', '.join(fault.text for fault in faults)}", file=sys.stderr, flush=True)
    hit = jnp.isin(step, jnp.array([fault.time for fault in faults]))
    return jax.tree.map(lambda g: g * jnp.where(hit, jnp.nan, 1.0).astype(g.dtype), grads)


def struck(tree, step: int):
    """A tree of arrays as it is after a step: at `flip@step=K:device=D` with one bit of D's copy of one array flipped.

    Arrays of which several devices have copies come first; there the flip makes copies differ.
    """
    for fault in (planned() or Schedule(())).due(("flip",), "step", step):
        print(f"fault: {fault.text}", file=sys.stderr, flush=True)
        tree = _flipped(tree, random.Random(fault.options.get("seed", 0)), fault.options.get("device", 0))
    return tree


def planned() -> Schedule | None:
    """The faults of this process, or None; ConfigError for a variable that says none."""
    text = os.environ.get(VARIABLE)
    return _schedule(text) if text else None


@functools.lru_cache(maxsize=1)
def _schedule(text: str) -> Schedule:
    return Schedule(tuple(map(_fault, text.split(","))))


def _fault(text: str) -> Fault:
    """A fault from its text."""
    what, *rest = text.strip().split(":")
    kind, at, where = what.partition("@")
    place, _, when = where.partition("=")
    if not at:
        raise _wrong(text, "it names no place")
    kinds = (*KINDS, "nan", "flip")
    _known(text, "kind", kind, kinds)
    _known(text, "place", place, ("step",) if kind in ("nan", "flip") else PLACES)
    options = {}
    for option in rest:
        name, _, value = option.partition("=")
        _known(text, "option", name, OPTIONS)
        options[name] = _number(text, value, float if name == "seconds" else int, least=0)
    first, _, last = when.partition("..")
    first = _number(text, first or "1", int, least=1)
    last = _number(text, last or str(first), int, least=first)
    return Fault(text.strip(), kind, place, random.Random(options.get("seed", 0)).randint(first, last), options)


def _known(text, what, name, names):
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        raise _wrong(text, f"no {what} {name!r}: " + (f"did you mean {near[0]}?" if near else
                                                      f"there are {', '.join(names)}"))


def _number(text, value, kind, *, least):
    try:
        number = kind(value)
    except ValueError:
        number = None
    if number is None or not least <= number < float("inf"):
        raise _wrong(text, f"{value!r} is no {'whole ' if kind is int else ''}number of at least {least}")
    return number


def _wrong(text, why) -> ConfigError:
    return ConfigError(f"{VARIABLE}: {text.strip()!r}: {why}. A fault is KIND@PLACE=TIME or KIND@PLACE=FIRST..LAST, "
                       "with options as in :process=1, and commas between faults, as in "
                       "kill@step=1..90:seed=7,stall@wait=3:seconds=5")


def _flipped(tree, rng: random.Random, device: int):
    """`tree` with a bit flipped of the copy that a device has of an array; as it is where the device is another's."""
    if device not in (known := [d.id for d in jax.devices()]):
        raise ConfigError(f"{VARIABLE}: no device={device}: there are {known}")
    leaves, structure = jax.tree.flatten(tree)
    arrays = [i for i, leaf in enumerate(leaves) if leaf.size and jnp.issubdtype(leaf.dtype, jnp.number)
              and device in {d.id for d in leaf.sharding.device_set}]
    copied = [i for i in arrays if any(shard.replica_id for shard in leaves[i].global_shards)]
    chosen, place = rng.choice(copied or arrays), rng.random()
    leaf = leaves[chosen]

    def copy(shard):
        if shard.device.id != device:
            return shard.data
        values = np.array(shard.data)
        raw = values.reshape(-1).view(np.uint8)
        at = int(place * raw.size * 8)
        raw[at // 8] ^= 1 << at % 8
        return jax.device_put(values, shard.device)

    copies = [copy(shard) for shard in leaf.addressable_shards]
    leaves[chosen] = jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, copies)
    return jax.tree.unflatten(structure, leaves)


def _send(number):
    return lambda fault: os.kill(os.getpid(), number)


def _raise(make):
    def happen(fault):
        raise make(f"injected: {fault.text}")

    return happen


def _hang(fault):
    while True:
        time.sleep(3600)


KINDS = {
    "kill": _send(signal.SIGKILL), "term": _send(signal.SIGTERM), "segv": _send(signal.SIGSEGV),
    "hang": _hang, "stall": lambda fault: time.sleep(fault.options.get("seconds", 5.0)),
    "exit": lambda fault: os._exit(fault.options.get("code", 1)),
    "error": _raise(RuntimeError), "oom": _raise(lambda text: RuntimeError(f"RESOURCE_EXHAUSTED: {text}")),
    "enospc": _raise(lambda text: OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({text})")),
}
