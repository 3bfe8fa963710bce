"""The memory of the cross-entropy at a large vocabulary, as the compiler lays it out; nothing is run."""

import jax
import jax.numpy as jnp
from flax import nnx

from lm_jax import losses, update
from lm_jax.config import TransformerConfig
from lm_jax.measure.figures import Figure
from lm_jax.models.transformer import Transformer

VOCAB, WIDTH, ROWS, LENGTH = 131_072, 256, 8, 2048
MIB = 2**20


def measured(*, vocab: int = VOCAB, width: int = WIDTH, rows: int = ROWS, length: int = LENGTH) -> list[Figure]:
    """Temporaries of the loss and its gradients with respect to hidden states and table, beside one chunk of logits
    and all of them."""
    cfg = TransformerConfig(vocab=vocab, width=width, depth=1, heads=width // 64 or 1, dtype="float32")
    model = jax.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0)))
    x_BTD = jax.ShapeDtypeStruct((rows, length, width), jnp.float32)
    targets_BT = jax.ShapeDtypeStruct((rows, length), jnp.int32)

    def total(params, x_BTD, model, targets_BT):
        batch = dict(targets=targets_BT, weights=jnp.ones(targets_BT.shape))
        return losses.token_scores(update.with_parameters(model, params), x_BTD, batch)[0]

    graded = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))
    laid = graded.lower(update.parameters(model), x_BTD, model, targets_BT).compile().memory_analysis()
    parts, logits = losses.parts_of(rows, length, vocab), 4 * rows * length * vocab
    chunk, temporary = logits / parts, laid.temp_size_in_bytes
    what = f"{rows} rows of {length} tokens, V {vocab:,}, D {width}, float32; compiled, not run"
    return [Figure("temporaries of loss and gradients", temporary / MIB, "MiB", what),
            Figure("one chunk of logits", chunk / MIB, "MiB", f"one of {parts}, counted"),
            Figure("all logits", logits / MIB, "MiB", "counted"),
            Figure("temporaries over one chunk", temporary / chunk, "x", "1 is the goal; the hidden states' and the "
                   f"table's gradients, {4 * width * (rows * length + vocab) / MIB:,.0f} MiB, may be among them")]
