"""What stands on top of a stack besides the output table: BERT's masked head and pooler, and heads of fine-tuning."""

import jax
import jax.numpy as jnp
from flax import nnx

from lm_jax import parallel
from lm_jax.config import TransformerConfig
from lm_jax.models.layers import ACTIVATIONS, Einsum, Norm, constant


class MaskedHead(nnx.Module):
    """BERT's transform before the tied output table: dense, activation, norm; and a bias over the vocabulary."""

    def __init__(self, cfg: TransformerConfig, *, rngs: nnx.Rngs):
        self.act = cfg.activation
        self.dense = Einsum("BTD,DM->BTM", cfg, rngs=rngs, bias=True)
        self.norm = Norm("D", cfg)
        self.bias = constant("V", cfg, 0.0)

    def __call__(self, x_BTD):
        return self.norm(ACTIVATIONS[self.act](self.dense(x_BTD)))


class Pooler(nnx.Module):
    """tanh of a dense layer on each row's first token, and the next-sentence logits over {next, random} from it."""

    def __init__(self, cfg: TransformerConfig, *, rngs: nnx.Rngs):
        self.dense = Einsum("BTD,DM->BTM", cfg, rngs=rngs, bias=True)
        self.next = Einsum("BTM,MC->BTC", cfg, rngs=rngs, bias=True)

    def __call__(self, x_BTD):
        """Pooled [B, 1, D] and logits [B, 1, 2]."""
        first_BTD = parallel.constrain(x_BTD, "BSD")[:, :1]
        pooled_BTM = jnp.tanh(self.dense(first_BTD))
        return pooled_BTM, self.next(pooled_BTM)


class Pool(nnx.Module):
    """A dense layer and an activation on each row's first token: [B, 1, D]."""

    def __init__(self, cfg: TransformerConfig, *, rngs: nnx.Rngs):
        self.act = cfg.pooler
        self.dense = Einsum("BTD,DM->BTM", cfg, rngs=rngs, bias=True)

    def __call__(self, x_BTD):
        return POOLS[self.act](self.dense(parallel.constrain(x_BTD, "BSD")[:, :1]))


POOLS = {"tanh": jnp.tanh, "relu": jax.nn.relu}


class Classifier(nnx.Module):
    """Scores of C labels: of each token, or of each row by its first token, and, where tokens see none after them, its
    last."""

    def __init__(self, cfg: TransformerConfig, *, rngs: nnx.Rngs):
        self.of_rows, self.last = cfg.head == "classes", cfg.causal
        bias = not (self.of_rows and self.last)
        self.out = Einsum("BTM,MC->BTC", cfg, rngs=rngs, bias=bias)

    def __call__(self, x_BTD, segments_BT):
        """scores_BTC in float32, T being 1 for a row; padding, of which `segments_BT` are 0, is no last token."""
        if self.of_rows and self.last:
            last_B1 = jnp.where(segments_BT > 0, jnp.arange(segments_BT.shape[1]), -1).max(1, keepdims=True)
            x_BTD = parallel.constrain(x_BTD, "BSD")
            here_BS = jnp.arange(segments_BT.shape[1]) == last_B1
            x_BTD = jnp.where(here_BS[..., None], x_BTD, 0).sum(1, keepdims=True)
        elif self.of_rows:
            x_BTD = parallel.constrain(x_BTD, "BSD")[:, :1]
        return self.out(x_BTD).astype(jnp.float32)
