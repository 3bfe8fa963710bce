"""Tiny real parts that the models' tests share: settings of each family, packed rows, a loss with its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from lm_jax import losses
from lm_jax.config import MoEConfig, TransformerConfig
from lm_jax.models.transformer import Transformer

# Options of jax.jit under which a program compiles in half the time and runs slower, which a tiny one may.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
SMALL = dict(vocab=64, width=32, depth=2, heads=4, hidden=64, dtype="float32", max_length=32)
FAMILIES = {
    "decoder": dict(),
    "encoder": dict(causal=False, norm="layer", norm_place="post", embed_norm=True, bias="all", activation="gelu",
                    gated=False, positions="learned", types=2, head="mlm_pairs"),
    "encoder_decoder": dict(encoder_depth=2, positions="relative", attention_scale=1.0, table_scale="out",
                            activation="relu", gated=False),
    "experts": dict(moe=MoEConfig(experts=4, top_k=2, shared=1)),
}


def settings(family: str = "decoder", **changes) -> TransformerConfig:
    """A model of a few thousand parameters."""
    return TransformerConfig(**SMALL | FAMILIES[family] | changes)


def model(family: str = "decoder", **changes) -> Transformer:
    """A model of `settings` whose every parameter is drawn, scales and biases too: no promise holds by a zero."""
    shapes = jax.eval_shape(lambda: Transformer(settings(family, **changes), rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        middle = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        return jnp.asarray(middle + 0.25 * rng.standard_normal(leaf.shape), leaf.dtype)  # 0.25 is 1.4 / sqrt(D)

    return jax.tree.map_with_path(draw, shapes)


def on_mesh(model: Transformer) -> Transformer:
    """The model's numbers laid out as a model that is made on the mesh in use."""
    made = jax.eval_shape(lambda: Transformer(model.cfg, rngs=nnx.Rngs(0)))
    mesh = jax.sharding.get_mesh()
    return jax.tree.map(lambda w, like: jax.device_put(w, NamedSharding(mesh, like.sharding.spec)), model, made)


def rows(seed: int = 0, *, batch: int = 8, lengths=(6, 7), padding: int = 3, vocab: int = 64) -> dict:
    """Packed rows: documents of these lengths, one after another, then padding. Every key that any family reads."""
    rng = np.random.default_rng(seed)
    segments = np.repeat(np.arange(len(lengths) + 1), (padding, *lengths))
    segments = np.concatenate([segments[padding:], segments[:padding]])
    positions = np.concatenate([np.arange(n) for n in (*lengths, padding)])
    T = len(segments)
    every = lambda row: np.broadcast_to(row, (batch, T)).astype(np.int32)
    draw = lambda high: rng.integers(1, high, (batch, T)).astype(np.int32)
    return dict(tokens=draw(vocab), targets=draw(vocab), segments=every(segments), positions=every(positions),
                weights=(every(segments) > 0) * rng.uniform(0.5, 1.5, (batch, T)).astype(np.float32),
                types=draw(3) - 1, pair_targets=draw(3) - 1,
                pair_weights=np.eye(1, T, dtype=np.float32).repeat(batch, 0))


def pairs(seed: int = 0, **changes) -> dict:
    """Packed rows with a packed source, for an encoder-decoder."""
    return rows(seed, **changes) | {"source": rows(seed + 1, **changes | dict(lengths=(5, 9), padding=2))}


def score(model: Transformer, batch: dict, key=None, **knobs):
    """The differentiated objective as a mean, the metrics, and the gradients as a nested dict."""
    graph, params = nnx.split(model)

    def objective(params):
        metrics = losses.next_token(nnx.merge(graph, params), batch, key, **knobs)
        return metrics["objective"].value, metrics

    (value, metrics), grads = jax.value_and_grad(objective, has_aux=True)(params)
    return value, metrics, nnx.to_pure_dict(grads)


def norm(tree) -> jax.Array:
    """Global norm of a nested dict of arrays."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)))
