"""How a gradient becomes an update: schedule, clipping, direction, muP factors, weight decay, and a guard around all.

    w <- w - lr(t) * (direction / m_N**transfer + weight_decay * w)          decay on matrices and heads only

`m_N` is a matrix's fan-in over the base model's, 1 outside muP. Its learning rate shrinks with it and the decay of a
step does not, which is CompleteP's rule (Dey et al. 2025, table 1, alpha = 1: rate / m_N, weight decay * m_N, and with
that alpha no change with depth). Every direction keeps float32 state laid out like the parameters.
"""

import math
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lm_jax.config import ConfigError, OptimConfig

WINDOW = 128  # accepted losses from which a spike is told
BURST, SPAN = 4, 50  # so many refused updates among so many are no accident
QUINTIC = (3.4445, -4.7750, 2.0315)  # Newton-Schulz polynomial of Muon (Jordan 2024)


class State(NamedTuple):
    """The guard's state around the optimizer's own; a skipped update changes its two counts of skips and no more."""

    inner: Any  # of the optax chain
    accepted: jax.Array  # updates made; the schedule's step
    skipped: jax.Array  # updates refused since the start
    refused: jax.Array  # numbers, from 0, of the last BURST of them, a ring; -1 where there were fewer
    window: jax.Array  # the last WINDOW accepted losses, a ring
    ema: Any  # average of the weights, or () without


def make(o: OptimConfig, steps: int, kinds) -> optax.GradientTransformationExtraArgs:
    """The optimizer for parameters described by `kinds`, a pytree of `Kind` with the structure of the parameters.

    `update(grads, state, params, loss=scalar)` returns zeros, and leaves moments, counts and average as they were,
    where the loss or a gradient is not finite, or where `spike` > 0 and the loss lies so many robust deviations above
    the median of the last 128 accepted ones.
    """
    if not 0 <= o.ema < 1:
        raise ConfigError(f"optim.ema={o.ema}: 0 for no average of the weights, or a decay below 1, e.g. 0.999")
    transfer = TRANSFER[o.name]
    tx = optax.chain(
        DIRECTIONS[o.name](o, kinds),
        _times(kinds, lambda k: k.width_ratio**-transfer if k.role == "matrix" else 1.0),
        optax.add_decayed_weights(o.weight_decay, mask=_each(kinds, lambda k: k.role in ("matrix", "head"))),
        optax.scale_by_learning_rate(schedule(o, steps)))
    return _guarded(tx, o)


def ema_params(state: State):
    """The average of the weights after each accepted update (the initial weights before the first)."""
    if state.ema == ():
        raise ValueError("no average of the weights is kept: set optim.ema, e.g. to 0.999")
    return state.ema


def burst(refused) -> tuple:
    """Numbers of the first and the last update of a burst, which is BURST refused ones among SPAN; else (-1, -1).

    `refused` is a State's, traced or a host's copy: arithmetic alone, for which NumPy compiles no program.
    """
    first, last = refused.min(), refused.max()
    there = (first >= 0) & (last - first < SPAN)
    return (first + 1) * there - 1, (last + 1) * there - 1


def schedule(o: OptimConfig, steps: int) -> Callable[[Any], jax.Array]:
    """Update index (0 is the first) -> learning rate: `warmup` updates up to the peak, which the last of them has, then
    the schedule's shape, whose end the last of `steps` has. `steps` and `o.lr` may be traced."""
    shape = SCHEDULES[o.schedule]

    def rate(step):
        done = jnp.asarray(step, jnp.float32) + 1
        progress = jnp.clip((done - o.warmup) / jnp.maximum(1, steps - o.warmup), 0, 1)
        return o.lr * jnp.minimum(1.0, done / max(1, o.warmup)) * shape(o, progress, done)

    return rate


def trunk(o: OptimConfig, steps: int) -> int:
    """Updates of a wsd run before it begins to cool down, which longer runs make just so; 0 of other schedules, and
    where the warm-up never ends."""
    if o.schedule != "wsd" or o.warmup >= steps:
        return 0
    return max(0, math.floor(o.warmup + (1 - o.decay) * (steps - o.warmup)) - 1)


def common(o: OptimConfig, steps: int, other: OptimConfig, others: int) -> int:
    """How many first updates have the same learning rate under two schedules of so many steps."""
    least = min(steps, others)
    rate = lambda o, steps: np.asarray(jax.jit(schedule(o, steps))(np.arange(least)))
    rates, theirs = rate(o, steps), rate(other, others)
    return least if np.array_equal(rates, theirs) else int((rates != theirs).argmax())


def _cosine(o, progress, done):
    return o.floor + (1 - o.floor) * 0.5 * (1 + jnp.cos(jnp.pi * progress))


def _linear(o, progress, done):
    return 1 - (1 - o.floor) * progress


def _wsd(o, progress, done):
    """Flat, then down by 1 - sqrt, which ends lower than a line does (Hägele et al. 2024)."""
    cooled = jnp.clip((progress - (1 - o.decay)) / max(o.decay, 1e-9), 0, 1)
    return 1 - (1 - o.floor) * jnp.sqrt(cooled)


def _rsqrt(o, progress, done):
    """The peak until the warm-up ends, then 1/sqrt(updates), with no end in view (T5)."""
    return jnp.sqrt(max(1, o.warmup) / jnp.maximum(done, max(1, o.warmup)))


def _constant(o, progress, done):
    return jnp.ones_like(progress)


SCHEDULES = {"cosine": _cosine, "wsd": _wsd, "rsqrt": _rsqrt, "linear": _linear, "constant": _constant}


def _adam(o, kinds):
    """Adam (Kingma & Ba 2015). Gradients times m_N m_L are CompleteP's eps / (m_N m_L): only eps feels their scale."""
    b1, b2 = o.betas
    return optax.chain(_times(kinds, lambda k: k.width_ratio * k.depth_ratio), optax.scale_by_adam(b1, b2, o.eps))


def _lion(o, kinds):
    """Lion (Chen et al. 2023): signs, so it wants a learning rate 3 to 10 times below Adam's."""
    return optax.scale_by_lion(*o.betas)


def _muon(o, kinds):
    """Muon (Jordan 2024) on matrices, Adam on the rest.

    Updates have a root mean square of 0.2, as Adam's do, so that both share one learning rate (Liu et al. 2025). Heads
    are flattened into one matrix, layers and experts are matrices each. Its matmuls contract sharded dimensions, which
    explicit axes refuse: there the compiler lays out the intermediates, and inputs and outputs keep their layouts.
    """
    matrices = _each(kinds, lambda k: k if k.role == "matrix" else optax.MaskedNode())
    others = _each(kinds, lambda k: optax.MaskedNode() if k.role == "matrix" else k)
    sides = _each(matrices, lambda k: optax.contrib.MuonDimensionNumbers(*_sides(k)))
    tx = optax.contrib.scale_by_muon(QUINTIC, beta=0.95, weight_dimension_numbers=lambda _: sides)

    def init(params):
        return tx.init(params)._replace(ns_coeffs=())  # constants, which have no place in a checkpoint

    def step(grads, state):
        updates, state = tx.update(grads, state._replace(ns_coeffs=jnp.asarray(QUINTIC)))
        return updates, state._replace(ns_coeffs=())

    def update(grads, state, params=None):
        if jax.sharding.get_abstract_mesh().empty:
            return step(grads, state)
        layouts = jax.tree.map(lambda x: jax.typeof(x).sharding, (grads, state))
        return jax.sharding.auto_axes(step, out_sharding=layouts)(grads, state)

    def sized(k, u):
        return u * 0.2 * max(math.prod(u.shape[i] for i in side) for side in _sides(k)) ** 0.5

    muon = optax.chain(optax.GradientTransformation(init, update),
                       optax.stateless(lambda updates, _: _each(matrices, sized, updates)))
    labels = _each(kinds, lambda k: "muon" if k.role == "matrix" else "adam")
    return optax.partition({"muon": muon, "adam": _adam(o, others)}, labels)


def _adafactor(o, kinds):
    """Adafactor (Shazeer & Stern 2018) without momentum: steps relative to each matrix's root mean square.

    Layers and experts are matrices each. `betas` and `eps` do not enter; the paper's constants do.
    """

    def init(params):
        zeros = _each(kinds, _factor_zeros, params)
        return {"count": jnp.zeros([], jnp.int32), "v": zeros}

    def update(grads, state, params):
        keep = 1 - (state["count"] + 1.0) ** -0.8
        both = _each(kinds, lambda k, *leaf: _factored(k, *leaf, keep=keep), grads, state["v"], params)
        v = _each(kinds, lambda k, pair: pair[1], both)
        return _each(kinds, lambda k, pair: pair[0], both), {"count": state["count"] + 1, "v": v}

    return optax.GradientTransformation(init, update)


DIRECTIONS = {"adamw": _adam, "adafactor": _adafactor, "lion": _lion, "muon": _muon}

# A matrix's rate is divided by m_N to this power. An update of Adam or Lion has entries of fixed size that line up, so
# its norm grows with the fan-in: 1. Muon's do not line up and it grows with the root; Adafactor's are Adam's times the
# weights' root mean square, which falls with the root: one half is left for either.
TRANSFER = {"adamw": 1.0, "lion": 1.0, "adafactor": 0.5, "muon": 0.5}


def _guarded(tx, o):
    """Clip by global norm, then `tx`, then the average of the weights; all of it only where the update is accepted."""

    def init(params):
        counts = (jnp.zeros([], jnp.int32) for _ in range(2))  # two buffers, so that a step may be given both to reuse
        ema = jax.tree.map(jnp.copy, params) if o.ema else ()
        return State(tx.init(params), *counts, jnp.full([BURST], -1, jnp.int32), jnp.zeros([WINDOW], jnp.float32), ema)

    def update(grads, state, params, *, loss, **_):
        norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))
        good = jnp.isfinite(norm) & jnp.isfinite(loss) & ~_spikes(loss, state, o.spike)
        if o.clip:
            grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, o.clip / norm), grads)
        updates, inner = tx.update(grads, state.inner, params)
        updates = jax.tree.map(lambda u: jnp.where(good, u, 0), updates)  # where, as 0 * NaN is NaN
        count = state.accepted + 1
        average = (1 - o.ema) / -jnp.expm1(count * jnp.log(o.ema)) if o.ema else 1.0  # first 1: the start is forgotten
        moved = State(
            inner, count, state.skipped, state.refused,
            window=jnp.where(jnp.arange(WINDOW) == state.accepted % WINDOW, loss, state.window),
            ema=jax.tree.map(lambda e, p, u: e + average * (p + u - e), state.ema, params, updates) if o.ema else ())
        latest = jnp.arange(BURST) == state.skipped % BURST
        stayed = state._replace(skipped=state.skipped + 1,
                                refused=jnp.where(latest, state.accepted + state.skipped, state.refused))
        return updates, jax.tree.map(lambda a, b: jnp.where(good, a, b), moved, stayed)

    return optax.GradientTransformationExtraArgs(init, update)


def _spikes(loss, state, deviations):
    """Whether the loss lies so many robust standard deviations (1.4826 MAD) above the median of a full window."""
    if not deviations:
        return jnp.zeros([], bool)
    middle = jnp.median(state.window)
    spread = 1.4826 * jnp.median(jnp.abs(state.window - middle))
    return (state.accepted >= WINDOW) & (loss > middle + deviations * spread)


def _factor_zeros(kind, param):
    """Second moments of a parameter, all zero: (rows, columns) of a matrix, or (all,)."""
    if kind.role == "vector":
        return (jnp.zeros_like(param),)
    ins, outs = _sides(kind)
    sums = jax.eval_shape(lambda p: (p.sum(outs, keepdims=True), p.sum(ins, keepdims=True)), param)  # for their layouts
    return jax.tree.map(jnp.zeros_like, sums)


def _factored(kind, g, v, w, *, keep):
    """Adafactor's direction for one parameter, and its new second moments (algorithms 4 to 6)."""
    square = g * g + 1e-30
    if kind.role == "vector":
        v = (keep * v[0] + (1 - keep) * square,)
        u = g * jax.lax.rsqrt(v[0])
    else:
        ins, outs = _sides(kind)
        rows, cols = (keep * old + (1 - keep) * square.mean(side, keepdims=True) for old, side in zip(v, (outs, ins)))
        u = g * jax.lax.rsqrt(rows / rows.mean(ins, keepdims=True)) * jax.lax.rsqrt(cols)
        v = (rows, cols)
    own = tuple(range(_stacked(kind), g.ndim))
    rms = lambda x: jnp.sqrt(jnp.mean(x * x, axis=own, keepdims=True))
    return u / jnp.maximum(1.0, rms(u)) * jnp.maximum(1e-3, rms(w)), v


def _sides(kind) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Axes that a matrix sums over and axes that it puts out; those before, of layers and experts, are in neither."""
    own = range(_stacked(kind), len(kind.letters))
    ins = tuple(i for i in own if kind.letters[i] in kind.fan_in) or (own[0],)  # a table's rows are its ins
    return ins, tuple(i for i in own if i not in ins)


def _stacked(kind) -> int:
    """How many leading axes count layers (L) or experts (E)."""
    return len(kind.letters) - len(kind.letters.lstrip("LE"))


def _times(kinds, factor):
    """Multiply each leaf by `factor(kind)`, a number known beforehand."""
    return optax.stateless(lambda updates, params: _each(kinds, lambda k, u: u * factor(k), updates))


def _each(kinds, function, *trees):
    """function(kind, leaf or subtree of each tree) at every parameter."""
    return jax.tree.map(function, kinds, *trees)
