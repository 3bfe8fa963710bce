"""What a training step moves between devices: every collective, from the model's own weights and the letter tables.

A weight's letters say it all, as they do in flops.py. y = x w needs w gathered over the axes of rows that it is divided
over, forward and backward (the compiler shares the backward's with what remat computes again); y is summed over axes
that divide letters it drops, dx over those that divide letters it keeps; dw is summed over all axes that divide tokens,
and scattered. tests/test_traffic.py holds this against compiled programs. Scalars are not counted, nor is what Muon's
products move: the compiler lays those out as it likes.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lm_jax import parallel
from lm_jax.config import Config
from lm_jax.models import flops, kernels
from lm_jax.recipes.pretrain import row_lengths

DEALT = {"ring": ("query", "key", "value"), "splash": ("query",)}  # out again, so that causal work is the same on all


@dataclass(frozen=True)
class Move:
    """One collective of a step: `bytes` of the whole array that the devices along `axes` share, `times` a step."""

    kind: str  # all-gather | reduce-scatter | all-reduce | collective-permute
    bytes: int
    axes: tuple[str, ...]
    times: int
    what: str  # weights | gradients | activations | keys and values | loss

    @property
    def total(self) -> int:
        return self.bytes * self.times


def step(config: Config, mesh) -> list[Move]:
    """Every collective of one step of `config`, whose model knows its vocabulary, on `mesh`, abstract or not."""
    T, S = row_lengths(config)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        tokens = {n: _Tokens.of(config, n) for n in (T, S, 1)}
        moves = [move for w in flops.weights(config.model) for move in _weight(config, w, tokens, T, S)]
        moves += _lookup(config, tokens[T]) + (_lookup(config, tokens[S]) if S else [])
        moves += _loss(config, tokens[T])
        moves += [move for n in (T, S) if n for move in _layout(config, tokens[n])]
    wide = [m for m in moves if m.bytes and math.prod(mesh.shape[axis] for axis in m.axes) > 1]
    return [Move(m.kind, m.bytes, m.axes, m.times * config.train.microbatches, m.what) for m in wide]


def totals(moves: list[Move], by: str = "kind") -> dict[str, int]:
    """Bytes a step by `kind`, or by `what`."""
    sums: dict[str, int] = {}
    for move in moves:
        sums[getattr(move, by)] = sums.get(getattr(move, by), 0) + move.total
    return sums


@dataclass(frozen=True)
class _Tokens:
    """The tokens of a microbatch's rows that one device holds, and the axes that divide rows and tokens."""

    rows: int
    length: int  # of a row, whole
    local: int  # rows times the device's part of each
    over_rows: tuple[str, ...]
    over_length: tuple[str, ...]

    @classmethod
    def of(cls, config: Config, length: int):
        B = config.train.batch // config.train.microbatches
        over = [parallel.activation_axes(letter, n) for letter, n in (("B", B), ("T", length))]
        return cls(parallel.local_size("B", (B,)), length, parallel.local_size("BT", (B, length)), *over)


def _weight(config: Config, w: flops.Weight, tokens: dict, T: int, S: int):
    """What one weight of the model causes in a microbatch, over all its layers."""
    cfg, kind = config.model, w.kind
    stacked = kind.letters.startswith("L")
    letters, shape, layers = kind.letters[stacked:], w.shape[stacked:], w.shape[0] if stacked else 1
    met = tokens[flops.tokens_met(w, cfg, T, S) or T]
    size = 4 if "router" in w.path else jnp.dtype(cfg.dtype).itemsize
    gathered, kept = parallel.weight_axes(letters, shape)
    whole = math.prod(shape) // parallel.devices_along(kept)  # what a device multiplies by
    if kind.role == "vector":
        yield from _vector(w, letters, shape, met, size, layers)
    elif letters.startswith("E"):
        yield from _experts(cfg, letters, shape, met, size * whole, gathered, layers)
    else:
        if kind.role == "embedding":  # whose gradient is summed as it is used, then cut
            yield from _gathers(size * whole, letters, shape, gathered, 1)
            yield from _sums(size * whole, met, 1 + (S > 0 and w.path[0] == "embed"))
        if kind.fan_in or _tied(w, cfg):
            shared = 0 if _tied(w, cfg) else 1  # outside loops backward and forward share a gather, and with a lookup
            yield from _gathers(size * whole, letters, shape, gathered, 2 * layers if stacked else shared)
            rest = tuple(axis for axis in met.over_rows + met.over_length if axis not in gathered)
            yield Move("reduce-scatter", 4 * whole, gathered, layers, "gradients")
            yield Move("all-reduce", 4 * whole // parallel.devices_along(gathered), rest, layers, "gradients")
            yield from _products(cfg, w, letters, shape, met, size, layers)


def _products(cfg, w: flops.Weight, letters: str, shape: tuple, met: _Tokens, size: int, layers: int):
    """Sums of y and dx over axes that divide what they contract, and keys and values brought together."""
    fan_in = w.kind.fan_in or "D"  # an embedding read backwards
    into = {a: n for a, n in zip(letters, shape) if a in fan_in}
    out = {a: n for a, n in zip(letters, shape) if a not in fan_in}
    axes = lambda dims: tuple(axis for a, n in dims.items() for axis in parallel.activation_axes(a, n))
    local = lambda dims: size * met.local * math.prod(dims.values()) // parallel.devices_along(axes(dims))
    last = cfg.norm_place == "pre" and w.path[-2] == "down"  # of a block, whose value nobody asks for again
    again = int(cfg.remat == "full" and "blocks" in w.path and not last)
    yield Move("all-reduce", local(out), axes(into), layers * (1 + again), "activations")
    yield Move("all-reduce", local(into), axes(out), layers * _own_sum(w), "activations")
    if w.path[-2] in ("query", "key", "value"):
        kernel = "xla" if "cross" in w.path or not met.over_length else kernels.choose(cfg, met.length)
        if w.path[-2] in DEALT.get(kernel, ()) and cfg.causal and w.path[0] != "encoder":
            times = (2 + (cfg.remat != "none")) * (2 if w.path[-2] == "query" else 1)  # outputs go back
            yield Move("collective-permute", local(out), met.over_length, layers * times, "keys and values")
        if w.path[-2] != "query":
            yield from _keys(cfg, local(out), met, size, layers, kernel)


def _keys(cfg, part: int, met: _Tokens, size: int, layers: int, kernel: str):
    """Keys, or values, of which a device makes a part: gathered, or handed round a ring with their gradients in float32
    behind them, a ring whose outputs remat="dots" keeps. (Positions that ride along are left out.)"""
    n, axes = parallel.devices_along(met.over_length), met.over_length
    if kernel == "ring":
        yield Move("collective-permute", part, axes, layers * (n - 1) * (2 + (cfg.remat == "full")), "keys and values")
        yield Move("collective-permute", part * 4 // size, axes, layers * n, "keys and values")
    else:
        yield Move("all-gather", part * n, axes, layers * (1 + (cfg.remat != "none")), "keys and values")
        yield Move("reduce-scatter", part * n, axes, layers, "keys and values")


def _own_sum(w: flops.Weight) -> int:
    """1 if dx is summed over devices by itself; else compilers add it to its neighbour's before, but not the CPU's."""
    shared = w.path[-2] in ("gate", "value") or (w.path[-2] == "key" and "cross" not in w.path)
    return int(parallel.platform() == "cpu" or not shared)


def _experts(cfg, letters, shape, met, whole, gathered, layers):
    """A table of experts, gathered for its use and kept until the backward pass unless remat gathers it again."""
    yield from _gathers(whole, letters, shape, gathered, layers * (1 + (cfg.remat != "none")))
    yield Move("all-reduce", whole, met.over_rows + met.over_length, layers, "gradients")
    if letters == "EFD":
        size = jnp.dtype(cfg.dtype).itemsize * met.local * cfg.width
        yield Move("all-reduce", size, parallel.activation_axes("F", shape[1]), 2 * layers, "activations")


def _vector(w: flops.Weight, letters: str, shape: tuple, met: _Tokens, size: int, layers: int):
    """Norms and biases are replicated; of a divided activation's bias each device finds a part of the gradient."""
    axes = tuple(axis for a, n in zip(letters, shape) for axis in parallel.activation_axes(a, n))
    size = (size if w.path[-1] == "b" else 4) * math.prod(shape)
    yield from _sums(size // parallel.devices_along(axes), met, layers)
    yield Move("all-gather", size, axes, layers, "gradients")


def _gathers(whole: int, letters: str, shape: tuple, gathered: tuple[str, ...], times: int):
    """A weight that is divided along several letters is brought together along one after the other."""
    whole //= parallel.devices_along(gathered)
    for letter in reversed(letters):
        axes, _ = parallel.weight_axes(letters, shape, of=letter)
        whole *= parallel.devices_along(axes)
        yield Move("all-gather", whole, axes, times, "weights")


def _sums(size: int, met: _Tokens, times: int):
    """Over rows and over tokens, one after the other."""
    yield from (Move("all-reduce", size, axes, times, "gradients") for axes in (met.over_rows, met.over_length))


def _lookup(config: Config, met: _Tokens) -> list[Move]:
    """Rows of a table whose vocabulary is divided: each device finds its own, and the sum is all."""
    cfg = config.model
    size = jnp.dtype(cfg.dtype).itemsize * met.local * cfg.width
    return [Move("all-reduce", size, parallel.activation_axes("V", cfg.vocab), 1, "activations")]


def _loss(config: Config, met: _Tokens) -> list[Move]:
    """Numbers of a token that parts of the vocabulary bring together: maximum, partition, the target's logit and, for
    smoothing, the sum of all."""
    axes, times = parallel.activation_axes("V", config.model.vocab), 3 + (config.train.smoothing > 0)
    return [Move("all-reduce", 4 * met.local, axes, times, "loss")]


def _layout(config: Config, met: _Tokens) -> list[Move]:
    """Positions and segments of the keys that every token is compared with, but for a ring's."""
    if met.over_length and kernels.choose(config.model, met.length) == "ring":
        return []
    count = 2 + (config.data.objective == "prefix")
    return [Move("all-gather", 4 * met.rows * met.length, met.over_length, count, "keys and values")]


def _tied(w: flops.Weight, cfg) -> bool:
    """Whether an embedding is the output table too."""
    return cfg.tied and w.path[0] == "embed"
