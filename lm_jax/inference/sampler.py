"""What one request may ask of how tokens are drawn."""

from dataclasses import dataclass, fields

import numpy as np

from lm_jax.errors import ConfigError


@dataclass(frozen=True)
class Sampler:
    """How a request draws: from all tokens as the model has them, unless said otherwise.

    In this order: `logit_bias`, penalties, repeats, temperature, top_k, top_p of what is left, min_p. Tokens
    that are equally likely are kept or dropped together. Other numbers need no new program, other kinds of filter do.
    """

    temperature: float = 1.0  # logits are divided by it; 0 takes the likeliest token
    top_k: int = 0  # the k likeliest are kept; 0 keeps all
    top_p: float = 1.0  # the fewest likeliest that hold this share of what is left (nucleus, Holtzman et al. 2020)
    min_p: float = 0.0  # those at least this share as likely as the likeliest (Nguyen et al. 2024)
    repetition_penalty: float = 1.0  # divides logits above 0 of tokens so far, multiplies others (Keskar et al. 2019)
    presence_penalty: float = 0.0  # taken from the logits of tokens that the continuation has (OpenAI's)
    frequency_penalty: float = 0.0  # and this for each time that it has them
    no_repeat_ngram_size: int = 0  # so many tokens in a row never come a second time, the prompt included; 0: they may
    logit_bias: tuple = ()  # (id, number) pairs, or a dict: added to these logits; -inf forbids an id

    def __post_init__(self):
        pairs = self.logit_bias.items() if isinstance(self.logit_bias, dict) else self.logit_bias
        object.__setattr__(self, "logit_bias", tuple(sorted((int(id), float(add)) for id, add in pairs)))
        for name, (able, cure) in RANGES.items():
            if not able(getattr(self, name)):
                raise ConfigError(f"{name}={getattr(self, name)}: {cure}")
        for id, add in self.logit_bias:
            if id < 0 or np.isnan(add) or add == np.inf:
                raise ConfigError(f"logit_bias has {id}: {add}: ids from 0 on, and numbers below infinity")


RANGES = {
    "temperature": (lambda x: 0 <= x < np.inf, "0 (greedy) or above, and finite"),
    "top_k": (lambda x: x >= 0 and x == int(x), "0 (all tokens), or how many"),
    "top_p": (lambda x: 0 < x <= 1, "above 0 and at most 1 (all tokens)"),
    "min_p": (lambda x: 0 <= x <= 1, "a share between 0 (all tokens) and 1"),
    "repetition_penalty": (lambda x: 0 < x < np.inf, "above 0; 1 is none, more makes repeated tokens rarer"),
    "presence_penalty": (np.isfinite, "a finite number; 0 is none"),
    "frequency_penalty": (np.isfinite, "a finite number; 0 is none"),
    "no_repeat_ngram_size": (lambda x: x >= 0 and x == int(x), "0 (all may be repeated), or how many tokens"),
}

DRAWN = tuple(field.name for field in fields(Sampler))
SEARCHED = ("no_repeat_ngram_size",)  # of these, what a search for the likeliest knows too
