"""Attention in plain XLA, which can do everything, anywhere."""

import jax
import jax.numpy as jnp

from lm_jax import parallel
from lm_jax.models.layouts import Layout, visible

MASKED = -1e30  # finite, so that a row which sees nothing gives numbers that nobody reads rather than NaN


def xla(q_BTNH, k_BSKH, v_BSKH, query: Layout, key: Layout, *, causal, scale, window=0, sliding=True, softcap=0.0,
        sinks_N=None, bias_BNTS=None, drop=None):
    """Softmax attention, its logits in float32 and written out [B, N, T, S]; values may have a size of their own."""
    k_BSKH, v_BSKH = (parallel.key_heads(x, "BSKH", q_BTNH.shape[2]) for x in (k_BSKH, v_BSKH))
    mask_BTS = visible(query, key, causal=causal, window=window if sliding is True else jnp.where(sliding, window, 0))
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = _reshape(q_BTNH, (B, T, K, N // K, H), "BTKGH")
    logits = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32) * scale
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    if bias_BNTS is not None:
        logits += _reshape(bias_BNTS, (bias_BNTS.shape[0], K, N // K, *bias_BNTS.shape[2:]), "BKGTS")
    logits = jnp.where(mask_BTS[:, None, None], logits, MASKED)
    highest = logits.max(-1, keepdims=True)
    if sinks_N is not None:
        sinks = sinks_N.reshape(K, N // K, 1, 1)
        highest = jnp.maximum(highest, sinks)
    highest = jax.lax.stop_gradient(highest)
    weights = jnp.exp(logits - highest)
    total = weights.sum(-1, keepdims=True)
    if sinks_N is not None:
        total += jnp.exp(sinks - highest)
    probs = weights / total
    probs = (probs if drop is None else drop(probs)).astype(v_BSKH.dtype)
    y_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", probs, v_BSKH)
    return _reshape(y_BTKGH, (B, T, N, v_BSKH.shape[3]), "BTNH")


def _reshape(x, shape, letters):
    return jnp.reshape(x, shape, out_sharding=parallel.activation(letters, shape))
