"""Attention on a TPU: the Pallas kernel of JAX (splash), which never writes the logits out and skips hidden blocks."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from lm_jax import parallel
from lm_jax.models.layouts import SAVED, Layout

LANES = 128  # rows are a multiple of this
BLOCKS = (512, 256, 128)  # the kernel's tiles: the largest that divides a row


def splash(q_BTNH, k_BSKH, v_BSKH, query: Layout, key: Layout, *, causal, scale, window=0, sliding=True, softcap=0.0,
           sinks_N=None):
    """A row's attention to itself, its positions rising by one within each segment.

    The kernel compares places in the row and segments, which in such a row is what `visible` does. Off a TPU it is
    interpreted: for tests.
    """
    k_BSKH, v_BSKH = (parallel.key_heads(x, "BSKH", q_BTNH.shape[2]) for x in (k_BSKH, v_BSKH))
    letters = ("BTNH", "BSKH", "BSKH", "BT", "BS", "N", "")

    def local(q_BTNH, k_BSKH, v_BSKH, query_BT, key_BS, sinks_N, slides):
        heads = lambda x: jnp.swapaxes(x, 1, 2)

        def rows(window):
            attend = _kernel(q_BTNH.shape, causal=causal, window=window, softcap=softcap)
            each = lambda q, k, v, *segments: attend(q, k, v, kernel.SegmentIds(*segments), sinks_N)
            return jax.vmap(each)(heads(q_BTNH * scale), heads(k_BSKH), heads(v_BSKH), query_BT, key_BS)

        if slides is None:
            return heads(rows(window))
        return heads(jax.lax.cond(slides, partial(rows, window), partial(rows, 0)))

    slides = None if sliding is True or not window else sliding
    return parallel.per_shard(local, q_BTNH, k_BSKH, v_BSKH, query.segments_BT, key.segments_BT, sinks_N, slides,
                              letters=letters)


def _kernel(shape, *, causal: bool, window: int, softcap: float):
    """The kernel for a row of queries [T, N] and its own keys."""
    _, T, N, _ = shape
    size = next(block for block in BLOCKS if T % block == 0)
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute",
             "block_q_dq", "block_kv_dq")
    return kernel.make_splash_mha(
        masks.MultiHeadMask([_mask(T, causal=causal, window=window)] * N), head_shards=1, q_seq_shards=1,
        block_sizes=kernel.BlockSizes(**dict.fromkeys(names, size)), attn_logits_soft_cap=softcap or None,
        residual_checkpoint_name=SAVED, interpret=parallel.platform() != "tpu")


def _mask(T: int, *, causal: bool, window: int):
    if window:
        return masks.LocalMask((T, T), (window - 1, 0 if causal else window - 1), 0)
    return masks.CausalMask((T, T)) if causal else masks.FullMask((T, T))
