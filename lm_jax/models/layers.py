"""The layers every model is made of: one matmul, a table, norms, activations, dropout."""

import math
import re
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from lm_jax import parallel
from lm_jax.config import TransformerConfig

PRODUCT = "product"  # name of every Einsum's output, by which remat may choose to keep it


@dataclass(frozen=True)
class Kind:
    """What a parameter is, for whoever treats parameters by kind (optimizer groups, sharding, counts).

    `letters` name its dimensions ("LDF": stacked over layers), `fan_in` those it sums over ("D"). `width_ratio` is
    its fan-in over the base model's and `depth_ratio`, of a layer's weights, the layers over the base's: 1 outside muP.
    """

    letters: str
    fan_in: str
    role: str  # matrix | embedding | head | vector
    width_ratio: float = 1.0
    depth_ratio: float = 1.0


class Einsum(nnx.Module):
    """The only matmul in the house; its equation says everything about its weight.

    `Einsum("BTD,DF->BTF", cfg, rngs=rngs)` maps x_BTD to [B, T, F]. Letters that the output drops are the fan-in, and
    the weight starts as a normal of std `gain * initial_std`.
    `bias` adds one over the output's weight letters.
    """

    def __init__(self, equation: str, cfg: TransformerConfig, *, rngs: nnx.Rngs, gain: float = 1.0, bias: bool = False,
                 role: str = "matrix"):
        self.equation = equation
        _, letters, self.out = re.split(",|->", equation)
        fan_in = "".join(a for a in letters if a not in self.out)
        std = gain * initial_std(fan_in, cfg, role=role)
        self.w = normal(letters, cfg, rngs=rngs, std=std, fan_in=fan_in, role=role)
        over = "".join(a for a in letters if a in self.out)
        self.b = constant(over, cfg, 0.0) if bias else None

    def __call__(self, x, dtype=None):
        """`x` through the equation, in `dtype` (default: that of `x`)."""
        y = checkpoint_name(matmul(self.equation, dtype or x.dtype, x, self.w[...]), PRODUCT)
        return y if self.b is None else (y + self.b[...]).astype(y.dtype)  # in float32, its gradient's sum too


class Embed(nnx.Module):
    """A table of rows [V, D] looked up by id; where it is tied it is the output table too."""

    def __init__(self, letters: str, cfg: TransformerConfig, *, rngs: nnx.Rngs):
        self.letters = letters
        std = 1.0 if cfg.table_scale == "out" else 0.02  # T5 divides by sqrt(D) on the way out
        self.table = normal(letters, cfg, rngs=rngs, std=cfg.init_std or std, fan_in="", role="embedding")

    def __call__(self, ids_BT, dtype):
        table = parallel.gather(self.table[...].astype(dtype), self.letters)
        sharding = parallel.activation("BTD", (*ids_BT.shape, table.shape[1]))
        return table.at[ids_BT].get(out_sharding=sharding)


class Norm(nnx.Module):
    """RMS or layer norm over the last axis in float32, with `cfg.norm` "none" keeping no parameters at all."""

    def __init__(self, letters: str, cfg: TransformerConfig):
        self.kind, self.eps, self.plus_one = cfg.norm, cfg.norm_eps, cfg.norm_plus_one
        self.scale = constant(letters, cfg, 0.0 if self.plus_one else 1.0) if cfg.norm != "none" else None
        self.bias = constant(letters, cfg, 0.0) if cfg.norm != "none" and cfg.bias in ("norm", "all") else None

    def __call__(self, x):
        y = x.astype(jnp.float32)
        if self.kind == "layer":
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        if self.scale is not None:
            scale = self.scale[...].astype(jnp.float32)
            y = y * (1 + scale if self.plus_one else scale)
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
        before = [self.up(x_BTD)] if self.gate is None else [self.gate(x_BTD), self.up(x_BTD)]
        return self.down(activated(ACTIVATIONS[self.act], *before))


def activated(act, *xs):
    """act(x), or, of two, act(x) * up. A CPU's XLA would write out each of its steps, rounded: there it is made in
    float32, and made again, from what went in, in the backward pass."""
    plain = lambda x, *up: act(x) if not up else act(x) * up[0]
    wide = lambda *xs: plain(*(x.astype(jnp.float32) for x in xs)).astype(xs[0].dtype)
    return (jax.checkpoint(wide) if parallel.on_cpu() else plain)(*xs)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def matmul(equation: str, dtype, x, w):
    """einsum of an activation and a float32 weight, computed in the activation's type, returned as `dtype`.

    The weight is cast and gathered for the product only, and its gradient leaves the accumulator in float32, already
    scattered as the weight is: what bfloat16 would round away is kept.
    """
    _, letters, out = re.split(",|->", equation)
    return _einsum(equation, x, parallel.gather(w.astype(x.dtype), letters), parallel.activation, out, dtype)


def _matmul_forward(equation, dtype, x, w):
    return matmul(equation, dtype, x, w), (x, w)


def _matmul_backward(equation, dtype, saved, dy):
    x, w = saved
    into, letters, out = re.split(",|->", equation)
    dy = dy.astype(x.dtype)
    whole = parallel.gather(w.astype(x.dtype), letters)
    dx = _einsum(f"{out},{letters}->{into}", dy, whole, parallel.activation, into, x.dtype)
    return dx, _weight_gradient(into, out, letters, x, dy, w.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)


def _weight_gradient(into, out, letters, x, dy, dtype):
    """The sum over tokens. XLA's CPU backend copies the operand that gives the first letters, transposed, which is slow
    where it is wide: on one CPU the narrow operand comes first, and the small result is turned."""
    size = dict(zip(into, x.shape)) | dict(zip(out, dy.shape))
    alone = parallel.on_cpu() and parallel.weight(letters, tuple(size[a] for a in letters)) is None
    first = "".join(a for a in letters if (a in into) == (letters[0] in into))
    turned = letters[len(first):] + first
    if not alone or math.prod(size[a] for a in first) ** 2 <= math.prod(size[a] for a in letters):
        return _einsum(f"{into},{out}->{letters}", x, dy, parallel.weight, letters, dtype)
    dw = jax.lax.optimization_barrier(_einsum(f"{into},{out}->{turned}", x, dy, parallel.weight, turned, dtype))
    return dw.transpose([turned.index(a) for a in letters])


def _einsum(equation, x, y, table, out, dtype):
    """einsum laid out by a letter table; a CPU's fast bfloat16 products are those that accumulate in float32."""
    left, right, _ = re.split(",|->", equation)
    size = dict(zip(left, x.shape)) | dict(zip(right, y.shape))
    sharding = table(out, tuple(size[a] for a in out))
    accumulate = jnp.float32 if parallel.on_cpu() else dtype
    return jnp.einsum(equation, x, y, preferred_element_type=accumulate, out_sharding=sharding).astype(dtype)


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
    return nnx.Param(value, kind=Kind(letters, fan_in, role, width_ratio(cfg)))


def constant(letters: str, cfg: TransformerConfig, value: float) -> nnx.Param:
    """A float32 vector parameter (norm scale, bias) filled with `value`, replicated."""
    array = jnp.full(tuple(cfg.sizes[a] for a in letters), value, jnp.float32)
    return nnx.Param(array, kind=Kind(letters, "", "vector", width_ratio(cfg)))


def initial_std(fan_in: str, cfg: TransformerConfig, *, role: str = "matrix") -> float:
    """1/sqrt(fan-in), or `cfg.init_std` where set. In muP the first falls with the width by itself and the second is
    made to; the head's stays the base model's, since its output is divided by the width (CompleteP, table 1)."""
    grown = width_ratio(cfg) ** 0.5
    std = cfg.init_std / grown or math.prod(cfg.sizes[a] for a in fan_in) ** -0.5
    return std * grown if role == "head" else std


def width_ratio(cfg: TransformerConfig) -> float:
    """muP's width multiplier: D over the base model's; 1 in the standard parametrisation."""
    return cfg.width / cfg.base_width if cfg.base_width else 1.0


def depth_ratio(cfg: TransformerConfig) -> float:
    """CompleteP's depth multiplier: L over the base model's; 1 in the standard parametrisation."""
    return cfg.depth / cfg.base_depth if cfg.base_width and cfg.base_depth else 1.0


def residual_gain(cfg: TransformerConfig) -> float:
    """Initial scale of what joins the residual stream: 1/sqrt(2L) keeps its size (GPT-2); L is the base's in muP.

    A norm after each sum keeps it anyway, and BERT's matrices all start alike.
    """
    if cfg.norm_place == "post":
        return 1.0
    return (2 * cfg.depth / depth_ratio(cfg)) ** -0.5


def kinds(model: nnx.Module, trainable=nnx.Param) -> dict:
    """The nested dict of a model's (trainable) parameters with a `Kind` in the place of each array."""
    tree = nnx.to_pure_dict(nnx.state(model, trainable))
    return _kinds(tree, {path: v.kind for path, v in nnx.to_flat_state(nnx.state(model, trainable))}, ())


def _kinds(tree, by_path, path):
    if not isinstance(tree, dict):
        return by_path[path]
    return {name: _kinds(child, by_path, (*path, name)) for name, child in tree.items()}
