"""FLOPs and parameters of a model, read off its equations; and a counter of jaxprs that proves them.

A weight costs two FLOPs (a multiply and an add) for each of its numbers and each token it meets. Which weights there
are, the model itself says, made of shapes only; no architecture has a formula here. What is not a product (norms,
softmax, lookups) is not counted, nor is what remat computes again: these are FLOPs of the model, as MFU wants them.
"""

import math
from dataclasses import dataclass
from functools import cache

import jax
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr

from lm_jax.config import OVER_WORDS, TransformerConfig
from lm_jax.models.layers import Kind
from lm_jax.models.transformer import Transformer


def forward(cfg: TransformerConfig, tokens: int, source: int = 0, *, causal: bool = True) -> int:
    """FLOPs of one row's forward pass up to its loss: `tokens` of the decoder or only stack, `source` of an encoder.

    Attention counts the pairs that the mask shows: T (T + 1) / 2 where it is causal, fewer with a window. With
    `causal=False` it counts all T S of them, as a kernel that masks and skips nothing computes (PaLM's MFU does so).
    """
    if (source > 0) != (cfg.encoder_depth > 0):
        raise ValueError(f"source={source} tokens for encoder_depth={cfg.encoder_depth}: an encoder reads some, "
                         "a model without one reads none")
    dense = sum(active(weight, cfg) * tokens_met(weight, cfg, tokens, source) for weight in weights(cfg))
    return 2 * dense + scores(cfg, tokens, source, causal=causal)


def scores(cfg: TransformerConfig, tokens: int, source: int = 0, *, causal: bool = True) -> int:
    """The part of `forward` that is attention's own: q k and p v."""
    value = cfg.sizes["O"] if cfg.latent else cfg.sizes["H"]
    return 2 * cfg.sizes["N"] * (cfg.sizes["H"] + value) * _pairs(cfg, tokens, source, causal=causal)


def train(cfg: TransformerConfig, tokens: int, source: int = 0, *, causal: bool = True) -> int:
    """FLOPs of one row's forward and backward pass: each product y = x w has two more, dy w and x dy."""
    return 3 * forward(cfg, tokens, source, causal=causal)


def parameters(cfg: TransformerConfig) -> dict[str, int]:
    """How many parameters, under each convention.

    total = embedding + head + non_embedding. "embedding" are the tables of tokens, positions, types and relative
    buckets; "head" is an output table of its own (0 if tied) and a bias over the vocabulary; "non_embedding" is the
    rest, N of Kaplan et al. 2020; "total" is N of Hoffmann et al. 2022. "active" is the total less the experts that a
    token does not visit.
    """
    sides = ("embedding", "head", "non_embedding")
    sizes = {side: sum(w.size for w in weights(cfg) if _side(w) == side) for side in sides}
    return {"total": sum(sizes.values())} | sizes | {"active": sum(active(w, cfg) for w in weights(cfg))}


def count(f, *args, trips: int | None = None) -> int:
    """FLOPs of the products in a function of `args` (arrays or shapes), or in a jaxpr, as it is written.

    A scan counts its body as often as it runs, which XLA's cost analysis does not; a branch counts as its dearest case;
    a shard_map counts on every device. A while loop that multiplies runs `trips` times, and is an error when those are
    unknown; so is a primitive that hides products in a way not known here.
    """
    jaxpr = f if isinstance(f, (Jaxpr, ClosedJaxpr)) else jax.make_jaxpr(f)(*args)
    return sum(_equation(eqn, trips) for eqn in jaxpr.eqns)


@dataclass(frozen=True)
class Weight:
    """One parameter by its place in the model, its shape and what it is."""

    path: tuple
    shape: tuple[int, ...]
    kind: Kind

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@cache
def weights(cfg: TransformerConfig) -> tuple[Weight, ...]:
    """Every parameter of the model, which is never made."""
    model = jax.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0)))
    return tuple(Weight(path, w.shape, w.kind) for path, w in nnx.to_flat_state(nnx.state(model, nnx.Param)))


def tokens_met(weight: Weight, cfg: TransformerConfig, tokens: int, source: int) -> int:
    """How many tokens of a row meet a weight."""
    path = weight.path
    if path[0] == "embed":  # read backwards as the output table, or only looked up
        return tokens if cfg.tied and cfg.head in OVER_WORDS else 0
    if not weight.kind.fan_in:
        return 0
    if path[0] in ("pooler", "pool") or (path[0] == "classifier" and cfg.head == "classes"):
        return 1
    memory = "cross" in path and ("key" in path or "value" in path)
    return source if path[0] == "encoder" or memory else tokens


def active(weight: Weight, cfg: TransformerConfig) -> int:
    """Numbers of a weight that one token meets: all, or those of its own experts."""
    experts = weight.kind.letters.removeprefix("L").startswith("E")
    return weight.size * cfg.moe.top_k // cfg.moe.experts if experts else weight.size


def _side(weight: Weight) -> str:
    if weight.kind.role == "head" or weight.kind.letters == "V":
        return "head"
    return "embedding" if weight.kind.role == "embedding" else "non_embedding"


def _pairs(cfg: TransformerConfig, tokens: int, source: int, *, causal: bool) -> int:
    """Query-key pairs of one row, over all layers."""
    pattern, cross = cfg.window_pattern, cfg.depth * tokens * source
    if not causal:
        return cfg.encoder_depth * source**2 + cfg.depth * tokens**2 + cross

    def own(length, layer, *, ahead):
        window = cfg.window if pattern[layer % len(pattern)] == "S" else 0
        reach = min(window or length, length)  # tokens seen behind, itself included
        behind = reach * (reach + 1) // 2 + (length - reach) * reach
        return 2 * behind - length if ahead else behind

    encoder = sum(own(source, layer, ahead=True) for layer in range(cfg.encoder_depth))
    return encoder + sum(own(tokens, layer, ahead=not cfg.causal) for layer in range(cfg.depth)) + cross


def _equation(eqn, trips: int | None) -> int:
    """FLOPs of one equation of a jaxpr."""
    name, params = eqn.primitive.name, eqn.params
    if name in PRODUCTS:
        return PRODUCTS[name](params, *(v.aval.shape for v in eqn.invars[:2]), eqn.outvars[0].aval.shape)
    inner = [sum(_equation(e, trips) for e in jaxpr.eqns) for jaxpr in _jaxprs(params)]
    if not any(inner):
        return 0
    if name == "while" and trips is None:
        raise ValueError("a while loop multiplies and nothing says how often: pass trips=, or write it as a scan")
    if name not in TIMES:
        raise ValueError(f"primitive {name!r} holds products and it is not known how often they run: add it to TIMES")
    return TIMES[name](inner, params, trips)


def _jaxprs(params: dict) -> list:
    values = [v for value in params.values() for v in (value if isinstance(value, tuple) else (value,))]
    return [v for v in values if isinstance(v, (Jaxpr, ClosedJaxpr))]


def _dot(params, x, y, out) -> int:
    (contracted, _), _ = params["dimension_numbers"]
    return 2 * math.prod(out) * math.prod(x[i] for i in contracted)


def _ragged(params, x, y, out) -> int:
    """Each row of x meets one group of y; and y has no groups where the gradient of a group's weight sums over rows."""
    numbers = params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batch) = numbers.dot_dimension_numbers
    shared = {*contracted, *batch, *numbers.rhs_group_dimensions}
    return 2 * math.prod(x) * math.prod(n for i, n in enumerate(y) if i not in shared)


def _convolution(params, x, y, out) -> int:
    return 2 * math.prod(out) * math.prod(y) // y[params["dimension_numbers"].rhs_spec[0]]


def _devices(params) -> int:
    axes = next(value for key, value in params.items() if key.endswith("manual_axes"))
    return math.prod(params["mesh"].shape[axis] for axis in axes)


PRODUCTS = {
    "dot_general": _dot,
    "ragged_dot_general": _ragged,
    "conv_general_dilated": _convolution,
}

_once = lambda inner, params, trips: sum(inner)
TIMES = {
    **dict.fromkeys(("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "custom_jvp_call",
                     "custom_vjp_call", "custom_vjp_call_jaxpr"), _once),
    "scan": lambda inner, params, trips: params["length"] * sum(inner),
    "while": lambda inner, params, trips: trips * sum(inner),
    "cond": lambda inner, params, trips: max(inner),
    "shard_map": lambda inner, params, trips: _devices(params) * sum(inner),
}
