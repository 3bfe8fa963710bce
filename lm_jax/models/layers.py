"""The layers every model is made of: one matmul, a table, norms, activations, dropout."""

import math
import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from lm_jax import parallel
from lm_jax.config import TransformerConfig


@dataclass(frozen=True)
class Kind:
    """What a parameter is, for whoever treats parameters by kind (optimizer groups, sharding, counts).

    `letters` name its dimensions ("LDF": stacked over layers), `fan_in` those it sums over ("D"). `width_ratio` is
    its fan-in over the base model's and `depth_ratio` the layers over the base model's: 1 outside muP.
    """

    letters: str
    fan_in: str
    role: str  # matrix | embedding | head | vector
    width_ratio: float = 1.0
    depth_ratio: float = 1.0


class Einsum(nnx.Module):
    """The only matmul in the house; its equation says everything about its weight.

    `Einsum("BTD,DF->BTF", cfg, rngs=rngs)` maps x_BTD to [B, T, F]. Letters that the output drops are the fan-in, and
    the weight starts as a normal of std `gain / sqrt(fan-in)`, or of `gain * cfg.init_std` where that is set.
    `bias` adds one over the output's weight letters.
    """

    def __init__(self, equation: str, cfg: TransformerConfig, *, rngs: nnx.Rngs, gain: float = 1.0, bias: bool = False,
                 role: str = "matrix"):
        self.equation = equation
        _, letters, self.out = re.split(",|->", equation)
        fan_in = "".join(a for a in letters if a not in self.out)
        std = cfg.init_std * width_ratio(cfg) ** -0.5 or math.prod(cfg.sizes[a] for a in fan_in) ** -0.5
        self.w = normal(letters, cfg, rngs=rngs, std=gain * std, fan_in=fan_in, role=role)
        over = "".join(a for a in letters if a in self.out)
        self.b = constant(over, cfg, 0.0) if bias else None

    def __call__(self, x):
        letters = self.equation.split(",")[1].split("->")[0]
        w = parallel.gather(self.w[...].astype(x.dtype), letters)
        size = dict(zip(self.equation, x.shape)) | dict(zip(letters, w.shape))
        sharding = parallel.activation(self.out, tuple(size[a] for a in self.out))
        y = jnp.einsum(self.equation, x, w, out_sharding=sharding)
        return y if self.b is None else y + self.b[...].astype(x.dtype)


class Embed(nnx.Module):
    """A table of rows [V, D] looked up by id, and read backwards as the output layer where it is tied."""

    def __init__(self, letters: str, cfg: TransformerConfig, *, rngs: nnx.Rngs):
        self.letters = letters
        self.table = normal(letters, cfg, rngs=rngs, std=cfg.init_std or 0.02, fan_in="", role="embedding")

    def __call__(self, ids_BT, dtype):
        table = parallel.gather(self.table[...].astype(dtype), self.letters)
        sharding = parallel.activation("BTD", (*ids_BT.shape, table.shape[1]))
        return table.at[ids_BT].get(out_sharding=sharding)

    def attend(self, x_BTD):
        table_VD = parallel.gather(self.table[...].astype(x_BTD.dtype), self.letters)
        sharding = parallel.activation("BTV", (*x_BTD.shape[:2], table_VD.shape[0]))
        return jnp.einsum("BTD,VD->BTV", x_BTD, table_VD, out_sharding=sharding)


class Norm(nnx.Module):
    """RMS or layer norm over the last axis in float32, with `cfg.norm` "none" keeping no parameters at all."""

    def __init__(self, letters: str, cfg: TransformerConfig):
        self.kind, self.eps = cfg.norm, cfg.norm_eps
        self.scale = constant(letters, cfg, 1.0) if cfg.norm != "none" else None
        self.bias = constant(letters, cfg, 0.0) if cfg.norm != "none" and cfg.bias in ("norm", "all") else None

    def __call__(self, x):
        y = x.astype(jnp.float32)
        if self.kind == "layer":
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        y = y if self.scale is None else y * self.scale[...]
        y = y if self.bias is None else y + self.bias[...]
        return y.astype(x.dtype)


class MLP(nnx.Module):
    """down(act(up x)), or down(act(gate x) * up x) if gated (Shazeer 2020)."""

    def __init__(self, cfg: TransformerConfig, *, rngs: nnx.Rngs):
        bias = cfg.bias == "all"
        self.act = cfg.activation
        self.up = Einsum("BTD,DF->BTF", cfg, rngs=rngs, bias=bias)
        self.gate = Einsum("BTD,DF->BTF", cfg, rngs=rngs, bias=bias) if cfg.gated else None
        self.down = Einsum("BTF,FD->BTD", cfg, rngs=rngs, bias=bias, gain=residual_gain(cfg))

    def __call__(self, x_BTD):
        act = ACTIVATIONS[self.act]
        h_BTF = act(self.up(x_BTD)) if self.gate is None else act(self.gate(x_BTD)) * self.up(x_BTD)
        return self.down(h_BTF)


ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "silu": jax.nn.silu,
}


def dropout(x, rate: float, key):
    """Zeroes a share `rate` of `x` and scales up the rest; without a key `x` as it is."""
    if key is None or rate == 0:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, x.shape, out_sharding=parallel.like(x))
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


def normal(letters: str, cfg: TransformerConfig, *, rngs: nnx.Rngs, std: float, fan_in: str, role: str) -> nnx.Param:
    """A float32 parameter of normals; the numbers depend on the key and the shape, not on the mesh."""
    shape = tuple(cfg.sizes[a] for a in letters)
    value = std * jax.random.normal(rngs.params(), shape, out_sharding=parallel.weight(letters, shape))
    return nnx.Param(value, kind=Kind(letters, fan_in, role, width_ratio(cfg), depth_ratio(cfg)))


def constant(letters: str, cfg: TransformerConfig, value: float) -> nnx.Param:
    """A float32 vector parameter (norm scale, bias) filled with `value`, replicated."""
    array = jnp.full(tuple(cfg.sizes[a] for a in letters), value, jnp.float32)
    return nnx.Param(array, kind=Kind(letters, "", "vector", width_ratio(cfg), depth_ratio(cfg)))


def width_ratio(cfg: TransformerConfig) -> float:
    """muP's width multiplier: D over the base model's; 1 in the standard parametrisation."""
    return cfg.width / cfg.base_width if cfg.base_width else 1.0


def depth_ratio(cfg: TransformerConfig) -> float:
    """CompleteP's depth multiplier: L over the base model's; 1 in the standard parametrisation."""
    return cfg.depth / cfg.base_depth if cfg.base_width and cfg.base_depth else 1.0


def residual_gain(cfg: TransformerConfig) -> float:
    """Initial scale of what is added to the residual stream: 1/sqrt(2L) keeps its size (GPT-2); L is the base's in muP."""
    return (2 * cfg.depth / depth_ratio(cfg)) ** -0.5


def kinds(model: nnx.Module) -> dict:
    """The nested dict of a model's parameters with a `Kind` in the place of each array."""
    tree = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return _kinds(tree, {path: v.kind for path, v in nnx.state(model, nnx.Param).flat_state()}, ())


def _kinds(tree, by_path, path):
    if not isinstance(tree, dict):
        return by_path[path]
    return {name: _kinds(child, by_path, (*path, name)) for name, child in tree.items()}
