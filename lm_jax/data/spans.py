"""Arithmetic of hidden spans (T5, UL2): how many tokens to take, which of them to hide, what each side reads.

The encoder reads the text with one sentinel for each hidden span and an eos; the decoder writes each sentinel with its
span and an eos. So n raw tokens become two rows whose lengths follow from n alone, and both have fixed shapes.
"""

import functools
import math
from typing import NamedTuple

import numpy as np


class Denoiser(NamedTuple):
    mode: int | None  # index of the mode token that leads the encoder's input; None leads with nothing
    noise: float  # share of the tokens that is hidden
    span: float  # mean length of a hidden span; infinite: a single span, which ends the text (prefix-LM)


def t5(noise, span):
    """Span corruption as in T5, section 3.1.4."""
    return (Denoiser(None, noise, span),)


def ul2(noise, span):
    """UL2's seven denoisers (Tay et al. 2022, table 1; there noise = 0.15, span = 3): two R, four X, one S."""
    R, X, S = range(3)
    return (Denoiser(R, noise, span), Denoiser(R, noise, 8), Denoiser(X, 0.5, span), Denoiser(X, 0.5, 8),
            Denoiser(X, noise, 64), Denoiser(X, 0.5, 64), Denoiser(S, 0.25, math.inf))


@functools.cache
def window(length, denoisers):
    """Most raw tokens whose encoder input fits `length` under each denoiser (T5's random_spans_helper)."""
    n = max(2, length // 2)
    while all(lengths(n + 1, denoiser)[0] <= length for denoiser in denoisers):
        n += 1
    return n


def lengths(n, denoiser):
    """(encoder, decoder) tokens that n raw tokens become, with sentinels, eos and mode."""
    hidden, spans = counts(n, denoiser)
    return n - hidden + spans + 1 + (denoiser.mode is not None), hidden + spans + 1


def counts(n, denoiser):
    """(hidden tokens, hidden spans) of n >= 2 tokens."""
    hidden = min(max(round(n * denoiser.noise), 1), n - 1)
    return hidden, min(max(round(hidden / denoiser.span), 1), hidden, n - hidden)


def mask(n, denoiser, rng):
    """bool[n], true where hidden: seen and hidden spans take turns, seen first (T5's random_spans_noise_mask)."""
    if n < 2:
        return np.zeros(n, bool)
    hidden, spans = counts(n, denoiser)
    sizes = np.stack([_parts(n - hidden, spans, rng), _parts(hidden, spans, rng)], 1).ravel()
    return np.repeat(np.arange(2 * spans) % 2 == 1, sizes)


def collapse(tokens, hidden, sentinels):
    """Tokens with each hidden span replaced by the next sentinel."""
    first = hidden & ~np.append(False, hidden[:-1])
    return np.where(first, sentinels[np.cumsum(first) - 1], tokens)[first | ~hidden]


def _parts(n, parts, rng):
    """n as a sum of `parts` positive numbers, every such sum equally likely."""
    return np.diff(np.sort(rng.permutation(n - 1)[: parts - 1]) + 1, prepend=0, append=n)
