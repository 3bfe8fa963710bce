"""Drawing tokens from logits."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lm_jax import parallel
from lm_jax.config import ConfigError


@dataclass(frozen=True)
class Sampler:
    """How to draw: from all tokens as the model has them, unless said otherwise. Static under jit."""

    temperature: float = 1.0  # logits are divided by it first; 0 takes the likeliest token
    top_k: int = 0  # then the k likeliest are kept; 0 keeps all
    top_p: float = 1.0  # then the fewest likeliest that hold this share of what is left (nucleus, Holtzman et al. 2020)

    def __post_init__(self):
        if self.temperature < 0:
            raise ConfigError(f"temperature={self.temperature}: 0 (greedy) or above")
        if self.top_k < 0:
            raise ConfigError(f"top_k={self.top_k}: 0 (all tokens) or above")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p}: above 0 and at most 1")


def sample(logits_BV, sampler: Sampler, key, *, vocab: int = 0):
    """One token id a row, int32 [B]. With `vocab` > 0 only ids below it are drawn: the table's rest is padding.

    `key` is one for the batch or, [B], one a row: what a row draws depends on its own key and logits alone.
    """
    V = logits_BV.shape[-1]
    logits_BV = parallel.constrain(logits_BV.astype(jnp.float32), "BA")  # each device sees all tokens of its rows
    if vocab:
        logits_BV = jnp.where(jnp.arange(V) < vocab, logits_BV, -jnp.inf)
    if sampler.temperature == 0:
        return logits_BV.argmax(-1).astype(jnp.int32)
    logits_BV /= sampler.temperature
    keys_B = row_keys(key, logits_BV.shape[0])
    if not sampler.top_k and sampler.top_p == 1:
        return _draw(logits_BV, keys_B)
    logits_BA, ids_BA = jax.lax.top_k(logits_BV, min(sampler.top_k or V, V))  # sorted, so that ties cannot add to k
    probs_BA = jax.nn.softmax(logits_BA)
    likelier_BA = jnp.cumsum(probs_BA, -1) - probs_BA  # share of the tokens before it
    rank_B = _draw(jnp.where(likelier_BA < sampler.top_p, logits_BA, -jnp.inf), keys_B)
    return jnp.where(jnp.arange(ids_BA.shape[-1]) == rank_B[:, None], ids_BA, 0).sum(-1)


def row_keys(key, rows: int):
    """A key a row [B]: `key` itself if it is that already, else `key` folded with the row's number."""
    return key if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))


def _draw(logits_BA, keys_B):
    """Ids by the Gumbel maximum: argmax(logits + noise) follows softmax(logits)."""
    noise_BA = jax.vmap(lambda key: jax.random.gumbel(key, logits_BA.shape[-1:]))(keys_B)
    return (logits_BA + noise_BA).argmax(-1).astype(jnp.int32)
