"""Attention: layouts of tokens, the one mask, and the layer."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from lm_jax import parallel
from lm_jax.batch import Batch
from lm_jax.config import TransformerConfig
from lm_jax.models import positions
from lm_jax.models.layers import Einsum, Norm, constant, dropout, normal, residual_gain

MASKED = -1e30  # finite, so that a row which sees nothing gives numbers that nobody reads rather than NaN


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Layout:
    """Where each token of a row stands. All that a mask needs, so that no mask looks at token ids.

    positions_BT feeds distances and embeddings; segments_BT says what belongs together (0: padding, empty cache
    slots); order_BT is what causality compares: the position, except that a prefix shares one order and so sees
    itself whole.
    """

    positions_BT: jax.Array
    segments_BT: jax.Array
    order_BT: jax.Array

    @classmethod
    def of(cls, batch: Batch) -> "Layout":
        order_BT = batch["order"] if "order" in batch else batch["positions"]
        return cls(batch["positions"], batch["segments"], order_BT)


def visible(query: Layout, key: Layout, *, causal: bool, window=0):
    """mask_BTS: which keys each query may see. Packing, padding, causality, cross-attention and the cache at once.

    `window` > 0 (an int or a traced scalar) keeps keys fewer than so many positions away; 0 keeps all.
    """
    mask_BTS = query.segments_BT[:, :, None] == key.segments_BT[:, None, :]
    if causal:
        mask_BTS &= key.order_BT[:, None, :] <= query.order_BT[:, :, None]
    if isinstance(window, int) and window == 0:
        return mask_BTS
    return mask_BTS & ((jnp.abs(_distance(query, key)) < window) | (window == 0))


def xla(q_BTNH, k_BSKH, v_BSKH, mask_BTS, *, scale, softcap=0.0, bias_BNTS=None, sinks_N=None, drop=lambda p: p):
    """Softmax attention in plain XLA, logits in float32; it honours every switch of the house. [B, T, N, H]."""
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
    probs = drop(weights / total).astype(v_BSKH.dtype)
    y_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", probs, v_BSKH)
    return _reshape(y_BTKGH, (B, T, N, H), "BTNH")


KERNELS = {"xla": xla}


class Attention(nnx.Module):
    """Multi-head, grouped-query or multi-query attention over the row itself, or over an encoder's `memory`."""

    def __init__(self, cfg: TransformerConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        inner, outer = cfg.bias in ("qkv", "all"), cfg.bias == "all"
        even = 1 / (attention_scale(cfg) * cfg.sizes["H"] ** 0.5)  # scaled products start at about 1, T5's too
        self.query = Einsum("BTD,DNH->BTNH", cfg, rngs=rngs, bias=inner, gain=even)
        self.key = Einsum("BTD,DKH->BTKH", cfg, rngs=rngs, bias=inner)
        self.value = Einsum("BTD,DKH->BTKH", cfg, rngs=rngs, bias=inner)
        self.out = Einsum("BTNH,NHD->BTD", cfg, rngs=rngs, bias=outer, gain=residual_gain(cfg))
        self.query_norm = Norm("H", cfg) if cfg.qk_norm else None
        self.key_norm = Norm("H", cfg) if cfg.qk_norm else None
        self.sinks = constant("N", cfg, 0.0) if cfg.sinks else None

    def __call__(self, x_BTD, mask_BTS, *, angles=None, bias_BNTS=None, cache=None, at=0, key=None):
        """Returns y_BTD and the (keys, values) attended to: the row's own, or `cache` with the row written at `at`."""
        q_BTNH = self.query(x_BTD)
        q_BTNH = q_BTNH if self.query_norm is None else self.query_norm(q_BTNH)
        q_BTNH = q_BTNH if angles is None else positions.rotate(q_BTNH, *angles, self.cfg)
        kv = self.project(x_BTD, angles=angles)
        if cache is not None:
            kv = tuple(jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), at, axis=1)
                       for old, new in zip(cache, kv))
        return self.attend(q_BTNH, kv, mask_BTS, bias_BNTS=bias_BNTS, key=key), kv

    def cross(self, x_BTD, memory, mask_BTS, *, key=None):
        """Attention of x over (keys, values) that `project` made of an encoder's output; returns y_BTD."""
        q_BTNH = self.query(x_BTD)
        q_BTNH = q_BTNH if self.query_norm is None else self.query_norm(q_BTNH)
        return self.attend(q_BTNH, memory, mask_BTS, key=key)

    def project(self, x_BTD, *, angles=None):
        """(k_BSKH, v_BSKH) of a row, every device holding all of S."""
        k_BTKH = self.key(x_BTD)
        k_BTKH = k_BTKH if self.key_norm is None else self.key_norm(k_BTKH)
        k_BTKH = k_BTKH if angles is None else positions.rotate(k_BTKH, *angles, self.cfg)
        return parallel.constrain(k_BTKH, "BSKH"), parallel.constrain(self.value(x_BTD), "BSKH")

    def attend(self, q_BTNH, kv, mask_BTS, *, bias_BNTS=None, key=None):
        cfg = self.cfg
        drop = (lambda p: dropout(p, cfg.dropout, key)) if key is not None else (lambda p: p)
        y_BTNH = KERNELS["xla"](
            q_BTNH, *(a.astype(q_BTNH.dtype) for a in kv), mask_BTS, scale=attention_scale(cfg),
            softcap=cfg.attention_softcap, bias_BNTS=bias_BNTS, drop=drop,
            sinks_N=None if self.sinks is None else self.sinks[...])
        return self.out(y_BTNH)


class RelativeBias(nnx.Module):
    """T5's learned bias per head and distance bucket, one table for all layers of a stack."""

    def __init__(self, cfg: TransformerConfig, *, causal: bool, rngs: nnx.Rngs):
        self.causal = causal
        self.table = normal("UN", cfg, rngs=rngs, std=cfg.init_std or 0.02, fan_in="", role="embedding")

    def __call__(self, query: Layout, key: Layout):
        table_UN = parallel.gather(self.table[...], "UN")
        bucket_BTS = positions.buckets(-_distance(query, key), causal=self.causal, count=table_UN.shape[0])
        sharding = parallel.activation("BTSN", (*bucket_BTS.shape, table_UN.shape[1]))
        return jnp.moveaxis(table_UN.at[bucket_BTS].get(out_sharding=sharding), 3, 1)


def alibi(cfg: TransformerConfig, query: Layout, key: Layout):
    """ALiBi's bias_BNTS for two layouts."""
    return parallel.constrain(positions.alibi(_distance(query, key), cfg.heads), "BNTS")


def attention_scale(cfg: TransformerConfig) -> float:
    """1/sqrt(H) unless set; in muP too, where the number of heads grows and not their size."""
    return cfg.attention_scale or cfg.sizes["H"] ** -0.5


def _distance(query: Layout, key: Layout):
    return query.positions_BT[:, :, None] - key.positions_BT[:, None, :]


def _reshape(x, shape, letters):
    return jnp.reshape(x, shape, out_sharding=parallel.activation(letters, shape))
