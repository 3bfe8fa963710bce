"""What flows through a step: batches of tokens, sums that add up, and the types of losses and evaluators."""

from dataclasses import dataclass
from typing import Any, Callable

import jax
import jax.numpy as jnp

# A row of tokens is described by arrays [B, T]: tokens, positions, segments (0 is padding), and for what is
# predicted: targets, weights. Some objectives add keys: `order` (prefix: what causality compares, else positions),
# `types` (token types), `pair_targets` and `pair_weights` (next sentence), `source` (an encoder's own Batch).
Batch = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mean:
    """A weighted mean kept as two sums, so that microbatches, eval batches and hosts just add; divided once."""

    total: jax.Array
    weight: jax.Array

    @classmethod
    def of(cls, values, weights) -> "Mean":
        """Sums of `values` times `weights`, and of `weights`, in float32."""
        weights = jnp.broadcast_to(weights, values.shape).astype(jnp.float32)
        return cls((values.astype(jnp.float32) * weights).sum(), weights.sum())

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.weight + other.weight)

    @property
    def value(self):
        """total / weight; 0 where nothing was weighed."""
        return self.total / jnp.maximum(self.weight, 1e-9)


# One model and one batch; a key means noise (dropout). Returns sums: "objective" is what is differentiated, "loss"
# what is reported, and every term of the objective carries the loss's weight, so that one division serves all.
Loss = Callable[[Any, Batch, jax.Array | None], dict[str, Mean]]
