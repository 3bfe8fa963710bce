"""Attention on a TPU: the Pallas kernel of JAX (splash), which never writes the logits out and skips hidden blocks."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from lm_jax import parallel
from lm_jax.models.layouts import SAVED, Layout
from lm_jax.models.ring import AXIS, deal, halves

LANES = 128  # a device's queries are a multiple of this, its halves of rows where they are dealt out
BLOCKS = (512, 256, 128)  # the kernel's tiles: the largest that divides the queries


def splash(q_BTNH, k_BSKH, v_BSKH, query: Layout, key: Layout, *, causal, scale, window=0, sliding=True, softcap=0.0,
           sinks_N=None):
    """A row's attention to itself, its positions rising by one within each segment.

    The kernel compares places in the row and segments, which in such a row is what `visible` does. Where rows are cut
    along their tokens, each device gathers the keys of all, and the queries of causal rows are dealt out as in a ring.
    Off a TPU the kernel is interpreted: for tests.
    """
    k_BSKH, v_BSKH = (parallel.key_heads(x, "BSKH", q_BTNH.shape[2]) for x in (k_BSKH, v_BSKH))
    letters, shards = ("BTNH", "BSKH", "BSKH", "BT", "BS", "N", ""), parallel.axis_size("T")
    dealt = causal and shards > 1

    def local(q_BTNH, k_BSKH, v_BSKH, query_BT, key_BS, sinks_N, slides):
        heads = lambda x: jnp.swapaxes(x, 1, 2)
        q_BTNH, query_BT = deal((q_BTNH, query_BT)) if dealt else (q_BTNH, query_BT)

        def rows(window):
            attend = _kernel(q_BTNH.shape, shards, causal=causal, window=window, softcap=softcap)
            each = lambda q, k, v, *segments: attend(q, k, v, kernel.SegmentIds(*segments), sinks_N)
            return jax.vmap(each)(heads(q_BTNH * scale), heads(k_BSKH), heads(v_BSKH), query_BT, key_BS)

        y_BNTH = rows(window) if slides is None else jax.lax.cond(slides, partial(rows, window), partial(rows, 0))
        return deal(heads(y_BNTH), back=True) if dealt else heads(y_BNTH)

    slides = None if sliding is True or not window else sliding
    return parallel.per_shard(local, q_BTNH, k_BSKH, v_BSKH, query.segments_BT, key.segments_BT, sinks_N, slides,
                              letters=letters)


def _kernel(shape, shards: int, *, causal: bool, window: int, softcap: float):
    """The kernel for a device's queries [T, N] and the keys of the whole row, T times the shards."""
    _, T, N, _ = shape
    part, cuts = T // 2 if shards > 1 else T, shards if causal or window else 1  # full masks are alike on all shards
    size = next(block for block in BLOCKS if part % block == 0)
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute",
             "block_q_dq", "block_kv_dq")
    made = kernel.make_splash_mha(
        masks.MultiHeadMask([_mask(T * cuts, T * shards, shards, causal=causal, window=window)] * N), head_shards=1,
        q_seq_shards=cuts, block_sizes=kernel.BlockSizes(**dict.fromkeys(names, size)),
        attn_logits_soft_cap=softcap or None, residual_checkpoint_name=SAVED, interpret=parallel.platform() != "tpu")
    return made if cuts == 1 else jax.tree.map(partial(_own, shards), made)


def _own(shards: int, x):
    """This device's part of what the kernel knows of its mask: of blocks [N, T, S], or of queries [T]."""
    axis = min(x.ndim - 1, 1)
    size = x.shape[axis] // shards
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(AXIS) * size, size, axis=axis)


def _mask(T: int, S: int, shards: int, *, causal: bool, window: int):
    """Of T queries and the S keys of a row, the queries in the order in which the shards are dealt them."""
    if not causal and not window:
        return masks.FullMask((T, S))
    mask = masks.LocalMask((T, S), (window - 1, 0 if causal else window - 1), 0) if window else masks.CausalMask((T, S))
    if causal and shards > 1:
        mask.q_sequence = np.arange(T, dtype=np.int32).reshape(2 * shards, -1)[np.ravel(halves(shards))].ravel()
    return mask
