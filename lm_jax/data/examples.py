"""Objectives as numpy functions: a packed row of raw tokens becomes arrays that one cross-entropy can score.

A row arrives as `pieces`, windows of one document each ([bos] t1 .. tn [eos], or a part of that). Every objective gives

    tokens targets weights positions segments      [B, T]; weights float32, the others int32

where segments count 1, 2, .. along the row and 0 is padding, and positions start again in each segment. `prefix` adds
"order", `masked_pairs` adds "types", "pair_targets" and "pair_weights", `span` and `ul2` add an encoder row "source".
Randomness comes from one generator a row, so a row does not depend on the batch that it is made in.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lm_jax.config import ConfigError, DataConfig
from lm_jax.data import spans

HIDE, SWAP = 0.8, 0.1  # of the chosen tokens: share that becomes the mask, share that becomes any token (BERT, 3.1)


class Objective(NamedTuple):
    window: Callable[[int, float, float], int]  # (length, noise, span) -> positions that a row takes from the store
    overlap: int  # tokens that a piece has beyond its positions: 1 where the target is the next token
    make: Callable  # (rows, rngs, spec) -> batch
    denoisers: Callable[[float, float], tuple] = lambda noise, span: ()  # of the objectives with an encoder


@dataclass(frozen=True)
class Spec:
    """What an objective needs besides tokens; `other(b, rng)` gives the pieces of any row but the batch's row b.

    Raises ConfigError if the tokenizer has fewer sentinels than a row may have hidden spans.
    """

    data: DataConfig
    tokenizer: Any
    other: Callable[[int, np.random.Generator], list] | None = None

    def __post_init__(self):
        data, have = self.data, len(self.tokenizer.sentinels)
        need = max((spans.counts(window(data), denoiser)[1] for denoiser in denoisers(data)), default=0)
        if need > have:
            cure = f" or set data.span={1.05 * data.span * need / have:.1f}" if data.objective == "span" else ""
            raise ConfigError(f"data.length={data.length} needs {need} sentinels a row and the tokenizer has {have}: "
                              f"shorten data.length{cure}")

    @functools.cached_property
    def ordinary(self):
        """bool[V]: ids that stand for text; only these are hidden or drawn."""
        return self.tokenizer.byte_lengths > 0

    @functools.cached_property
    def ids(self):
        """The ordinary ids themselves."""
        return np.flatnonzero(self.ordinary)


def window(data):
    """Positions of raw text that fill one row of `data.length` under the configured objective."""
    return OBJECTIVES[data.objective].window(data.length, data.noise, data.span)


def denoisers(data):
    return OBJECTIVES[data.objective].denoisers(data.noise, data.span)


def target_length(data):
    """T of the decoder: the longest targets that `window` tokens can give; data.length where there is no encoder."""
    return max((spans.lengths(window(data), denoiser)[1] for denoiser in denoisers(data)), default=data.length)


def make(pieces, rng, spec):
    """One row as a dict of arrays without a batch axis."""
    return part(batch([pieces], [rng], spec), 0)


def batch(rows, rngs, spec):
    """Rows (lists of pieces; an empty list is a row of padding) and a generator each -> arrays with a batch axis."""
    return OBJECTIVES[spec.data.objective].make(rows, rngs, spec)


def part(made: dict, at: int | slice) -> dict:
    """A batch's row, without the batch axis, or some of its rows."""
    return {key: part(value, at) if isinstance(value, dict) else value[at] for key, value in made.items()}


def causal(rows, rngs, spec):
    """The next token, everywhere (GPT). A piece of n+1 tokens gives n positions."""
    return _packed(rows, spec.data.length, overlap=1)


def prefix(rows, rngs, spec):
    """Each segment's first 1..n tokens, a uniform draw, see each other; the loss is on what follows (T5, 3.2).

    "order" is what causality compares: the position, but the prefix's last position all through the prefix.
    """
    made = _packed(rows, spec.data.length, overlap=1)
    cut_BT = np.zeros_like(made["positions"])
    for cut_T, pieces, rng in zip(cut_BT, rows, rngs):
        sizes = np.array([len(piece) - 1 for piece in pieces], np.int64)
        cut_T[: sizes.sum()] = np.repeat(rng.integers(1, sizes, endpoint=True), sizes)
    made["order"] = np.maximum(made["positions"], cut_BT - 1)
    made["weights"] *= made["positions"] >= cut_BT - 1
    return made


def masked(rows, rngs, spec):
    """Guess hidden tokens from both sides (BERT); targets are the true ids, weights 1 where a token was chosen."""
    made = _packed(rows, spec.data.length, overlap=0)
    for tokens_T, segments_T, weights_T, rng in zip(made["tokens"], made["segments"], made["weights"], rngs):
        tokens_T[:], weights_T[:] = _hide(tokens_T, segments_T, rng, spec)
    return made


def masked_pairs(rows, rngs, spec):
    """`masked` over [bos] A [eos] B [eos], and whether B follows A (BERT): pair_targets 0 if so, 1 if B is any text.

    A row of several documents is cut inside its longest one; between documents only the eos is kept (RoBERTa,
    FULL-SENTENCES). Of the pair's [T] weights only the first is 1; it is 0 too where a row is too short to cut.
    """
    return _stacked([_pair(b, pieces, rng, spec) for b, (pieces, rng) in enumerate(zip(rows, rngs))])


def denoised(rows, rngs, spec):
    """Span corruption (T5) or UL2: each row by one of the objective's denoisers, all equally likely.

    The encoder's row is "source": mode token, text with sentinels, eos. The decoder starts from pad and writes each
    sentinel and what it hides, then eos.
    """
    kinds = denoisers(spec.data)
    return _stacked([_denoised(pieces, kinds[rng.integers(len(kinds))], rng, spec) for pieces, rng in zip(rows, rngs)])


def _packed(rows, length, *, overlap):
    """Pieces side by side, each a segment. Works on the whole batch at once: this is what feeds large runs."""
    pieces = [piece for row in rows for piece in row]
    per_row = np.array([len(row) for row in rows])
    sizes = np.array([len(piece) for piece in pieces], np.int64)
    flat = np.concatenate(pieces or [np.zeros(0)]).astype(np.int32)
    ends = np.cumsum(sizes)
    tokens, targets = (np.delete(flat, ends - 1), np.delete(flat, ends - sizes)) if overlap else (flat, flat.copy())
    sizes = sizes - overlap
    starts = (np.cumsum(sizes) - sizes).astype(np.int32)
    segment = (np.arange(len(pieces)) - np.repeat(np.cumsum(per_row) - per_row, per_row) + 1).astype(np.int32)
    totals = np.diff(np.append(starts, len(tokens))[np.append(0, np.cumsum(per_row))])
    if totals.max(initial=0) > length:
        raise ValueError(f"a row of {totals.max()} positions does not fit data.length={length}")
    full_BT = np.arange(length) < totals[:, None]

    def place(values):
        if len(values) == full_BT.size:
            return values.reshape(full_BT.shape)
        placed = np.zeros(full_BT.shape, np.int32)
        placed[full_BT] = values
        return placed

    return {"tokens": place(tokens), "targets": place(targets), "weights": full_BT.astype(np.float32),
            "positions": place(np.arange(len(tokens), dtype=np.int32) - np.repeat(starts, sizes)),
            "segments": place(np.repeat(segment, sizes))}


def _hide(tokens, segments, rng, spec):
    """(tokens after BERT's noise, float32 weights): max(1, round(noise n)) of the n ordinary tokens are chosen."""
    able = np.flatnonzero((segments > 0) & spec.ordinary[tokens])
    budget = min(len(able), max(1, round(spec.data.noise * len(able))))
    chosen = _words(able, tokens, budget, rng, spec) if spec.data.whole_words else rng.permutation(able)[:budget]
    fate = rng.random(len(chosen))
    noised, weights = tokens.copy(), np.zeros(len(tokens), np.float32)
    noised[chosen[fate < HIDE]] = spec.tokenizer.mask
    swapped = chosen[fate >= 1 - SWAP]
    noised[swapped] = spec.ids[rng.integers(len(spec.ids), size=len(swapped))]
    weights[chosen] = 1
    return noised, weights


def _words(able, tokens, budget, rng, spec):
    """Whole words in random order, skipping those that no longer fit the budget; at least one, the shortest."""
    first = spec.tokenizer.word_starts[tokens[able]] | (np.diff(able, prepend=-2) > 1)
    words = np.split(able, np.flatnonzero(first)[1:])
    chosen, left = [], budget
    for i in rng.permutation(len(words)):
        if len(words[i]) <= left:
            chosen.append(words[i])
            left -= len(words[i])
    return np.concatenate(chosen or [min(words, key=len)])


def _pair(b, pieces, rng, spec):
    bos, eos, T = spec.tokenizer.bos, spec.tokenizer.eos, spec.data.length
    texts = _texts(pieces, spec)
    sizes = [np.count_nonzero(text != eos) for text in texts]
    longest = int(np.argmax(sizes)) if sizes else 0
    cuttable = max(sizes, default=0) >= 2
    cut = sum(map(len, texts[:longest])) + int(rng.integers(1, sizes[longest])) if cuttable else None
    whole = np.concatenate(texts or [np.zeros(0, np.int32)])
    first, second = whole[:cut], whole[cut:] if cuttable else whole[:0]
    strange = cuttable and rng.random() < 0.5
    if strange:
        other = np.concatenate(_texts(spec.other(b, rng), spec))
        start = int(rng.integers(max(0, len(other) - len(second)) + 1))
        second = other[start : start + len(second)]
    made = _line(np.concatenate([[bos], first, [eos], second, [eos]]) if pieces else whole, T)
    made["targets"] = made["tokens"]
    made["tokens"], made["weights"] = _hide(made["tokens"], made["segments"], rng, spec)
    made["types"] = ((np.arange(T) >= len(first) + 2) & (made["segments"] > 0)).astype(np.int32)
    made["pair_targets"] = _pad([int(strange)], T)
    made["pair_weights"] = _pad([int(cuttable)], T).astype(np.float32)
    return made


def _texts(pieces, spec):
    """The pieces without bos, the last also without the eos that ends it."""
    texts = [piece[piece != spec.tokenizer.bos].astype(np.int32) for piece in pieces]
    if texts and texts[-1][-1:].tolist() == [spec.tokenizer.eos]:
        texts[-1] = texts[-1][:-1]
    return texts


def _denoised(pieces, denoiser, rng, spec):
    tokenizer, T = spec.tokenizer, target_length(spec.data)
    text = np.concatenate(pieces or [np.zeros(0)]).astype(np.int32)
    hidden = spans.mask(len(text), denoiser, rng)
    marks, end = np.array(tokenizer.sentinels, np.int32), [tokenizer.eos] if pieces else []
    lead = [tokenizer.modes[denoiser.mode]] if pieces and denoiser.mode is not None else []
    seen = np.concatenate([lead, spans.collapse(text, hidden, marks), end])
    targets = np.concatenate([spans.collapse(text, ~hidden, marks), end])
    made = _line(np.append(tokenizer.pad, targets)[:-1], T)
    made |= {"targets": _pad(targets, T), "weights": (made["segments"] > 0).astype(np.float32)}
    return made | {"source": _line(seen, spec.data.length)}


def _line(tokens, length):
    """Tokens as the only segment of a padded row."""
    columns = {"tokens": tokens, "positions": np.arange(len(tokens)), "segments": np.ones(len(tokens))}
    return {key: _pad(values, length) for key, values in columns.items()}


def _pad(values, length):
    padded = np.zeros(length, np.int32)
    padded[: len(values)] = values
    return padded


def _stacked(rows):
    if isinstance(rows[0], dict):
        return {key: _stacked([row[key] for row in rows]) for key in rows[0]}
    return np.stack(rows)


OBJECTIVES = {
    "causal": Objective(lambda length, noise, span: length, 1, causal),
    "prefix": Objective(lambda length, noise, span: length, 1, prefix),
    "masked": Objective(lambda length, noise, span: length, 0, masked),
    "masked_pairs": Objective(lambda length, noise, span: length - 3, 0, masked_pairs),  # leaves room for bos, eos, eos
    "span": Objective(lambda length, *noise: spans.window(length, spans.t5(*noise)), 0, denoised, spans.t5),
    "ul2": Objective(lambda length, *noise: spans.window(length, spans.ul2(*noise)), 0, denoised, spans.ul2),
}
