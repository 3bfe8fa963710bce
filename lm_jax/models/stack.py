"""Blocks, stacked over layers and walked by one scan; and what decoding remembers of them."""

from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lm_jax import parallel
from lm_jax.config import MoEConfig, TransformerConfig
from lm_jax.models import positions
from lm_jax.models.attention import Attention, RelativeBias, alibi, shelved
from lm_jax.models.latent import LatentAttention
from lm_jax.models.layers import MLP, PRODUCT, Norm, depth_ratio, dropout
from lm_jax.models.layouts import SAVED, Layout
from lm_jax.models.moe import MoE


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """What decoding remembers: keys and values of every layer, the layout of their slots, and the next free slot.

    `kept` has, for each run of layers, arrays [L, B, K, S, H] of keys and values, or what else the attention keeps of a
    token; `memory` likewise over the encoder's tokens, with `source` their layout, None without an encoder. Empty slots
    are segment 0, so the one mask hides them.
    """

    kept: tuple[tuple[jax.Array, jax.Array], ...]
    slots: Layout
    at: jax.Array
    memory: tuple[tuple[jax.Array, jax.Array], ...] | None = None
    source: Layout | None = None


class Residual(nnx.Module):
    """x + f(norm x) (pre), norm(x + f x) (post) or x + norm(f(norm x)) (sandwich), the sum scaled by depth in muP."""

    def __init__(self, cfg: TransformerConfig):
        self.place, self.scale, self.dropout = cfg.norm_place, 1 / depth_ratio(cfg), cfg.dropout
        self.before = Norm("D", cfg) if self.place != "post" else None
        self.after = Norm("D", cfg) if self.place != "pre" else None

    def __call__(self, x_BTD, f, *, key=None):
        """`f` returns (y_BTD, extra); so does this."""
        y_BTD, extra = f(x_BTD if self.before is None else self.before(x_BTD))
        y_BTD = dropout(y_BTD, self.dropout, key)
        y_BTD = self.after(y_BTD) if self.place == "sandwich" else y_BTD
        x_BTD = x_BTD + (y_BTD * self.scale if self.scale != 1 else y_BTD)
        return self.after(x_BTD) if self.place == "post" else x_BTD, extra


class Block(nnx.Module):
    """Attention, cross-attention if there is an encoder, and an MLP or experts."""

    def __init__(self, cfg: TransformerConfig, *, cross: bool, rngs: nnx.Rngs):
        self.attention = attention(cfg)(cfg, rngs=rngs)
        self.attention_residual = Residual(cfg)
        self.cross = Attention(cfg, rngs=rngs) if cross else None
        self.cross_residual = Residual(cfg) if cross else None
        self.mlp = MoE(cfg, rngs=rngs) if cfg.moe.experts else MLP(cfg, rngs=rngs)
        self.mlp_residual = Residual(cfg)

    def __call__(self, x_BTD, attend, cross, real_BT, *, key=None):
        """Returns x_BTD, the cache's arrays with the row written (None without a cache) and the router's losses.

        `attend(attention, x)` and `cross(attention, x)` know what is attended to.
        """
        keys = [None] * 5 if key is None else jax.random.split(key, 5)
        x_BTD, kept = self.attention_residual(x_BTD, partial(attend, self.attention, key=keys[0]), key=keys[1])
        if self.cross is not None:
            over = lambda x: (cross(self.cross, x, key=keys[2]), None)
            x_BTD, _ = self.cross_residual(x_BTD, over, key=keys[3])
        if isinstance(self.mlp, MoE):
            x_BTD, router = self.mlp_residual(x_BTD, lambda x: self.mlp(x, real_BT), key=keys[4])
        else:
            x_BTD, router = self.mlp_residual(x_BTD, lambda x: (self.mlp(x), {}), key=keys[4])
        return x_BTD, kept, router


class Stack(nnx.Module):
    """`depth` blocks, stacked by vmap when made and walked by one scan; what differs between layers is scanned data.

    Blocks with experts and blocks without are two kinds of program: where both are, `dense` holds the latter, and each
    run of layers of one kind is a scan.
    """

    def __init__(self, cfg: TransformerConfig, *, depth: int, causal: bool, cross: bool, rngs: nnx.Rngs):
        self.cfg, self.depth, self.causal = cfg, depth, causal
        self.layers = dense_or_experts(cfg, depth)
        plain = replace(cfg, moe=MoEConfig())
        mixed = len(set(self.layers)) > 1
        self.blocks = self._made(cfg if "E" in self.layers else plain, self.layers.count("E") if mixed else depth,
                                 cross, rngs)
        self.dense = self._made(plain, self.layers.count("D"), cross, rngs) if mixed else None
        self.apart = nnx.data(None)  # blocks of one layer each, once `take_apart` has made them
        self.bias = RelativeBias(cfg, causal=causal, rngs=rngs) if cfg.positions == "relative" else None
        self.norm = Norm("D", cfg) if cfg.norm_place != "post" else None

    def __call__(self, x_BTD, layout: Layout, *, memory=None, source=None, cache=None, key=None):
        """x_BTD through all layers and the last norm; the cache with this row written; the router's losses [B]."""
        cfg = self.cfg
        slots = layout if cache is None else _written(cache, layout)
        slots = jax.tree.map(lambda a_BT: parallel.constrain(a_BT, "BS"), slots)
        angles = positions.rotary(cfg, layout.positions_BT) if cfg.positions == "rope" else None
        near = positions.rotary(positions.local(cfg), layout.positions_BT) if cfg.rope.local_theta else angles
        bias = alibi(cfg, layout, slots) if cfg.positions == "alibi" else self.bias and self.bias(layout, slots)
        at = 0 if cache is None else cache.at

        def layer(carry, scanned):
            (x_BTD, kept), (i, block, memory_kv, sliding, key) = carry, scanned
            turns = near if sliding is None or near is angles else jax.tree.map(
                partial(jnp.where, sliding), near, angles)
            attend = lambda attention, x, key: attention(
                x, layout, slots, angles=turns, cache=kept and (kept, i), at=at, key=key, causal=self.causal,
                window=cfg.window, sliding=True if sliding is None else sliding, bias_BNTS=bias)
            if memory is not None:
                memory_kv = block.cross.project(memory)
            elif memory_kv is not None:
                memory_kv = tuple(a.swapaxes(1, 2) for a in memory_kv)
            cross = lambda attention, x, key: attention.cross(x, memory_kv, layout, source, key=key)
            x_BTD, kept, router = block(x_BTD, attend, cross, layout.segments_BT > 0, key=key)
            return (x_BTD, kept), router

        sliding = self.sliding()
        scanned = (None if all(sliding) else np.array(sliding),
                   None if key is None else jax.random.split(key, self.depth))
        every, routers = [], []
        for run, (blocks, layers) in enumerate(self.runs()):
            start = x_BTD, cache and cache.kept[run]
            part = blocks, cache and cache.memory and cache.memory[run], *jax.tree.map(lambda a: a[layers], scanned)
            (x_BTD, kept), router_L = self._walk(REMAT[cfg.remat](layer), start, layers, part)
            every, routers = every + [kept], routers + [router_L] * bool(router_L)
        router_L = _joined(routers) if routers else {}
        x_BTD = x_BTD if self.norm is None else self.norm(x_BTD)
        if cache is not None:
            cache = replace(cache, kept=tuple(every), slots=slots, at=at + layout.positions_BT.shape[1])
        return x_BTD, cache, jax.tree.map(lambda a_LB: a_LB.mean(0), router_L)

    def sliding(self) -> list[bool]:
        """Which layers see `window` positions and not all: the pattern repeated."""
        return [letter == "S" for letter in repeated(self.cfg.window_pattern, self.depth)]

    def runs(self):
        """Runs of layers that one scan walks: their stacked blocks and which layers those are;
        or, of layers taken apart, a block and its layer."""
        if self.apart is not None:
            yield from ((block, i) for i, block in enumerate(self.apart))
            return
        at = {"D": 0, "E": 0}
        for letter, run in groupby(self.layers):
            length, start = len(list(run)), sum(at.values())
            blocks = self.dense if letter == "D" and self.dense is not None else self.blocks
            own = slice(at[letter], at[letter] + length)
            yield jax.tree.map(partial(_cut, part=own), blocks), slice(start, start + length)
            at[letter] += length

    def empty(self, rows: int, slots: int):
        """`Cache.kept` of empty slots."""

        def array(layers, heads, size):
            shape = rows, heads, slots, size
            shape = shape if isinstance(layers, int) else (_count(layers), *shape)
            return parallel.constrain(jnp.zeros(shape, self.cfg.dtype), "LBKSH"[-len(shape):])

        kinds = attention(self.cfg).kept(self.cfg)
        return tuple(tuple(array(layers, *each) for each in kinds) for _, layers in self.runs())

    def remembered(self, memory):
        """`Cache.memory` of an encoder's output."""
        over = lambda block: tuple(map(shelved, block.cross.project(memory)))
        return tuple(over(blocks) if isinstance(layers, int) else jax.lax.map(over, blocks)
                     for blocks, layers in self.runs())

    def take_apart(self):
        """Give each layer a block of its own."""
        each = (block if isinstance(layers, int) else jax.tree.map(lambda w, i=i: w[i], block)
                for block, layers in self.runs() for i in ([0] if isinstance(layers, int) else range(_count(layers))))
        self.apart, self.blocks, self.dense = nnx.List(each), None, None

    @staticmethod
    def _walk(layer, carry, layers, part):
        """The carry through a run of layers, and what each gives besides."""
        if isinstance(layers, int):
            carry, more = layer(carry, (None, *part))
            return carry, jax.tree.map(lambda a: a[None], more)
        # a scanned body trains at half the speed of an unrolled one on CPU
        return jax.lax.scan(layer, carry, (jnp.arange(_count(layers)), *part), unroll=parallel.on_cpu())

    @staticmethod
    def _made(cfg, depth, cross, rngs):
        """`depth` blocks as one."""
        blocks = jax.vmap(lambda key: Block(cfg, cross=cross, rngs=nnx.Rngs(key)))(
            jax.random.split(rngs.params(), depth))
        for _, param in nnx.to_flat_state(nnx.state(blocks, nnx.Param)):
            param.set_metadata(kind=replace(param.kind, letters="L" + param.kind.letters, depth_ratio=depth_ratio(cfg)))
        return blocks


def attention(cfg: TransformerConfig) -> type[Attention]:
    """The kind of attention that a row pays to itself."""
    return LatentAttention if cfg.latent else Attention


def dense_or_experts(cfg: TransformerConfig, depth: int) -> str:
    """A letter a layer: E experts, D a dense MLP."""
    return repeated(cfg.moe.pattern if cfg.moe.experts else "D", depth)


def repeated(pattern: str, depth: int) -> str:
    return (pattern * depth)[:depth]


REMAT = {
    "none": lambda f: f,
    "full": partial(jax.checkpoint, prevent_cse=False),
    "dots": partial(jax.checkpoint, prevent_cse=False,
                    policy=jax.checkpoint_policies.save_only_these_names(PRODUCT, SAVED)),
}


def _written(cache: Cache, layout: Layout) -> Layout:
    """The slots' layout with a row's written at the next free slot."""
    layout = jax.tree.map(lambda a_BT: parallel.constrain(a_BT, "BS"), replace(layout, order_BT=layout.ordered_BT))
    write = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, cache.at, axis=1)
    return jax.tree.map(write, cache.slots, layout)


def _cut(a_L, part: slice):
    """Layers of what is stacked; of all of them, the array itself."""
    return a_L if (part.start, part.stop) == (0, a_L.shape[0]) else a_L[part]


def _count(layers: slice) -> int:
    return layers.stop - layers.start


def _joined(parts: list):
    """What runs of layers gave, as of one stack."""
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *a_L: jnp.concatenate(a_L), *parts)
