"""Attention on a CPU: plain XLA over blocks of queries, its logits made again in the backward pass and never kept.

A block of queries meets only the keys that any of it may see: a causal row's first blocks are short products, a sliding
window's are narrow. The backward pass starts from the outputs and the logarithms of the sums alone (Dao et al. 2022).
Heads come before tokens in every product, which is how its operands lie in memory without a copy of the logits, and
products of bfloat16 accumulate in float32, which is how a CPU does them fast.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lm_jax import parallel
from lm_jax.models.layouts import SAVED, Layout, visible
from lm_jax.models.xla import MASKED

LEAST, MOST = 128, 4  # queries of a block, and blocks of a row: each is compiled once more in every layer


def blocked(q_BTNH, k_BSKH, v_BSKH, query: Layout, key: Layout, *, causal, scale, window=0, sliding=True, softcap=0.0,
            sinks_N=None):
    """A row's attention to itself, its positions rising by one within each segment: of later keys, and of those farther
    than the window, places in the row say enough for blocks to be skipped. The keys' layout is the queries'."""
    del key
    k_BSKH, v_BSKH = (parallel.key_heads(x, "BSKH", q_BTNH.shape[2]) for x in (k_BSKH, v_BSKH))
    slides = None if sliding is True or not window else jnp.asarray(sliding)
    ahead = not causal or query.order_BT is not None  # a prefix sees itself whole
    rule = Rule(causal, ahead, scale, window if sliding is not False else 0, softcap)

    def local(q_BTNH, k_BSKH, v_BSKH, positions_BT, segments_BT, order_BT, sinks_N, slides):
        return _blocked(rule, q_BTNH, k_BSKH, v_BSKH, Layout(positions_BT, segments_BT, order_BT), sinks_N, slides)

    letters = ("BTNH", "BSKH", "BSKH", "BT", "BT", "BT", "N", "")
    return parallel.per_shard(local, q_BTNH, k_BSKH, v_BSKH, query.positions_BT, query.segments_BT, query.order_BT,
                              sinks_N, slides, letters=letters)


@dataclass(frozen=True)
class Rule:
    """What is known of a row's mask and logits when it is traced."""

    causal: bool
    ahead: bool  # whether a query may see a later key
    scale: float
    window: int
    softcap: float

    def spans(self, T: int, *, slides: bool):
        """Each block's queries, and the keys that they may see; `slides` says that the window may not hold."""
        size = -(-T // min(MOST, -(-T // LEAST)))
        reach = T if slides or not self.window else self.window - 1
        for start in range(0, T, size):
            end = min(start + size, T)
            yield slice(start, end), slice(max(0, start - reach), min(T, end + reach) if self.ahead else end)

    def logits(self, q_BKGTH, k_BKSH, mask):
        """What is seen of the logits, and their slope: what the soft-cap leaves of a gradient."""
        logits = _product("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH) * self.scale
        if not self.softcap:
            return jnp.where(mask, logits, MASKED), self.scale
        flat = jnp.tanh(logits / self.softcap)
        return jnp.where(mask, self.softcap * flat, MASKED), self.scale * (1 - flat**2)

    def mask(self, layout: Layout, queries: slice, keys: slice, slides):
        query, key = (jax.tree.map(lambda a_BT: a_BT[:, part], layout) for part in (queries, keys))
        window = self.window if slides is None else jnp.where(slides, self.window, 0)
        return visible(query, key, causal=self.causal, window=window)[:, None, None]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocked(rule: Rule, q_BTNH, k_BSKH, v_BSKH, layout: Layout, sinks_N, slides):
    return _forward(rule, q_BTNH, k_BSKH, v_BSKH, layout, sinks_N, slides)[0]


def _forward(rule: Rule, q_BTNH, k_BSKH, v_BSKH, layout: Layout, sinks_N, slides):
    """y_BTNH, and what the backward pass needs. Weights are divided by their sum after their product with the values:
    of H numbers a query and not of S."""
    q_BKGTH, k_BKSH, v_BKSH = _grouped(q_BTNH, k_BSKH.shape[2]), _heads(k_BSKH), _heads(v_BSKH)
    sinks = None if sinks_N is None else sinks_N.reshape(1, *q_BKGTH.shape[1:3], 1)
    ys, sums = [], []
    for queries, keys in rule.spans(q_BTNH.shape[1], slides=slides is not None):
        mask = rule.mask(layout, queries, keys, slides)
        logits, _ = rule.logits(q_BKGTH[..., queries, :], k_BKSH[..., keys, :], mask)
        highest = logits.max(-1) if sinks is None else jnp.maximum(logits.max(-1), sinks)
        weights = jnp.exp(logits - highest[..., None])
        total = weights.sum(-1) if sinks is None else weights.sum(-1) + jnp.exp(sinks - highest)
        y_BKGTH = _product("BKGTS,BKSH->BKGTH", weights.astype(v_BKSH.dtype), v_BKSH[..., keys, :])
        ys.append((y_BKGTH / total[..., None]).astype(q_BTNH.dtype))
        sums.append(highest + jnp.log(total))
    y_BTNH, sums_BKGT = _heads(jnp.concatenate(ys, 3).reshape(_heads(q_BTNH).shape)), jnp.concatenate(sums, 3)
    y_BTNH, sums_BKGT = checkpoint_name((y_BTNH, sums_BKGT), SAVED)
    return y_BTNH, (q_BTNH, k_BSKH, v_BSKH, layout, sinks_N, slides, y_BTNH, sums_BKGT)


def _backward(rule: Rule, kept, dy_BTNH):
    """With the sums fixed, the gradient of softmax is that of weights and values, less each query's dy . y (delta)."""
    q_BTNH, k_BSKH, v_BSKH, layout, sinks_N, slides, y_BTNH, sums_BKGT = kept
    dtype, (B, T, N, H), K = q_BTNH.dtype, q_BTNH.shape, k_BSKH.shape[2]
    delta_BTN = jnp.sum(dy_BTNH.astype(jnp.float32) * y_BTNH, -1)
    delta_BKGT = delta_BTN.swapaxes(1, 2).reshape(sums_BKGT.shape)
    q_BKGTH, dy_BKGTH, k_BKSH, v_BKSH = _grouped(q_BTNH, K), _grouped(dy_BTNH, K), _heads(k_BSKH), _heads(v_BSKH)
    dqs, (dk_BKHS, dv_BKHS) = [], (jnp.zeros(x_BKSH.swapaxes(2, 3).shape) for x_BKSH in (k_BKSH, v_BKSH))
    for queries, keys in rule.spans(T, slides=slides is not None):
        q, dy = q_BKGTH[..., queries, :], dy_BKGTH[..., queries, :]
        k, v = k_BKSH[..., keys, :], v_BKSH[..., keys, :]
        logits, slope = rule.logits(q, k, rule.mask(layout, queries, keys, slides))
        weights = jnp.exp(logits - sums_BKGT[..., queries, None])
        dweights = _product("BKGTH,BKSH->BKGTS", dy, v) - delta_BKGT[..., queries, None]
        dlogits = (weights * dweights * slope).astype(dtype)
        dqs.append(_product("BKGTS,BKSH->BKGTH", dlogits, k).astype(dtype))
        dk_BKHS = dk_BKHS.at[..., keys].add(_over_queries(q, dlogits))
        dv_BKHS = dv_BKHS.at[..., keys].add(_over_queries(dy, weights.astype(dtype)))
    dq_BTNH = _heads(jnp.concatenate(dqs, 3).reshape(B, N, T, H))
    dsinks_N = None
    if sinks_N is not None:
        sinks = sinks_N.reshape(1, *sums_BKGT.shape[1:3], 1)
        dsinks_N = -(jnp.exp(sinks - sums_BKGT) * delta_BKGT).sum((0, 3)).reshape(N).astype(sinks_N.dtype)
    dk_BSKH, dv_BSKH = (jnp.moveaxis(x_BKHS, 3, 1).astype(dtype) for x_BKHS in (dk_BKHS, dv_BKHS))
    return dq_BTNH, dk_BSKH, dv_BSKH, None, dsinks_N, None


_blocked.defvjp(_forward, _backward)


def _heads(x_BTNH):
    """Heads before tokens, or back."""
    return x_BTNH.swapaxes(1, 2)


def _grouped(x_BTNH, K: int):
    """Heads before tokens, by the key head that they read."""
    B, T, N, H = x_BTNH.shape
    return _heads(x_BTNH).reshape(B, K, N // K, T, H)


def _over_queries(x_BKGTH, weights_BKGTS):
    """Their products summed over a group's queries, [B, K, H, S]: in this order XLA takes the weights as they lie, and
    for [B, K, S, H] it transposes them first. Over one axis it multiplies in float32, whatever they are; over two as
    they are, with a transposed copy of x."""
    if x_BKGTH.dtype != jnp.float32:
        return _product("BKGTH,BKGTS->BKHS", x_BKGTH, weights_BKGTS)
    x_BKTH, weights_BKTS = (a.reshape(*a.shape[:2], -1, a.shape[4]) for a in (x_BKGTH, weights_BKGTS))
    return _product("BKTH,BKTS->BKHS", x_BKTH, weights_BKTS)


_product = partial(jnp.einsum, preferred_element_type=jnp.float32)
