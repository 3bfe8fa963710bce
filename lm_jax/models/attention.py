"""Attention: the layer, and what may be added to its logits."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from lm_jax import parallel
from lm_jax.config import TransformerConfig
from lm_jax.models import kernels, positions
from lm_jax.models.layers import Einsum, Norm, constant, dropout, normal, residual_gain
from lm_jax.models.layouts import Layout, distance


class Attention(nnx.Module):
    """Multi-head, grouped-query or multi-query attention over the row itself, or over an encoder's `memory`."""

    def __init__(self, cfg: TransformerConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        inner, outer = cfg.bias in ("qkv", "attention", "all"), cfg.bias in ("attention", "all")
        even = 1 / (attention_scale(cfg) * cfg.sizes["H"] ** 0.5)  # scaled products start at about 1, T5's too
        self.query = Einsum("BTD,DNH->BTNH", cfg, rngs=rngs, bias=inner, gain=even)
        self.key = Einsum("BTD,DKH->BTKH", cfg, rngs=rngs, bias=inner)
        self.value = Einsum("BTD,DKH->BTKH", cfg, rngs=rngs, bias=inner)
        self.out = Einsum("BTNH,NHD->BTD", cfg, rngs=rngs, bias=outer, gain=residual_gain(cfg))
        self.query_norm = Norm("H", cfg) if cfg.qk_norm else None
        self.key_norm = Norm("H", cfg) if cfg.qk_norm else None
        self.sinks = constant("N", cfg, 0.0) if cfg.sinks else None

    def __call__(self, x_BTD, layout: Layout, slots: Layout, *, angles=None, cache=None, at=0, key=None, **asked):
        """Attention of a row to itself, or to `cache` with the row written at `at`; `slots` is what is attended to.

        `cache` is (arrays of a run of layers, which of them); returns y_BTD and these arrays with the row, or None.
        `asked`: causal, window, sliding, bias_BNTS, as in kernels.
        """
        q_BTNH = self.query(x_BTD)
        q_BTNH = q_BTNH if self.query_norm is None else self.query_norm(q_BTNH)
        q_BTNH = q_BTNH if angles is None else positions.rotate(q_BTNH, *angles, self.cfg)
        kv, kept = self.project(x_BTD, angles=angles), None
        if cache is not None:
            kept, kv = written(*cache, kv, at)
        use = "row" if cache is None else "cache"
        return self.attend(q_BTNH, kv, layout, slots, use=use, key=key, **asked), kept

    def cross(self, x_BTD, memory, layout: Layout, source: Layout, *, key=None):
        """Attention of x over (keys, values) that `project` made of an encoder's output; returns y_BTD."""
        q_BTNH = self.query(x_BTD)
        q_BTNH = q_BTNH if self.query_norm is None else self.query_norm(q_BTNH)
        return self.attend(q_BTNH, memory, layout, source, use="cross", key=key, causal=False)

    def project(self, x_BTD, *, angles=None):
        """(k_BTKH, v_BTKH) of a row."""
        k_BTKH = self.key(x_BTD)
        k_BTKH = k_BTKH if self.key_norm is None else self.key_norm(k_BTKH)
        k_BTKH = k_BTKH if angles is None else positions.rotate(k_BTKH, *angles, self.cfg)
        return k_BTKH, self.value(x_BTD)

    def attend(self, q_BTNH, kv, query: Layout, slots: Layout, *, use: str, key=None, **asked):
        cfg = self.cfg
        name = kernels.choose(cfg, q_BTNH.shape[1], use=use, prefix=query.order_BT is not None)
        drop = partial(dropout, rate=cfg.dropout, key=key) if key is not None and cfg.dropout else None
        y_BTNH = kernels.attend(
            name, q_BTNH, *kv, query, slots, scale=attention_scale(cfg), softcap=cfg.attention_softcap or None,
            drop=drop, sinks_N=None if self.sinks is None else self.sinks[...], **asked)
        return self.out(y_BTNH)

    @staticmethod
    def kept(cfg: TransformerConfig) -> tuple[tuple[int, int], ...]:
        """Heads and sizes of what a cache keeps of a token: keys and values."""
        return ((cfg.sizes["K"], cfg.sizes["H"]),) * 2


class RelativeBias(nnx.Module):
    """T5's learned bias per head and distance bucket, one table for all layers of a stack."""

    def __init__(self, cfg: TransformerConfig, *, causal: bool, rngs: nnx.Rngs):
        self.causal, self.farthest = causal, cfg.farthest
        self.table = normal("UN", cfg, rngs=rngs, std=cfg.init_std or 0.02, fan_in="", role="embedding")

    def __call__(self, query: Layout, key: Layout):
        table_UN = parallel.gather(self.table[...], "UN")
        bucket_BTS = positions.buckets(-distance(query, key), causal=self.causal, count=table_UN.shape[0],
                                       farthest=self.farthest)
        sharding = parallel.activation("BTSN", (*bucket_BTS.shape, table_UN.shape[1]))
        return jnp.moveaxis(table_UN.at[bucket_BTS].get(out_sharding=sharding), 3, 1)


def alibi(cfg: TransformerConfig, query: Layout, key: Layout):
    """ALiBi's bias_BNTS for two layouts."""
    return parallel.constrain(positions.alibi(distance(query, key), cfg.heads), "BNTS")


def attention_scale(cfg: TransformerConfig) -> float:
    """1/sqrt(H) unless set; in muP too, where the number of heads grows and not their size. YaRN may sharpen it."""
    sharper = positions.mscale(cfg.rope.factor, cfg.rope.mscale_all) if cfg.rope.mscale_all else 1.0
    return (cfg.attention_scale or cfg.sizes["H"] ** -0.5) * sharper**2


def written(kept, layer, row, at):
    """A cache's arrays [L, B, K, S, H] with a row's, [B, T, K, H], written in place at `at`; and those of `layer` as
    [B, S, K, H], which is how kernels read them and no copy: heads before slots is what their products want.

    Without a `layer`, arrays are one's own, [B, K, S, H].
    """
    row = [shelved(new).astype(old.dtype) for old, new in zip(kept, row)]
    if layer is None:
        kept = here = tuple(jax.lax.dynamic_update_slice_in_dim(old, new, at, axis=2) for old, new in zip(kept, row))
    else:
        place = layer, 0, 0, at, 0
        kept = tuple(jax.lax.dynamic_update_slice(old, new[None], place) for old, new in zip(kept, row))
        here = tuple(jax.lax.dynamic_index_in_dim(a, layer, keepdims=False) for a in kept)
    return kept, tuple(a.swapaxes(1, 2) for a in here)


def shelved(x_BTKH):
    """Keys or values of a row as a cache has them, [B, K, T, H], every device holding all of its tokens."""
    return parallel.constrain(x_BTKH, "BSKH").swapaxes(1, 2)
