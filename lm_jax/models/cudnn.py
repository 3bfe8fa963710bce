"""Attention on a GPU: cuDNN's fused kernel, which never writes the logits out, over rows packed with documents.

JAX's public `dot_product_attention` says nothing of packed rows; the function below it takes where each document starts
and how long it is. Packed rows need a Hopper GPU or a Blackwell one of data centres.
"""

import math

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as fused

from lm_jax import parallel
from lm_jax.models.layouts import Layout
from lm_jax.models.xla import xla

GENERATIONS = ("9", "10")  # major compute capabilities: 8 and 12 lack the backward pass of packed rows
SEGMENTS = 32  # documents in a row that the kernel has room for: it keeps T sums of weights for each, used or not
CHUNK = 512  # queries at a time where a row has more


def cudnn(q_BTNH, k_BSKH, v_BSKH, query: Layout, key: Layout, *, causal, scale, window=0, sliding=True):
    """A row's attention to itself, its positions rising by one within each segment and segments in one piece.

    A device whose rows have one with more than SEGMENTS of them, padding counted, computes the same in plain XLA.
    """
    k_BSKH, v_BSKH = (parallel.key_heads(x, "BSKH", q_BTNH.shape[2]) for x in (k_BSKH, v_BSKH))
    letters = ("BTNH", "BSKH", "BSKH", "BT", "BT", "BT", "")

    def local(q_BTNH, k_BSKH, v_BSKH, positions_BT, segments_BT, order_BT, slides):
        layout = Layout(positions_BT, segments_BT, order_BT)
        # of grouped heads JAX to 0.10.2 places the packed keys wrongly (its pull request 39521): no groups, then
        k_BSNH, v_BSNH = (jnp.repeat(x, q_BTNH.shape[2] // x.shape[2], axis=2) for x in (k_BSKH, v_BSKH))
        starts_BM, lengths_BM, most = runs(segments_BT)

        def rows(window):
            def packed():
                if not is_here():
                    return _types(q_BTNH, k_BSNH, v_BSNH, starts_BM, lengths_BM)
                return fused.dot_product_attention(
                    q_BTNH, k_BSNH, v_BSNH, q_seqlen=lengths_BM, kv_seqlen=lengths_BM, q_offsets=starts_BM,
                    kv_offsets=starts_BM, scale=scale, sliding_window_length=window or None,
                    mask_type=fused.MaskType.PADDING_CAUSAL if causal else fused.MaskType.PADDING)

            plain = lambda: _chunked(q_BTNH, k_BSKH, v_BSKH, layout, causal=causal, scale=scale, window=window)
            return jax.lax.cond(most <= SEGMENTS, packed, plain)

        if slides is None:
            return rows(window)
        return jax.lax.cond(slides, lambda: rows(window), lambda: rows(0))

    slides = None if sliding is True or not window else sliding
    return parallel.per_shard(local, q_BTNH, k_BSKH, v_BSKH, query.positions_BT, query.segments_BT, query.order_BT,
                              slides, letters=letters)


def is_here() -> bool:
    """Whether this process has a GPU with the kernel, which JAX asks even of a program that is only traced."""
    capability = getattr(jax.devices()[0], "compute_capability", "")
    return jax.default_backend() == "gpu" and capability.split(".")[0] in GENERATIONS


def runs(segments_BT):
    """Where each run of equal segments starts [B, M + 1] and how long it is [B, M], -1 where a row has fewer, and the
    most runs that any row has; M is SEGMENTS, or T if that is less. Padding is a run: each token is in one."""
    B, T = segments_BT.shape
    M = min(SEGMENTS, T)
    new_BT = jnp.concatenate([jnp.ones((B, 1), bool), segments_BT[:, 1:] != segments_BT[:, :-1]], axis=1)
    run_BT = jnp.cumsum(new_BT, 1) - 1
    lengths_BM = jax.vmap(lambda run_T: jnp.zeros(M, jnp.int32).at[run_T].add(1, mode="drop"))(run_BT)
    starts_BM = jnp.cumsum(lengths_BM, 1, dtype=jnp.int32) - lengths_BM
    hide = lambda x_BM: jnp.where(lengths_BM > 0, x_BM, -1)
    return jnp.pad(hide(starts_BM), ((0, 0), (0, 1)), constant_values=-1), hide(lengths_BM), run_BT.max() + 1


@jax.custom_vjp
def _types(q_BTNH, k_BSNH, v_BSNH, starts_BM, lengths_BM):
    """What the kernel gives and keeps, by type, for programs that are planned where it is not; NaN if one is run."""
    return q_BTNH * jnp.nan


def _types_forward(*args):
    q_BTNH, *_, lengths_BM = args
    y_BTNH = _types(*args)
    sums_BNT = jnp.swapaxes(y_BTNH.astype(jnp.float32).sum(-1), 1, 2)
    return y_BTNH, (*args, y_BTNH, jnp.repeat(sums_BNT, lengths_BM.shape[1], axis=0))  # sums for each segment


def _types_backward(kept, dy_BTNH):
    return *(x * dy_BTNH.sum() for x in kept[:3]), None, None


_types.defvjp(_types_forward, _types_backward)


def _chunked(q_BTNH, k_BSKH, v_BSKH, layout: Layout, **rule):
    """Plain attention, a few queries at a time, so that no row's logits are all held at once."""
    T = q_BTNH.shape[1]
    size = math.gcd(T, CHUNK)

    @jax.checkpoint
    def piece(start):
        q, query = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, axis=1), (q_BTNH, layout))
        return xla(q, k_BSKH, v_BSKH, query, layout, **rule)

    return jnp.moveaxis(jax.lax.map(piece, jnp.arange(0, T, size)), 0, 1).reshape(q_BTNH.shape)
