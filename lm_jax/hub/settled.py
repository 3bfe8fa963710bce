"""One way of saying what a model is, so that two configs can be compared; and a config made of settings by name."""

from dataclasses import replace

from lm_jax.checks import value
from lm_jax.config import OVER_WORDS, MoEConfig, RopeConfig, TransformerConfig
from lm_jax.hub.settings import period
from lm_jax.models.stack import dense_or_experts, repeated

HOW = ("attention", "dropout", "dtype", "remat")  # settings of how a model computes, which say nothing of what it is


def settled(cfg: TransformerConfig) -> TransformerConfig:
    """The same model with its sizes filled in, and at its default whatever does not change its numbers."""
    plain, sizes = TransformerConfig(), cfg.sizes
    letters = repeated(cfg.window_pattern if cfg.window else "S", cfg.depth)
    sliding = cfg.window if "S" in letters else 0
    turned, relative = cfg.positions == "rope", cfg.positions == "relative"
    labelled = cfg.head in ("classes", "tags", "span")
    read = dict(  # what is read in some models only
        rope=_rope(cfg) if turned else RopeConfig(),
        moe=_experts(cfg) if cfg.moe.experts else MoEConfig(),
        max_length=cfg.max_length if cfg.positions == "learned" or cfg.rope.scaling == "dynamic" else plain.max_length,
        buckets=cfg.buckets if relative else plain.buckets,
        farthest=cfg.farthest if relative else plain.farthest,
        window=sliding, window_pattern=period(letters) if sliding else "S",
        labels=sizes["C"] if labelled else 0, tied=cfg.tied or cfg.head not in OVER_WORDS,
        value_size=sizes["O"] if cfg.latent else 0, kv_heads=0 if cfg.latent else sizes["K"],
        base_depth=cfg.base_depth if cfg.base_width else 0)
    used = dict(head_size=sizes["H"], hidden=sizes["F"], attention_scale=cfg.attention_scale or sizes["H"] ** -0.5)
    how = {key: getattr(plain, key) for key in (*HOW, "init_std")}
    return replace(cfg, **read, **used, **how)


def build(settings: dict) -> TransformerConfig:
    """A config of settings by dotted name; whole numbers are taken for floats, as JSON may have them."""
    nested = {"": {}, "rope": {}, "moe": {}}
    for name, setting in settings.items():
        section, _, leaf = name.rpartition(".")
        kind = type(value(TransformerConfig(), name))
        if kind in (int, str) and type(setting) is not kind:
            raise TypeError(f"model.{name}={setting!r}: wanted {kind.__name__}")
        nested[section][leaf] = kind(setting) if kind in (float, bool) else setting
    return TransformerConfig(**nested[""], rope=RopeConfig(**nested["rope"]), moe=MoEConfig(**nested["moe"]))


def _experts(cfg):
    moe, plain = cfg.moe, MoEConfig()
    return replace(moe, hidden=moe.hidden or cfg.sizes["F"], pattern=period(dense_or_experts(cfg, cfg.depth)),
                   balance=plain.balance, router_z=plain.router_z)


def _rope(cfg):
    """Rotary settings, those that the scaling does not read at their defaults."""
    rope, plain = cfg.rope, RopeConfig()
    bands = rope.scaling in ("yarn", "llama3")
    fast = rope.fast or {"yarn": 32.0, "llama3": 4.0}.get(rope.scaling, 0.0)
    return replace(rope, original=rope.original or cfg.max_length if bands else rope.original,
                   slow=rope.slow if bands else plain.slow, fast=fast if bands else plain.fast,
                   factor=rope.factor if rope.scaling != "none" else 1.0)
