"""One Transformer for three families: decoder (GPT, LLaMA), encoder (BERT), encoder-decoder (T5)."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from lm_jax import parallel
from lm_jax.batch import Batch
from lm_jax.config import OVER_WORDS, TransformerConfig
from lm_jax.models import heads, positions
from lm_jax.models.layers import Einsum, Embed, Norm, dropout, matmul, width_ratio
from lm_jax.models.layouts import Layout
from lm_jax.models.stack import Cache, Stack


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
        own_table = cfg.head in OVER_WORDS and not cfg.tied
        self.unembed = Einsum("BTD,DV->BTV", cfg, rngs=rngs, role="head") if own_table else None
        self.transform = heads.MaskedHead(cfg, rngs=rngs) if cfg.head in ("mlm", "mlm_pairs") else None
        self.pooler = heads.Pooler(cfg, rngs=rngs) if cfg.head == "mlm_pairs" else None
        self.pool = heads.Pool(cfg, rngs=rngs) if cfg.pooler != "none" else None
        self.classifier = heads.Classifier(cfg, rngs=rngs) if cfg.head in ("classes", "tags", "span") else None

    def __call__(self, batch: Batch, *, key=None):
        """What the head gives for a batch: logits_BTV; labels' scores [B, T, C], T being 1 where they are of rows;
        without a head, x_BTD. For small models and tests: training goes through `hidden` and a chunked loss."""
        x_BTD = self.hidden(batch, key=key)[0]
        if self.classifier is not None:
            if self.cfg.head == "classes":
                x_BTD = heads.of_rows(x_BTD, batch["segments"], causal=self.cfg.causal)
            return self.classifier(x_BTD if self.pool is None else self.pool(x_BTD))
        return x_BTD if self.cfg.head == "none" else self.logits(x_BTD)

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
        table, bias_V = self.output()
        logits_BTV = matmul(f"BTD,{self.output_letters}->BTV", jnp.float32, self.outward(x_BTD), table)
        return heads.softened(logits_BTV, bias_V, self.cfg.logit_softcap)

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
        B = batch["tokens"].shape[0]
        slots = Layout(*(parallel.constrain(jnp.zeros((B, length), jnp.int32), "BS") for _ in range(3)))
        memory = source = None
        if self.encoder is not None:
            memory, source, _ = self.encode(batch["source"])
            memory = self.decoder.remembered(memory)
        return Cache(self.decoder.empty(B, length), slots, jnp.zeros((), jnp.int32), memory, source)


def make(cfg: TransformerConfig, *, seed: int) -> Transformer:
    """A new model under jit, each weight made on the devices that keep it; numbers do not depend on the mesh."""
    return _made(cfg, jax.random.key(seed))


def apart(model: Transformer) -> Transformer:
    """The model with the weights of each decoder layer in arrays of their own: the same numbers, for decoding on a CPU,
    which reads those where they are and would first copy, for every token, its slice of what is stacked."""
    model = jax.tree.map(lambda w: w, model)
    model.decoder.take_apart()
    return model


def root(cfg: TransformerConfig) -> float:
    """sqrt(D), by which tables are scaled; the base model's in muP, where no activation grows with the width."""
    return (cfg.base_width or cfg.width) ** 0.5


@partial(jax.jit, static_argnums=0)  # so that many seeds are one program
def _made(cfg, key):
    return Transformer(cfg, rngs=nnx.Rngs(params=key))
