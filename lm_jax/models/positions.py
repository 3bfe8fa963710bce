"""How a model knows where a token stands: rotary angles and their scalings, sinusoids, relative buckets, ALiBi."""

import math
from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from lm_jax.config import TransformerConfig


def rotary(cfg: TransformerConfig, positions_BT):
    """Rotary angles (cos, sin), each [B, T, J/2] in float32 for the J = fraction * H rotated sizes (Su et al. 2021).

    Scalings reach past the length trained on by `factor`: linear (Chen et al. 2023), ntk and dynamic (stretch theta,
    the second by the length at hand), yarn (Peng et al. 2023, with its factor on cos and sin), llama3 (Llama 3.1's
    band blend).
    """
    size, rope = cfg.sizes["J"], cfg.rope
    exponent = np.arange(0, size, 2) / size
    freqs, gain = SCALINGS[rope.scaling](exponent, cfg, positions_BT)
    angles = positions_BT[..., None].astype(jnp.float32) * jnp.asarray(freqs, jnp.float32)
    return jnp.cos(angles) * gain, jnp.sin(angles) * gain


def local(cfg: TransformerConfig) -> TransformerConfig:
    """The same model with the rotary positions that its sliding layers have."""
    return replace(cfg, rope=replace(cfg.rope, theta=cfg.rope.local_theta, scaling="none", factor=1.0, local_theta=0.0))


def rotate(x_BTNH, cos, sin, cfg: TransformerConfig):
    """Turns each pair of the rotated sizes of `x` by its angle; pairs are halves, or neighbours if interleaved."""
    size, dtype = cfg.sizes["J"], x_BTNH.dtype
    turned, rest = x_BTNH[..., :size].astype(jnp.float32), x_BTNH[..., size:]
    cos, sin = cos[:, :, None], sin[:, :, None]
    if cfg.rope.interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(turned.shape)
    else:
        a, b = turned[..., : size // 2], turned[..., size // 2:]
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
    return jnp.concatenate([turned.astype(dtype), rest], -1)


def _linear(exponent, cfg, positions_BT):
    return cfg.rope.theta ** -exponent / cfg.rope.factor, 1.0


def _ntk(exponent, cfg, positions_BT):
    size = 2 * len(exponent)
    return (cfg.rope.theta * cfg.rope.factor ** (size / (size - 2))) ** -exponent, 1.0


def mscale(factor: float, weight: float = 1.0) -> float:
    """YaRN's temperature for a context `factor` times as long (Peng et al. 2023, eq. 22)."""
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0


def trained_length(cfg: TransformerConfig) -> int:
    """The length from which rope scaling starts."""
    return cfg.rope.original or cfg.max_length


def reach(cfg: TransformerConfig) -> int:
    """The length that rotary positions are made for: the one trained on, or what their scaling stretches it to."""
    stretches = cfg.rope.scaling not in ("none", "dynamic")  # the second as far as it must, and no factor says how far
    return max(cfg.max_length, int(cfg.rope.original * cfg.rope.factor) if stretches else 0)


def _dynamic(exponent, cfg, positions_BT):
    """NTK with the factor that each row's length needs; none up to the length trained on."""
    size, factor = 2 * len(exponent), cfg.rope.factor
    ratio = jnp.maximum((positions_BT.max(1)[:, None, None] + 1) / trained_length(cfg), 1.0)
    theta = cfg.rope.theta * (factor * ratio - (factor - 1)) ** (size / (size - 2))
    return theta ** -jnp.asarray(exponent, jnp.float32), 1.0


def _yarn(exponent, cfg, positions_BT):
    """Waves of over `fast` turns in the length trained on stay, of under `slow` are interpolated, a ramp between."""
    rope, size = cfg.rope, 2 * len(exponent)
    theta, factor, ends = rope.theta, rope.factor, (rope.fast or 32, rope.slow)
    index = [size * math.log(trained_length(cfg) / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in ends]
    low, high = max(math.floor(index[0]), 0), min(math.ceil(index[1]), size - 1)
    keep = 1 - np.clip((np.arange(size // 2) - low) / max(high - low, 1e-3), 0, 1)
    freqs = theta ** -exponent
    both = rope.mscale and rope.mscale_all
    gain = mscale(factor, rope.mscale) / mscale(factor, rope.mscale_all) if both else mscale(factor)
    return freqs * keep + freqs / factor * (1 - keep), gain


def _llama3(exponent, cfg, positions_BT):
    """Waves of under `slow` turns in the length trained on are stretched, of over `fast` kept, between them a blend."""
    rope = cfg.rope
    low, high = rope.slow, rope.fast or 4
    freqs = rope.theta ** -exponent
    turns = trained_length(cfg) * freqs / (2 * math.pi)
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return freqs * keep + freqs / rope.factor * (1 - keep), 1.0


SCALINGS = {
    "none": lambda exponent, cfg, positions_BT: (cfg.rope.theta ** -exponent, 1.0),
    "linear": _linear,
    "ntk": _ntk,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
}


def sinusoids(positions_BT, width: int):
    """Fixed embeddings [B, T, D], sines then cosines of geometric wavelengths up to 10000 (Vaswani et al. 2017)."""
    freqs = jnp.asarray(10_000.0 ** -(np.arange(width // 2) / max(width // 2 - 1, 1)), jnp.float32)
    angles = positions_BT[..., None].astype(jnp.float32) * freqs
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


def buckets(distance_BTS, *, causal: bool, count: int, farthest: int = 128):
    """T5's bucket of key minus query position: exact when near, logarithmic up to `farthest` (Raffel et al. 2020).

    Both ways the first half is for keys behind, the second for keys ahead; causal uses all for keys behind.
    """
    offset = 0
    if causal:
        away = jnp.maximum(-distance_BTS, 0)
    else:
        count //= 2
        offset, away = jnp.where(distance_BTS > 0, count, 0), jnp.abs(distance_BTS)
    exact = count // 2
    far = jnp.log(jnp.maximum(away, 1).astype(jnp.float32) / exact) / math.log(farthest / exact) * (count - exact)
    return offset + jnp.where(away < exact, away, jnp.minimum(exact + far.astype(jnp.int32), count - 1))


def alibi(distance_BTS, heads: int):
    """ALiBi's bias [B, N, T, S]: the distance times a slope per head, a geometric series (Press et al. 2022)."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)]
    return -jnp.abs(distance_BTS)[:, None].astype(jnp.float32) * jnp.asarray(slopes)[:, None, None]
