"""Where tokens stand, and the one mask that follows from it."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lm_jax.batch import Batch

SAVED = "attention"  # what remat='dots' keeps of a kernel, so as not to run it twice: outputs, and sums of weights


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Layout:
    """Where each token of a row stands. All that a mask needs, so that no mask looks at token ids.

    positions_BT feeds distances and embeddings; segments_BT says what belongs together (0: padding, empty cache
    slots); order_BT is what causality compares: None where that is the position, else a prefix shares one order and
    so sees itself whole.
    """

    positions_BT: jax.Array
    segments_BT: jax.Array
    order_BT: jax.Array | None = None

    @classmethod
    def of(cls, batch: Batch) -> "Layout":
        return cls(batch["positions"], batch["segments"], batch.get("order"))

    @property
    def ordered_BT(self) -> jax.Array:
        """What causality compares, in any case."""
        return self.positions_BT if self.order_BT is None else self.order_BT


def visible(query: Layout, key: Layout, *, causal: bool, window=0):
    """mask_BTS: which keys each query may see. Packing, padding, causality, cross-attention and the cache at once.

    `window` > 0 (an int or a traced scalar) keeps keys fewer than so many positions away; 0 keeps all.
    """
    mask_BTS = query.segments_BT[:, :, None] == key.segments_BT[:, None, :]
    if causal:
        mask_BTS &= key.ordered_BT[:, None, :] <= query.ordered_BT[:, :, None]
    if isinstance(window, int) and window == 0:
        return mask_BTS
    return mask_BTS & ((jnp.abs(distance(query, key)) < window) | (window == 0))


def distance(query: Layout, key: Layout):
    """distance_BTS: how many positions each key lies before each query."""
    return query.positions_BT[:, :, None] - key.positions_BT[:, None, :]
