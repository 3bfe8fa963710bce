"""What stands on top of a stack besides the output table: BERT's masked head and pooler, and heads of fine-tuning."""

import jax
import jax.numpy as jnp
from flax import nnx

from lm_jax import parallel
from lm_jax.config import TransformerConfig
from lm_jax.models.layers import ACTIVATIONS, Einsum, Norm, activated, constant


class MaskedHead(nnx.Module):
    """BERT's transform before the tied output table: dense, activation, norm; and a bias over the vocabulary."""

    def __init__(self, cfg: TransformerConfig, *, rngs: nnx.Rngs):
        self.act = cfg.activation
        self.dense = Einsum("BTD,DM->BTM", cfg, rngs=rngs, bias=True)
        self.norm = Norm("D", cfg)
        self.bias = constant("V", cfg, 0.0)

    def __call__(self, x_BTD):
        return self.norm(activated(ACTIVATIONS[self.act], self.dense(x_BTD)))


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
    """A dense layer and an activation on what stands for each row: [B, 1, D]."""

    def __init__(self, cfg: TransformerConfig, *, rngs: nnx.Rngs):
        self.act = cfg.pooler
        self.dense = Einsum("BTD,DM->BTM", cfg, rngs=rngs, bias=True)

    def __call__(self, x_BTD):
        return POOLS[self.act](self.dense(x_BTD))


POOLS = {"tanh": jnp.tanh, "relu": jax.nn.relu}


class Classifier(nnx.Module):
    """Scores of C labels, of each token or of what stands for a row; of a plain last token without a bias."""

    def __init__(self, cfg: TransformerConfig, *, rngs: nnx.Rngs):
        plain = cfg.head == "classes" and cfg.causal and cfg.pooler == "none"
        self.out = Einsum("BTM,MC->BTC", cfg, rngs=rngs, bias=not plain)

    def __call__(self, x_BTD):
        """scores_BTC in float32."""
        return self.out(x_BTD).astype(jnp.float32)


def softened(logits_BTV, bias_V, cap: float):
    """Logits of products with the output table: with a masked head's bias_V, if any, within +-cap, if it is not 0."""
    logits_BTV = logits_BTV if bias_V is None else logits_BTV + bias_V
    return cap * jnp.tanh(logits_BTV / cap) if cap else logits_BTV


def of_rows(x_BTD, segments_BT, *, causal: bool):
    """What stands for each row, [B, 1, D]: its first token or, where tokens see none after them, its last; padding, of
    which `segments_BT` are 0, is none."""
    x_BTD = parallel.constrain(x_BTD, "BSD")
    if not causal:
        return x_BTD[:, :1]
    index_S = jnp.arange(segments_BT.shape[1])
    here_BS = index_S == jnp.where(segments_BT > 0, index_S, -1).max(1, keepdims=True)
    return jnp.where(here_BS[..., None], x_BTD, 0).sum(1, keepdims=True)
