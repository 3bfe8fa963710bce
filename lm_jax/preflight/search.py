"""The mesh, remat and microbatches with the best predicted step time that fit; the numbers of the run stay."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace

import jax
import jax.numpy as jnp

from lm_jax import parallel
from lm_jax.config import Config, ConfigError, MeshConfig
from lm_jax.models import flops
from lm_jax.preflight import roofline
from lm_jax.preflight.forecast import Forecast
from lm_jax.preflight.topology import Topology
from lm_jax.recipes.pretrain import row_lengths

REMAT = ("none", "dots", "full")  # from the fastest to the smallest
ASKED = 40  # most estimates of memory: each traces the step, which takes some seconds
LAST = 10  # and where none of those fits, of the smallest


def search(config: Config, topology: Topology, *, best: int = 5) -> list[Forecast]:
    """The fastest that fit, the fastest first. ConfigError if none of those looked at does.

    All are timed, which is quick, and the fastest asked for their bytes, which is not; if none of those fits, the
    smallest are, by what they hold at least.
    """
    every = {_key(f): f for f in candidates(config, topology)}  # the config itself is among the others too
    if not every:
        raise ConfigError(_undivided(config, topology))
    fastest = sorted(every.values(), key=lambda f: (f.roofline.seconds, f.config.train.microbatches))
    too_large = []
    found = _first(fastest, best, too_large, ASKED) or _first(sorted(fastest, key=at_least), best, too_large, LAST)
    if found:
        return sorted(found, key=lambda f: f.roofline.seconds)
    least = min((f.bytes["total"] for f in too_large), default=min(map(at_least, fastest)))
    surely = sum(at_least(one) > one.limit for one in fastest)
    raise ConfigError(
        f"nothing that was tried fits {topology.name}: of {len(every)} ways {surely} are too large for certain, "
        f"{len(too_large)} of the others were tried, and the least is {least / 2**30:.1f} GiB on a device of "
        f"{fastest[0].limit / 2**30:.1f}: take more chips, or a smaller train.batch or data.length")


def _first(ordered: list[Forecast], best: int, too_large: list[Forecast], most: int) -> list[Forecast]:
    """The first that fit, of the `most` that are asked; those that do not are added to `too_large`. A mesh and a number of
    microbatches that do not fit under one remat are not tried under one that keeps more."""
    found, asked = [], 0
    for one in ordered:
        if len(found) == best or asked == most:
            break
        if at_least(one) > one.limit or any(_needs_more(one, other) for other in too_large):
            continue
        asked += 1
        (found if one.fits else too_large).append(one)
    return found


def _undivided(config: Config, topology: Topology) -> str:
    """Sizes of models are powers of two, most of them: the odd part of the devices is left to the rows."""
    devices, batch = topology.devices, config.train.batch
    odd = devices // (devices & -devices)
    rest = f"a multiple of {odd}, or another number of chips" if batch % odd else "a multiple of a power of two"
    return f"train.batch={batch} divides on no mesh of {devices} devices that the model's sizes divide too: use {rest}"


def candidates(config: Config, topology: Topology) -> Iterator[Forecast]:
    """The config itself, if it can be, and every mesh of the topology's devices that replicates no letter, with every
    remat and number of microbatches."""
    with contextlib.suppress(ConfigError):
        yield Forecast(config, topology)
    for mesh in meshes(topology.devices, slices=topology.slices, experts=config.model.moe.experts):
        for microbatches in _divisors(config.train.batch):
            try:
                one = Forecast(_changed(config, mesh, "none", microbatches), topology)
            except ConfigError:  # the rows do not divide, nor will fewer
                break
            if one.replicated:
                break
            yield from (Forecast(_changed(config, mesh, remat, microbatches), topology) for remat in REMAT)


def meshes(devices: int, *, slices: int, experts: int) -> Iterator[MeshConfig]:
    """Every way to lay so many devices along the axes: a copy a slice, and none along experts where there are none."""
    inside = devices // slices
    for model in _divisors(inside):
        for sequence in _divisors(inside // model):
            for expert in _divisors(math.gcd(inside // model // sequence, experts) if experts else 1):
                left = inside // model // sequence // expert
                yield from (MeshConfig(slices, left // each, each, model, sequence, expert) for each in _divisors(left))


def _changed(config: Config, mesh: MeshConfig, remat: str, microbatches: int) -> Config:
    return replace(config, mesh=mesh, model=replace(config.model, remat=remat),
                   train=replace(config.train, microbatches=microbatches))


def flags(forecast: Forecast, config: Config) -> str:
    """What to add to the command line so that `config` becomes the forecast's; an axis of -1 finds its size itself."""
    new, old = forecast.config, config
    sizes = {f"mesh.{axis}": (n, getattr(old.mesh, axis)) for axis, n in forecast.mesh.shape.items()}
    changes = {key: n for key, (n, before) in sizes.items() if before not in (n, -1)}
    changes |= {"model.remat": new.model.remat} if new.model.remat != old.model.remat else {}
    more = new.train.microbatches != old.train.microbatches
    changes |= {"train.microbatches": new.train.microbatches} if more else {}
    return " ".join(f"--config.{key}={value}" for key, value in changes.items())


def at_least(one: Forecast) -> float:
    """Bytes a device that are certain without a trace: the state, and what remat keeps of each layer's products."""
    cfg, rows = one.config.model, one.config.train.batch // one.config.train.microbatches
    T, S = row_lengths(one.config)
    size, moments = jnp.dtype(cfg.dtype).itemsize, roofline.state_bytes(one.config) / 2
    with jax.sharding.use_abstract_mesh(one.mesh):
        total = size * cfg.depth * parallel.local_size("BTD", (rows, T, cfg.width))
        for w in flops.weights(cfg):
            letters, shape = w.kind.letters, w.shape
            total += w.size / parallel.devices_along(sum(parallel.weight_axes(letters, shape), ())) * (8 + moments)
            if cfg.remat != "full" and "blocks" in w.path and w.kind.fan_in and "E" not in letters:
                out = [(a, n) for a, n in zip(letters, shape) if a not in w.kind.fan_in]
                met = flops.tokens_met(w, cfg, T, S)
                ends, sizes = "".join(a for a, _ in out), [n for _, n in out]
                total += size * parallel.local_size(ends + "BT", (*sizes, rows, met))
    return total


def _key(f: Forecast) -> tuple:
    return (*f.mesh.shape.values(), f.config.model.remat, f.config.train.microbatches)


def _needs_more(one: Forecast, other: Forecast) -> bool:
    """Whether one keeps at least what the other does: on the same mesh, with no more remat and no more cuts."""
    a, b = one.config, other.config
    return (one.mesh == other.mesh and REMAT.index(a.model.remat) <= REMAT.index(b.model.remat)
            and a.train.microbatches <= b.train.microbatches)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
