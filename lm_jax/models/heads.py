"""What stands on top of a stack besides the output table: BERT's masked head and its pooler."""

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
