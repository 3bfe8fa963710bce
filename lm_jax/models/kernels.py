"""Attention kernels: one signature, a table of what each can do, and the choice among them.

    kernel(q_BTNH, k_BSKH, v_BSKH, query, key, *, causal, scale, window, sliding, softcap, sinks_N, bias_BNTS, drop)

Layouts stand in place of a mask: each kernel shows what `layouts.visible` shows, by whatever means it has, and tests
hold it to that. A layer sees `window` positions (0: all) where `sliding`, True or a traced bool, says so. A kernel has
no argument for what it cannot do, and `choose` never picks it where that is asked for.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax

from lm_jax import devices, parallel
from lm_jax.config import ConfigError, TransformerConfig
from lm_jax.models.blocked import blocked
from lm_jax.models.cudnn import GENERATIONS, SEGMENTS, cudnn
from lm_jax.models.layouts import Layout
from lm_jax.models.ring import ring
from lm_jax.models.splash import LANES, splash
from lm_jax.models.xla import xla


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
    """What `choose` chooses for a whole model, for people: "splash; cache: xla". `source` tokens enter the encoder.

    Of cudnn it is said what it leaves to plain XLA, row by row.
    """
    main = choose(cfg, length, prefix=prefix)
    others = {"encoder": choose(cfg, source)} if cfg.encoder_depth else {}
    others |= {"cross": choose(cfg, use="cross")} if cfg.encoder_depth else {}
    others |= {"cache": choose(cfg, use="cache")} if cfg.causal else {}
    said = [main] + [f"{use}: {name}" for use, name in others.items() if name != main]
    crowded = f"rows of more than {SEGMENTS} documents: xla"
    return "; ".join(said + [crowded] * any("cudnn" in one for one in said))


def _lacks(kernel: "Kernel", cfg, length, use, prefix):
    """What is asked for that a kernel cannot do, each with the setting that asks for it."""
    platform, shards = parallel.platform(), parallel.axis_size("T")
    if platform not in kernel.platforms:
        yield f"platform {platform}"
    asked = dict(window=cfg.window, softcap=cfg.attention_softcap, sinks=cfg.sinks, dropout=cfg.dropout,
                 latent=cfg.latent)
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
    least = LANES * (1 if shards == 1 else 2 * shards)
    if length is not None and length % least:
        yield f"rows of {length} tokens, no multiple of {least}"


def _cudnn_limits(cfg, length, shards):
    if cfg.dtype != "bfloat16":
        yield f"model.dtype={cfg.dtype!r}"
    if cfg.sizes["H"] % 8 or cfg.sizes["H"] > 256:
        yield f"heads of {cfg.sizes['H']}, no multiple of 8 up to 256"
    if cfg.window and (not cfg.causal or cfg.encoder_depth):
        yield "model.window where tokens are seen both ways"
    capability = _compute_capability()
    if capability.split(".")[0] not in GENERATIONS:
        yield f"{parallel.device_kind()}, compute capability {capability or 'not known'}"


def _compute_capability() -> str:
    """CUDA's name for what the devices in use can do, by the table if they are not here; "" where none is known."""
    here, kind = jax.devices()[0], parallel.device_kind()
    if here.device_kind == kind:
        return getattr(here, "compute_capability", "")
    device = devices.of_kind(kind)
    return device.compute if device else ""


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


EVERYTHING = ("window", "softcap", "sinks", "bias", "dropout", "latent", "prefix", "cache", "cross", "sequence")
KERNELS = {
    "xla": Kernel(xla, ("cpu", "gpu", "tpu"), frozenset(EVERYTHING)),
    "blocked": Kernel(blocked, ("cpu",), frozenset(("window", "softcap", "sinks", "prefix"))),
    "cudnn": Kernel(cudnn, ("gpu",), frozenset(("window",)), _cudnn_limits),
    "splash": Kernel(splash, ("tpu",), frozenset(("window", "softcap", "sinks", "sequence")),
                     _splash_limits),
    "ring": Kernel(ring, ("cpu", "gpu", "tpu"), frozenset(("window", "softcap", "sinks", "prefix", "sequence")),
                   _ring_limits),
}
AUTO = {"cpu": ("blocked",), "tpu": ("splash", "ring"), "gpu": ("cudnn", "ring")}  # best first; then xla
