"""The layers every model is made of: one matmul, a table, norms, activations, dropout."""

import math
import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from lm_jax import parallel
from lm_jax.config import TransformerConfig


@dataclass(frozen=True)
class Kind:
    """What a parameter is, for whoever treats parameters by kind (optimizer groups, sharding, counts).

    `letters` name its dimensions ("LDF": stacked over layers), `fan_in` those it sums over ("D"). `width_ratio` is
    its fan-in over the base model's and `depth_ratio` the layers over the base model's: 1 outside muP.
    """

    letters: str
    fan_in: str
    role: str  # matrix | embedding | head | vector
    width_ratio: float = 1.0
    depth_ratio: float = 1.0
