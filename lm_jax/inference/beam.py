"""Beam search: the likeliest continuations, kept side by side."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lm_jax import parallel
from lm_jax.batch import Batch
from lm_jax.config import ConfigError
from lm_jax.inference.generate import asked, prefill, ready
from lm_jax.inference.sample import aligned, repeats, words
from lm_jax.inference.sampler import Sampler
from lm_jax.models.stack import Cache

NEVER = -1e30  # the score of what is not there; finite, so that differences are no NaN


class Beams(NamedTuple):
    """Each row's continuations, the best first: int32 [B, W, length], how many tokens of each are its own, its tokens'
    log-probabilities as in `generate.Generated`, and scores: their sum, the stop's included, over their number to the
    power of the length penalty."""

    tokens_BWT: jax.Array
    lengths_BW: jax.Array
    logprobs_BWT: jax.Array
    scores_BW: jax.Array


def search(model, batch: Batch, *, beams: int, length: int, stop=(), length_penalty: float = 1.0,
           vocab: int = 0, least: int = 0, early: bool = False, no_repeat_ngram_size: int = 0) -> Beams:
    """The `beams` best continuations of each row that a search of this width finds, of up to `length` tokens.

    `batch`, `stop` and `vocab` are as in `generate`. A `length_penalty` above 0 favours long continuations (1: the mean
    of a token decides), 0 compares sums. A search ends when nothing that goes on can reach what has ended, so that one
    as wide as all continuations finds the best of them. No stop comes before `least` tokens, and no
    `no_repeat_ngram_size` tokens in a row a second time. With `early` a row's search ends as soon as `beams` texts have
    ended, each when it was among the best `beams`, as in transformers.
    """
    if beams < 1:
        raise ConfigError(f"beams={beams}: at least 1")
    sampler = Sampler(0, no_repeat_ngram_size=no_repeat_ngram_size)
    rules, stops_A = asked(model, batch, sampler, length=length, stop=stop, vocab=vocab)
    limits = _Limits(stops_A, jnp.float32(length_penalty), jnp.int32(least), jnp.bool_(early),
                     rules.no_repeat_ngram_size_B)
    return _search(model, batch, limits, beams=beams, length=length, vocab=vocab)


class _Limits(NamedTuple):
    """What ends a text, what may not be in it, and what ends a search."""

    stops_A: jax.Array
    penalty: jax.Array
    least: jax.Array
    early: jax.Array
    size_B: jax.Array | None  # of what must not be repeated, of each row; None: everything may
    prompts_BS: jax.Array | None = None  # as `sample.aligned`


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _State:
    written: jax.Array
    alive: Beams  # what goes on; its scores are the sums of its log-probabilities
    ended: Beams
    cache: Cache  # of B W rows


@partial(jax.jit, static_argnames=("beams", "length", "vocab"))
def _search(model, batch, limits, *, beams, length, vocab):
    model, (B, T), W, penalty = ready(model), batch["tokens"].shape, beams, limits.penalty
    cache, last_B1D, end_B1 = prefill(model, batch, T + length - 1)
    wide = lambda a_B: _rows(a_B, jnp.repeat(jnp.arange(B), W))
    end_B1, cache = jax.tree.map(wide, end_B1), _reordered(cache, wide)
    if limits.size_B is not None:
        prompts_BS = aligned(batch["tokens"], batch["segments"], room=0)
        limits = limits._replace(size_B=wide(limits.size_B), prompts_BS=wide(prompts_BS))

    def more(state):
        """Whether something goes on that can still be among the best, all of its tokens to come being certain."""
        most = jnp.where(penalty > 0, length, state.written).astype(jnp.float32)
        hope_B = state.alive.scores_BW.max(1) / most**penalty
        return (state.written < length) & ((hope_B > state.ended.scores_BW.min(1)) & ~_over(state.ended, limits)).any()

    def write(state):
        newest_B1 = jax.lax.dynamic_index_in_dim(state.alive.tokens_BWT, state.written - 1, 2).reshape(B * W, 1)
        places = {"positions": end_B1["positions"] + state.written, "tokens": newest_B1}
        hidden_B1D, cache, _ = model.hidden(end_B1 | places, cache=state.cache)
        return _grown(model, dataclasses.replace(state, cache=cache), hidden_B1D, limits, vocab)

    one = lambda value, *shape: parallel.constrain(jnp.full((B, W, *shape), value), "BAS"[:2 + len(shape)])
    nothing = Beams(one(0, length), one(0), one(0.0, length), one(NEVER))
    alone = nothing._replace(scores_BW=jnp.where(jnp.arange(W) == 0, 0.0, nothing.scores_BW))  # all beams start as one
    state = _State(jnp.int32(0), alone, nothing, cache)
    state = _grown(model, state, wide(last_B1D), limits, vocab)
    state = jax.lax.while_loop(more, write, state)
    scores_BW = _scores(state.alive.scores_BW, state.written, penalty)
    scores_BW = jnp.where(_over(state.ended, limits)[:, None], NEVER, scores_BW)
    return _best(state.ended, state.alive._replace(scores_BW=scores_BW))


def _grown(model, state: _State, hidden_B1D, limits, vocab) -> _State:
    """The state with one more token everywhere: the best that stop join the ended, the best that do not go on."""
    alive, written, stops_A = state.alive, state.written + 1, limits.stops_A
    B, W = alive.lengths_BW.shape
    logprobs_BV = jax.nn.log_softmax(words(model.logits(hidden_B1D)[:, 0]))
    V = logprobs_BV.shape[1]
    able_BV = jnp.where(_barred(state, logprobs_BV, limits), NEVER, words(logprobs_BV, vocab))
    of_beams = lambda a_BV: jnp.reshape(a_BV, (B, W, V), out_sharding=parallel.like(alive.tokens_BWT))
    enough = min(W * (1 + stops_A.shape[0]), W * V)  # so that W of them do not stop
    sums_BA, index_BA = jax.lax.top_k((alive.scores_BW[..., None] + of_beams(able_BV)).reshape(B, W * V), enough)
    logprobs_BA = jnp.take_along_axis(of_beams(logprobs_BV).reshape(B, W * V), index_BA, 1)
    stops_BA = ((index_BA % V)[..., None] == stops_A).any(-1)

    def taken(sums_BA):
        """The W best of these, scored by their sums, and which beam each has grown from."""
        sums_BW, at_BW = jax.lax.top_k(sums_BA, W)
        best = lambda a_BA: jnp.take_along_axis(a_BA, at_BW, 1)
        from_BW = best(index_BA // V)
        with_newest = lambda old_BWT, new_BA: jax.lax.dynamic_update_slice_in_dim(
            jnp.take_along_axis(old_BWT, from_BW[..., None], 1), best(new_BA)[..., None], state.written, 2)
        return Beams(with_newest(alive.tokens_BWT, index_BA % V), alive.lengths_BW + 1,
                     with_newest(alive.logprobs_BWT, logprobs_BA), sums_BW), from_BW

    late_A = limits.early & (jnp.arange(enough) >= W)
    open_BA = stops_BA & ~late_A & ~_over(state.ended, limits)[:, None]
    ended, _ = taken(jnp.where(open_BA, sums_BA, NEVER))
    ended = _best(state.ended, ended._replace(scores_BW=_scores(ended.scores_BW, written, limits.penalty)))
    alive, from_BW = taken(jnp.where(stops_BA, NEVER, sums_BA))
    rows = (jnp.arange(B)[:, None] * W + from_BW).reshape(-1)
    return _State(written, alive, ended, _reordered(state.cache, lambda a_B: _rows(a_B, rows)))


def _barred(state: _State, logprobs_BV, limits):
    """True at what may not come next: a stop that is too early, and what would repeat too much."""
    stops_V = (jnp.arange(logprobs_BV.shape[1])[:, None] == limits.stops_A).any(1)
    early_V = stops_V & (state.written < limits.least)
    if limits.size_B is None:
        return early_V
    tokens_BT = parallel.constrain(state.alive.tokens_BWT.reshape(len(logprobs_BV), -1), "BS")
    written_BT = jnp.where(jnp.arange(tokens_BT.shape[1]) < state.written, tokens_BT, -1)
    at_B = jnp.full_like(limits.size_B, limits.prompts_BS.shape[1]) + state.written
    text_BS = jnp.concatenate([limits.prompts_BS, written_BT], 1)
    return early_V | repeats(text_BS, at_B, limits.size_B, logprobs_BV)


def _over(ended: Beams, limits: _Limits):
    """The rows whose search has found enough."""
    return limits.early & (ended.scores_BW > NEVER / 2).all(1)


def _scores(sums_BW, length, penalty):
    return jnp.where(sums_BW > NEVER / 2, sums_BW / length.astype(jnp.float32)**penalty, NEVER)


def _best(one: Beams, other: Beams) -> Beams:
    """The best of two sets, as many as each has."""
    both = Beams(*(jnp.concatenate(pair, 1) for pair in zip(one, other)))
    _, at_BW = jax.lax.top_k(both.scores_BW, one.scores_BW.shape[1])
    here = lambda a_BW: jnp.take_along_axis(a_BW, at_BW.reshape(*at_BW.shape, *[1] * (a_BW.ndim - 2)), 1)
    return jax.tree.map(here, both)


def _reordered(cache: Cache, rows) -> Cache:
    """The cache with `rows` applied to all that has rows; where layers are stacked, those come second."""
    kept = lambda a: jax.vmap(rows)(a) if a.ndim == 5 else rows(a)
    return dataclasses.replace(
        cache, kept=jax.tree.map(kept, cache.kept), memory=jax.tree.map(kept, cache.memory),
        slots=jax.tree.map(rows, cache.slots), source=jax.tree.map(rows, cache.source))


def _rows(a_B, index_B):
    return a_B.at[index_B].get(out_sharding=parallel.like(a_B, len(index_B)))
