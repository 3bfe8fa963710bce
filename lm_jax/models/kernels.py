"""Attention kernels: one signature, a table of what each can do, and the choice among them.

    kernel(q_BTNH, k_BSKH, v_BSKH, query, key, *, causal, scale, window, sliding, softcap, sinks_N, bias_BNTS, drop)

Layouts stand in place of a mask: each kernel shows what `layouts.visible` shows, by whatever means it has, and tests
hold it to that. A layer sees `window` positions (0: all) where `sliding`, True or a traced bool, says so. A kernel has
no argument for what it cannot do, and `choose` never picks it where that is asked for.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lm_jax import parallel
from lm_jax.config import ConfigError, TransformerConfig
from lm_jax.models.layouts import Layout, visible
from lm_jax.models.ring import ring
from lm_jax.models.splash import LANES, splash

MASKED = -1e30  # finite, so that a row which sees nothing gives numbers that nobody reads rather than NaN


def xla(q_BTNH, k_BSKH, v_BSKH, query: Layout, key: Layout, *, causal, scale, window=0, sliding=True, softcap=0.0,
        sinks_N=None, bias_BNTS=None, drop=None):
    """Softmax attention in plain XLA, logits in float32 and written out; it can do everything, anywhere."""
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
    return _reshape(y_BTKGH, (B, T, N, H), "BTNH")


def attend(name: str, q_BTNH, k_BSKH, v_BSKH, query: Layout, key: Layout, **asked):
    """y_BTNH by the kernel of this name; of what is `asked`, None is not."""
    k_BSKH, v_BSKH = k_BSKH.astype(q_BTNH.dtype), v_BSKH.astype(q_BTNH.dtype)
    asked = {knob: value for knob, value in asked.items() if value is not None}
    return KERNELS[name].attend(q_BTNH, k_BSKH, v_BSKH, query, key, **asked)


def choose(cfg: TransformerConfig, length: int | None = None, *, use: str = "row", prefix: bool = False) -> str:
    """Name of the kernel for attention of a row to itself ("row"), to a "cache" of the past, or "cross".

    Platform and mesh are those in use; no `length` of rows is one that any kernel takes. "auto" is the first of the
    platform's kernels that lacks nothing. A kernel that the config names and that lacks something is a ConfigError,
    but for caches and cross-attention, which go to `xla` where the table says that it cannot do them.
    """
    lacks = {name: list(_lacks(kernel, cfg, length, use, prefix)) for name, kernel in KERNELS.items()}
    able = [name for name in KERNELS if not lacks[name]]
    if cfg.attention == "auto":
        return next(name for name in AUTO.get(parallel.platform(), ()) + ("xla",) if name in able)
    if cfg.attention not in able and use == "row":
        raise ConfigError(f"model.attention={cfg.attention!r} cannot do {' nor '.join(lacks[cfg.attention])}: "
                          f"{', '.join(able)} can, or leave it at 'auto'")
    return cfg.attention if cfg.attention in able else "xla"


def chosen(cfg: TransformerConfig, length: int, source: int = 0, *, prefix: bool = False) -> str:
    """What `choose` chooses for a whole model, for people: "splash; cache: xla". `source` tokens enter the encoder."""
    main = choose(cfg, length, prefix=prefix)
    others = {"encoder": choose(cfg, source)} if cfg.encoder_depth else {}
    others |= {"cross": choose(cfg, use="cross")} if cfg.encoder_depth else {}
    others |= {"cache": choose(cfg, use="cache")} if cfg.causal else {}
    return "; ".join([main] + [f"{use}: {name}" for use, name in others.items() if name != main])


def _lacks(kernel: "Kernel", cfg, length, use, prefix):
    """What is asked for that a kernel cannot do, each with the setting that asks for it."""
    platform, shards = parallel.platform(), parallel.axis_size("T")
    if platform not in kernel.platforms:
        yield f"platform {platform}"
    asked = dict(window=cfg.window, softcap=cfg.attention_softcap, sinks=cfg.sinks, dropout=cfg.dropout)
    names = {"softcap": "attention_softcap"}
    yield from (f"model.{names.get(word, word)}={value}" for word, value in asked.items()
                if value and word not in kernel.can)
    if cfg.positions in ("relative", "alibi") and "bias" not in kernel.can:
        yield f"model.positions={cfg.positions!r}"
    if prefix and "prefix" not in kernel.can:
        yield "data.objective='prefix'"
    if use != "row" and use not in kernel.can:
        yield {"cache": "attention to a cache", "cross": "cross-attention"}[use]
    if shards > 1 and "sequence" not in kernel.can:
        yield f"mesh.sequence={shards}"
    yield from kernel.limits(cfg, length, shards)


def _splash_limits(cfg, length, shards):
    if length is not None and length % LANES:
        yield f"rows of {length} tokens, no multiple of {LANES}"


def _ring_limits(cfg, length, shards):
    if shards == 1:
        yield "mesh.sequence=1"
    if length is not None and length % (2 * shards):
        yield f"rows of {length} tokens, no multiple of {2 * shards}"


@dataclass(frozen=True)
class Kernel:
    """A kernel, the platforms it runs on, what it can do beyond plain attention of a row to itself (causal or not,
    grouped heads, packed segments), and `limits(cfg, length, shards of the sequence)`, what of sizes it cannot do."""

    attend: Callable
    platforms: tuple[str, ...]
    can: frozenset[str]
    limits: Callable = lambda cfg, length, shards: ()


EVERYTHING = ("window", "softcap", "sinks", "bias", "dropout", "prefix", "cache", "cross", "sequence")
KERNELS = {
    "xla": Kernel(xla, ("cpu", "gpu", "tpu"), frozenset(EVERYTHING)),
    "splash": Kernel(splash, ("tpu",), frozenset(("window", "softcap", "sinks")), _splash_limits),
    "ring": Kernel(ring, ("cpu", "gpu", "tpu"), frozenset(("window", "softcap", "sinks", "prefix", "sequence")),
                   _ring_limits),
}
AUTO = {"tpu": ("splash", "ring"), "gpu": ("ring",)}  # best first; then xla


def _reshape(x, shape, letters):
    return jnp.reshape(x, shape, out_sharding=parallel.activation(letters, shape))
