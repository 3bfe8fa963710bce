"""One Transformer for three families: decoder (GPT, LLaMA), encoder (BERT), encoder-decoder (T5)."""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from lm_jax import parallel
from lm_jax.batch import Batch
from lm_jax.config import TransformerConfig
from lm_jax.models import heads, positions
from lm_jax.models.attention import Attention, RelativeBias, alibi, whole
from lm_jax.models.layers import MLP, PRODUCT, Einsum, Embed, Norm, depth_ratio, dropout, matmul, width_ratio
from lm_jax.models.layouts import SAVED, Layout
from lm_jax.models.moe import MoE


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """What decoding remembers: keys and values of every layer, the layout of their slots, and the next free slot.

    `kv_L` are arrays [L, B, S, K, H]; `memory_L` likewise over the encoder's tokens, with `source` their layout, None
    without an encoder. Empty slots are segment 0, so the one mask hides them.
    """

    kv_L: tuple[jax.Array, jax.Array]
    slots: Layout
    at: jax.Array
    memory_L: tuple[jax.Array, jax.Array] | None = None
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
        self.attention = Attention(cfg, rngs=rngs)
        self.attention_residual = Residual(cfg)
        self.cross = Attention(cfg, rngs=rngs) if cross else None
        self.cross_residual = Residual(cfg) if cross else None
        self.mlp = MoE(cfg, rngs=rngs) if cfg.moe.experts else MLP(cfg, rngs=rngs)
        self.mlp_residual = Residual(cfg)

    def __call__(self, x_BTD, attend, cross, real_BT, *, key=None):
        """Returns x_BTD, the layer's (keys, values) and the router's losses.

        `attend(attention, x)` and `cross(attention, x)` know what is attended to.
        """
        keys = [None] * 5 if key is None else jax.random.split(key, 5)
        x_BTD, kv = self.attention_residual(x_BTD, partial(attend, self.attention, key=keys[0]), key=keys[1])
        if self.cross is not None:
            over = lambda x: (cross(self.cross, x, key=keys[2]), None)
            x_BTD, _ = self.cross_residual(x_BTD, over, key=keys[3])
        if isinstance(self.mlp, MoE):
            x_BTD, router = self.mlp_residual(x_BTD, lambda x: self.mlp(x, real_BT), key=keys[4])
        else:
            x_BTD, router = self.mlp_residual(x_BTD, lambda x: (self.mlp(x), {}), key=keys[4])
        return x_BTD, kv, router


class Stack(nnx.Module):
    """`depth` blocks, stacked by vmap when made and walked by one scan; what differs between layers is scanned data."""

    def __init__(self, cfg: TransformerConfig, *, depth: int, causal: bool, cross: bool, rngs: nnx.Rngs):
        self.cfg, self.depth, self.causal = cfg, depth, causal
        self.blocks = jax.vmap(lambda key: Block(cfg, cross=cross, rngs=nnx.Rngs(key)))(
            jax.random.split(rngs.params(), depth))
        for _, param in nnx.to_flat_state(nnx.state(self.blocks, nnx.Param)):
            param.set_metadata(kind=replace(param.kind, letters="L" + param.kind.letters, depth_ratio=depth_ratio(cfg)))
        self.bias = RelativeBias(cfg, causal=causal, rngs=rngs) if cfg.positions == "relative" else None
        self.norm = Norm("D", cfg) if cfg.norm_place != "post" else None

    def __call__(self, x_BTD, layout: Layout, *, memory=None, source=None, cache=None, key=None):
        """x_BTD through all layers and the last norm; the cache with this row written; the router's losses [B]."""
        cfg = self.cfg
        slots = layout if cache is None else _written(cache, layout)
        slots = jax.tree.map(lambda a_BT: parallel.constrain(a_BT, "BS"), slots)
        angles = positions.rotary(cfg, layout.positions_BT) if cfg.positions == "rope" else None
        bias = alibi(cfg, layout, slots) if cfg.positions == "alibi" else self.bias and self.bias(layout, slots)
        at = 0 if cache is None else cache.at

        def layer(x_BTD, scanned):
            block, sliding, kv, memory_kv, key = scanned
            attend = lambda attention, x, key: attention(
                x, layout, slots, angles=angles, cache=kv, at=at, key=key, causal=self.causal, window=cfg.window,
                sliding=True if sliding is None else sliding, bias_BNTS=bias)
            if memory is not None and memory_kv is None:
                memory_kv = block.cross.project(memory)
            cross = lambda attention, x, key: attention.cross(x, memory_kv, layout, source, key=key)
            x_BTD, kv_new, router = block(x_BTD, attend, cross, layout.segments_BT > 0, key=key)
            return x_BTD, (kv_new if kv is not None else None, router)

        sliding = self.sliding()
        scanned = (self.blocks, None if all(sliding) else jnp.asarray(sliding), cache and cache.kv_L,
                   cache and cache.memory_L, None if key is None else jax.random.split(key, self.depth))
        # a scanned body trains at half the speed of an unrolled one on CPU
        x_BTD, (kv_L, router_L) = jax.lax.scan(REMAT[cfg.remat](layer), x_BTD, scanned, unroll=parallel.on_cpu())
        x_BTD = x_BTD if self.norm is None else self.norm(x_BTD)
        if cache is not None:
            cache = replace(cache, kv_L=kv_L, slots=slots, at=at + layout.positions_BT.shape[1])
        return x_BTD, cache, jax.tree.map(lambda a_LB: a_LB.mean(0), router_L)

    def sliding(self) -> list[bool]:
        """Which layers see `window` positions and not all: the pattern repeated."""
        pattern = self.cfg.window_pattern
        return [pattern[i % len(pattern)] == "S" for i in range(self.depth)]


REMAT = {
    "none": lambda f: f,
    "full": partial(jax.checkpoint, prevent_cse=False),
    "dots": partial(jax.checkpoint, prevent_cse=False,
                    policy=jax.checkpoint_policies.save_only_these_names(PRODUCT, SAVED)),
}


class Transformer(nnx.Module):
    """Embeddings, one or two stacks, and a head, as `cfg` says."""

    def __init__(self, cfg: TransformerConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.embed = Embed("VD", cfg, rngs=rngs)
        self.places = Embed("PD", cfg, rngs=rngs) if cfg.positions == "learned" else None
        self.types = Embed("GD", cfg, rngs=rngs) if cfg.types else None
        self.embed_norm = Norm("D", cfg) if cfg.embed_norm else None
        stack = partial(Stack, cfg, rngs=rngs)
        self.encoder = stack(depth=cfg.encoder_depth, causal=False, cross=False) if cfg.encoder_depth else None
        self.decoder = stack(depth=cfg.depth, causal=cfg.causal, cross=cfg.encoder_depth > 0)
        self.unembed = None if cfg.tied else Einsum("BTD,DV->BTV", cfg, rngs=rngs, role="head")
        self.transform = heads.MaskedHead(cfg, rngs=rngs) if cfg.head in ("mlm", "bert") else None
        self.pooler = heads.Pooler(cfg, rngs=rngs) if cfg.head == "bert" else None

    def __call__(self, batch: Batch, *, key=None):
        """logits_BTV of a batch: for small models and tests; training goes through `hidden` and a chunked loss."""
        return self.logits(self.hidden(batch, key=key)[0])

    def hidden(self, batch: Batch, *, cache: Cache | None = None, key=None):
        """The last stack's x_BTD, the cache (None in, None out), and the router's losses, a dict of [B].

        With a cache, `batch` holds the next tokens of each row and, for an encoder-decoder, needs no source.
        """
        keys = [None] * 4 if key is None else jax.random.split(key, 4)
        layout, memory, source, router = Layout.of(batch), None, None, {}
        if cache is not None:
            source = cache.source
        elif self.encoder is not None:
            memory, source, router = self.encode(batch["source"], keys=keys[:2])
        x_BTD = self.embedded(batch, key=keys[2])
        x_BTD, cache, more = self.decoder(x_BTD, layout, memory=memory, source=source, cache=cache, key=keys[3])
        return x_BTD, cache, {name: more[name] + router.get(name, 0) for name in more}

    def logits(self, x_BTD):
        """logits_BTV of hidden states, in float32."""
        return self.unembedded(self.outward(x_BTD), *self.output())

    def outward(self, x_BTD):
        """Hidden states as the output table reads them."""
        cfg = self.cfg
        x_BTD = x_BTD if self.transform is None else self.transform(x_BTD)
        scale = (root(cfg) ** -1 if cfg.table_scale == "out" else 1.0) / width_ratio(cfg)
        return x_BTD * scale if scale != 1 else x_BTD

    def output(self):
        """The output table, [V, D] if tied and else [D, V], and the bias_V of a masked head, or None."""
        table = (self.embed.table if self.unembed is None else self.unembed.w)[...]
        return table, None if self.transform is None else self.transform.bias[...]

    def unembedded(self, x_BTD, table, bias_V=None):
        """logits_BTV of what `outward` gives, over the ids whose part of the `output` is given."""
        logits_BTV = matmul(f"BTD,{self.output_letters}->BTV", jnp.float32, x_BTD, table)
        logits_BTV = logits_BTV if bias_V is None else logits_BTV + bias_V
        cap = self.cfg.logit_softcap
        return cap * jnp.tanh(logits_BTV / cap) if cap else logits_BTV

    @property
    def output_letters(self) -> str:
        return "VD" if self.unembed is None else "DV"

    def encode(self, source: Batch, *, keys=(None, None)):
        """The encoder's output, its layout spread over S, and the router's losses."""
        layout = Layout.of(source)
        x_BTD, _, router = self.encoder(self.embedded(source, key=keys[0]), layout, key=keys[1])
        return x_BTD, jax.tree.map(lambda a_BT: parallel.constrain(a_BT, "BS"), layout), router

    def embedded(self, batch: Batch, *, key=None):
        """Token embeddings plus what else the model adds at the bottom, in the type it computes in."""
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        x_BTD = self.embed(batch["tokens"], dtype)
        if cfg.table_scale == "in":
            x_BTD *= jnp.asarray(root(cfg), dtype)
        if self.places is not None:
            x_BTD += self.places(batch["positions"], dtype)
        if cfg.positions == "sinusoidal":
            x_BTD += positions.sinusoids(batch["positions"], cfg.width).astype(dtype)
        if self.types is not None:
            x_BTD += self.types(batch["types"], dtype)
        x_BTD = x_BTD if self.embed_norm is None else self.embed_norm(x_BTD)
        return dropout(x_BTD, cfg.dropout, key)

    def cache(self, batch: Batch, length: int) -> Cache:
        """An empty cache of `length` slots for the rows of `batch`, the encoder's part already computed."""
        cfg, B = self.cfg, batch["tokens"].shape[0]
        empty = lambda: parallel.constrain(
            jnp.zeros((cfg.depth, B, length, cfg.sizes["K"], cfg.sizes["H"]), cfg.dtype), "LBSKH")
        slots = Layout(*(parallel.constrain(jnp.zeros((B, length), jnp.int32), "BS") for _ in range(3)))
        memory_L = source = None
        if self.encoder is not None:
            memory, source, _ = self.encode(batch["source"])
            memory_L = jax.lax.map(lambda block: tuple(map(whole, block.cross.project(memory))), self.decoder.blocks)
        return Cache((empty(), empty()), slots, jnp.zeros((), jnp.int32), memory_L, source)


def make(cfg: TransformerConfig, *, seed: int) -> Transformer:
    """A new model under jit, each weight made on the devices that keep it; numbers do not depend on the mesh."""
    return _made(cfg, jax.random.key(seed))


def root(cfg: TransformerConfig) -> float:
    """sqrt(D), by which tables are scaled; the base model's in muP, where no activation grows with the width."""
    return (cfg.base_width or cfg.width) ** 0.5


@partial(jax.jit, static_argnums=0)  # so that many seeds are one program
def _made(cfg, key):
    return Transformer(cfg, rngs=nnx.Rngs(params=key))


def _written(cache: Cache, layout: Layout) -> Layout:
    """The slots' layout with a row's written at the next free slot."""
    layout = jax.tree.map(lambda a_BT: parallel.constrain(a_BT, "BS"), replace(layout, order_BT=layout.ordered_BT))
    write = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, cache.at, axis=1)
    return jax.tree.map(write, cache.slots, layout)
