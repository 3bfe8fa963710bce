"""Attention of rows that are cut along their tokens: keys and values go round a ring, queries stay (Liu et al. 2023).

Each device keeps its part of the queries and sees every part of the keys once, as it comes by; softmax is online, in
float32. The backward pass rides the ring again from the outputs and the logarithms of the sums alone, so that no device
ever holds more than two parts of the keys. Causal rows are dealt out first: of a row on n devices in 2 n halves of
parts, the device that has half h gets half 2 n - 1 - h as well, so that all have the same work. A pair of halves in
which no query sees a key is skipped.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lm_jax import parallel
from lm_jax.models.layouts import SAVED, Layout, visible
from lm_jax.models.xla import MASKED

AXIS = parallel.ACTIVATIONS["T"]
LOWEST = MASKED / 2  # a maximum to start from, under which a hidden logit's weight is exactly 0


def ring(q_BTNH, k_BTKH, v_BTKH, query: Layout, key: Layout, *, causal, scale, window=0, sliding=True, softcap=0.0,
         sinks_N=None):
    """A row's attention to itself, whatever its layout; the keys' is the queries', and travels with them."""
    del key
    k_BTKH, v_BTKH = (parallel.key_heads(x, "BTKH", q_BTNH.shape[2]) for x in (k_BTKH, v_BTKH))
    window = jnp.asarray(window if sliding is True else jnp.where(sliding, window, 0))
    letters = ("BTNH", "BTKH", "BTKH", "BT", "BT", "BT", "N", "")

    def local(q_BTNH, k_BTKH, v_BTKH, positions_BT, segments_BT, order_BT, sinks_N, window):
        B, T, N, H = q_BTNH.shape
        q_BTKGH = q_BTNH.reshape(B, T, k_BTKH.shape[2], -1, H)
        parts = q_BTKGH, (k_BTKH, v_BTKH), Layout(positions_BT, segments_BT, order_BT)
        parts = deal(parts) if causal else parts
        sinks_KG = None if sinks_N is None else sinks_N.reshape(q_BTKGH.shape[2:4])
        y_BTKGH = _ring((causal, scale, softcap), *parts, sinks_KG, window)
        return (deal(y_BTKGH, back=True) if causal else y_BTKGH).reshape(B, T, N, H)

    return parallel.per_shard(local, q_BTNH, k_BTKH, v_BTKH, query.positions_BT, query.segments_BT, query.order_BT,
                              sinks_N, window, letters=letters)


def halves(n: int) -> list[list[int]]:
    """Which halves of parts each of n devices is dealt: the even one, then the odd one."""
    return [sorted((i, 2 * n - 1 - i), key=lambda half: half % 2) for i in range(n)]


def deal(tree, *, back: bool = False):
    """Halves 2 i and 2 i + 1 from device i to where `halves` says, or back: two permutations, for any n."""
    n = jax.lax.axis_size(AXIS)
    routes = [[(pair[odd] // 2, i) for i, pair in enumerate(halves(n))] for odd in (0, 1)]
    routes = [[pair[::-1] for pair in route] for route in routes] if back else routes
    return _joined(*(jax.lax.ppermute(half, AXIS, route) for half, route in zip(_halves(tree), routes)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(rule, q, kv, layout: Layout, sinks, window):
    return _forward(rule, q, kv, layout, sinks, window)[0]


def _forward(rule, q, kv, layout: Layout, sinks, window):
    """y_BTKGH, and what the backward pass needs. What is carried is softmax over the keys seen so far: the highest
    logit and the total weight of each query, and the weighted values, not yet divided by it."""
    start = jnp.broadcast_to(LOWEST if sinks is None else sinks, q.shape[:4]).astype(jnp.float32)
    seen = start, jnp.full_like(start, sinks is not None), jnp.zeros_like(q, jnp.float32)

    def meet(mine, theirs, seen):
        (q, query), ((k, v), key), (highest, total, y) = mine, theirs, seen
        logits = _logits(rule, q, k, query, key, window)
        new = jnp.maximum(highest, logits.max(-1))
        weights, rest = jnp.exp(logits - new[..., None]), jnp.exp(highest - new)
        values = jnp.einsum("BTKGS,BSKH->BTKGH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return new, total * rest + weights.sum(-1), y * rest[..., None] + values

    def all_pairs(seen, theirs):
        done = []
        for mine, seen in zip(_halves((q, layout)), _halves(seen)):
            for other in _halves(theirs):
                seen = jax.lax.cond(_meets(rule, mine[-1], other[-1], window), meet, lambda *args: args[2],
                                    mine, other, seen)
            done.append(seen)
        return _joined(*done)

    theirs = kv, layout
    for _ in range(jax.lax.axis_size(AXIS) - 1):  # each hop an op of its own: on CPUs, passages of one op race
        seen, theirs = all_pairs(seen, theirs), _passed(theirs)
    highest, total, y = all_pairs(seen, theirs)
    total = jnp.where(total > 0, total, 1)
    sums = jnp.where(highest > LOWEST, highest + jnp.log(total), 0)
    y, sums = checkpoint_name(((y / total[..., None]).astype(q.dtype), sums), SAVED)
    return y, (q, kv, layout, sinks, window, y, sums)


def _backward(rule, kept, dy):
    """With the sums fixed, the gradient of softmax is that of weights and values, less each query's dy . y (delta)."""
    q, kv, layout, sinks, window, y, sums = kept
    delta = jnp.sum(dy.astype(jnp.float32) * y, -1)

    def meet(mine, theirs, dq, dkv):
        (q, dy, delta, sums, query), ((k, v), key) = mine, theirs

        def weighed(q, k, v):
            weights = jnp.exp(_logits(rule, q, k, query, key, window) - sums[..., None])
            return jnp.einsum("BTKGS,BSKH->BTKGH", weights.astype(v.dtype), v), weights.sum(-1)

        more = jax.vjp(weighed, q, k, v)[1]((dy, -delta))
        return jax.tree.map(jnp.add, (dq, dkv), (more[0], more[1:]))

    def all_pairs(dq, dkv, theirs):
        dq, dkv = _halves(dq), _halves(dkv)
        for i, mine in enumerate(_halves((q, dy, delta, sums, layout))):
            for j, other in enumerate(_halves(theirs)):
                dq[i], dkv[j] = jax.lax.cond(_meets(rule, mine[-1], other[-1], window), meet, lambda *args: args[2:],
                                             mine, other, dq[i], dkv[j])
        return _joined(*dq), _joined(*dkv)

    (dq, dkv), theirs = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), (q, kv)), (kv, layout)
    for _ in range(jax.lax.axis_size(AXIS) - 1):
        dq, dkv = all_pairs(dq, dkv, theirs)
        dkv, theirs = _passed((dkv, theirs))
    dq, dkv = all_pairs(dq, dkv, theirs)
    dq, dkv = jax.tree.map(lambda dx, x: dx.astype(x.dtype), (dq, _passed(dkv)), (q, kv))
    dsinks = None if sinks is None else -(jnp.exp(sinks - sums) * delta).sum((0, 1)).astype(sinks.dtype)
    return dq, dkv, None, dsinks, None


_ring.defvjp(_forward, _backward)


def _logits(rule, q_BTKGH, k_BSKH, query: Layout, key: Layout, window):
    causal, scale, softcap = rule
    logits = jnp.einsum("BTKGH,BSKH->BTKGS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32) * scale
    logits = softcap * jnp.tanh(logits / softcap) if softcap else logits
    return jnp.where(visible(query, key, causal=causal, window=window)[:, :, None, None], logits, MASKED)


def _meets(rule, query: Layout, key: Layout, window):
    """Whether any query sees any key."""
    return visible(query, key, causal=rule[0], window=window).any()


def _halves(tree) -> list:
    return [jax.tree.map(lambda x: jnp.split(x, 2, axis=1)[i], tree) for i in (0, 1)]


def _joined(first, second):
    return jax.tree.map(lambda *halves: jnp.concatenate(halves, axis=1), first, second)


def _passed(tree):
    """Each device's arrays at the next one."""
    n = jax.lax.axis_size(AXIS)
    return jax.lax.ppermute(tree, AXIS, [(i, (i + 1) % n) for i in range(n)])
