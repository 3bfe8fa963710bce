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
from lm_jax.inference.sample import Sampler, words
from lm_jax.models.stack import Cache

NEVER = -1e30  # the score of what is not there; finite, so that differences are no NaN


class Beams(NamedTuple):
    """Each row's continuations, the best first: int32 [B, W, length], how many tokens of each are its own, and scores:
    the log-probability of all tokens, the stop included, over their number to the power of the length penalty."""

    tokens_BWT: jax.Array
    lengths_BW: jax.Array
    scores_BW: jax.Array


def search(model, batch: Batch, *, beams: int, length: int, stop=(), length_penalty: float = 1.0,
           vocab: int = 0, least: int = 0, early: bool = False) -> Beams:
    """The `beams` best continuations of each row that a search of this width finds, of up to `length` tokens.

    `batch`, `stop` and `vocab` are as in `generate`. A `length_penalty` above 0 favours long continuations (1: the mean
    of a token decides), 0 compares sums. A search ends when nothing that goes on can reach what has ended, so that one
    as wide as all continuations finds the best of them. No stop comes before `least` tokens. With `early` a row's
    search ends as soon as `beams` texts have ended, each when it was among the best `beams`, as in transformers.
    """
    if beams < 1:
        raise ConfigError(f"beams={beams}: at least 1")
    _, stops_A = asked(model, batch, Sampler(0), length=length, stop=stop, vocab=vocab)
    limits = _Limits(stops_A, jnp.float32(length_penalty), jnp.int32(least), jnp.bool_(early))
    return _search(model, batch, limits, beams=beams, length=length, vocab=vocab)


class _Limits(NamedTuple):
    """What ends a text, and a search."""

    stops_A: jax.Array
    penalty: jax.Array
    least: jax.Array
    early: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _State:
    written: jax.Array
    alive_BWT: jax.Array  # tokens of what goes on
    sums_BW: jax.Array  # and its log-probability
    ended: Beams
    cache: Cache  # of B W rows


@partial(jax.jit, static_argnames=("beams", "length", "vocab"))
def _search(model, batch, limits, *, beams, length, vocab):
    model, B, W, penalty = ready(model), batch["tokens"].shape[0], beams, limits.penalty
    cache, last_B1D, end_B1 = prefill(model, batch, batch["tokens"].shape[1] + length - 1)
    wide = lambda a_B: _rows(a_B, jnp.repeat(jnp.arange(B), W))
    end_B1, cache = jax.tree.map(wide, end_B1), _reordered(cache, wide)

    def more(state):
        """Whether something goes on that can still be among the best, all of its tokens to come being certain."""
        most = jnp.where(penalty > 0, length, state.written).astype(jnp.float32)
        hope_B = state.sums_BW.max(1) / most**penalty
        return (state.written < length) & ((hope_B > state.ended.scores_BW.min(1)) & ~_over(state.ended, limits)).any()

    def write(state):
        newest_B1 = jax.lax.dynamic_index_in_dim(state.alive_BWT, state.written - 1, 2).reshape(B * W, 1)
        places = {"positions": end_B1["positions"] + state.written, "tokens": newest_B1}
        hidden_B1D, cache, _ = model.hidden(end_B1 | places, cache=state.cache)
        return _grown(model, dataclasses.replace(state, cache=cache), hidden_B1D, limits, vocab)

    nothing = Beams(jnp.zeros((B, W, length), jnp.int32), jnp.zeros((B, W), jnp.int32), jnp.full((B, W), NEVER))
    sums_BW = jnp.broadcast_to(jnp.where(jnp.arange(W) == 0, 0.0, NEVER), (B, W))  # all beams start as one
    state = _State(jnp.int32(0), nothing.tokens_BWT, sums_BW, nothing, cache)
    state = _grown(model, state, wide(last_B1D), limits, vocab)
    state = jax.lax.while_loop(more, write, state)
    scores_BW = _scores(state.sums_BW, state.written, penalty)
    scores_BW = jnp.where(_over(state.ended, limits)[:, None], NEVER, scores_BW)
    return _best(state.ended, Beams(state.alive_BWT, jnp.full((B, W), state.written), scores_BW))


def _grown(model, state: _State, hidden_B1D, limits, vocab) -> _State:
    """The state with one more token everywhere: the best that stop join the ended, the best that do not go on."""
    B, W, _ = state.alive_BWT.shape
    logprobs_BV = words(jax.nn.log_softmax(words(model.logits(hidden_B1D)[:, 0])), vocab)
    V, stops_A = logprobs_BV.shape[1], limits.stops_A
    barred_V = (jnp.arange(V)[:, None] == stops_A).any(1) & (state.written < limits.least)
    logprobs_BV = jnp.where(barred_V, NEVER, logprobs_BV)
    sums_BA = (state.sums_BW[..., None] + logprobs_BV.reshape(B, W, V)).reshape(B, W * V)
    enough = min(W * (1 + stops_A.shape[0]), W * V)  # so that W of them do not stop
    sums_BA, index_BA = jax.lax.top_k(sums_BA, enough)
    token_BA, stops_BA = index_BA % V, (index_BA % V)[..., None] == stops_A
    stops_BA, written = stops_BA.any(-1), state.written + 1

    def taken(sums_BA):
        """The W best of these: their tokens, sums and which beam each has grown from."""
        sums_BW, at_BW = jax.lax.top_k(sums_BA, W)
        from_BW = jnp.take_along_axis(index_BA // V, at_BW, 1)
        tokens_BWT = jnp.take_along_axis(state.alive_BWT, from_BW[..., None], 1)
        newest_BW1 = jnp.take_along_axis(token_BA, at_BW, 1)[..., None]
        return jax.lax.dynamic_update_slice_in_dim(tokens_BWT, newest_BW1, state.written, 2), sums_BW, from_BW

    late_A = limits.early & (jnp.arange(enough) >= W)
    open_BA = stops_BA & ~late_A & ~_over(state.ended, limits)[:, None]
    tokens_BWT, sums_BW, _ = taken(jnp.where(open_BA, sums_BA, NEVER))
    scores_BW = _scores(sums_BW, written, limits.penalty)
    ended = _best(state.ended, Beams(tokens_BWT, jnp.full((B, W), written), scores_BW))
    alive_BWT, sums_BW, from_BW = taken(jnp.where(stops_BA, NEVER, sums_BA))
    rows = (jnp.arange(B)[:, None] * W + from_BW).reshape(-1)
    return _State(written, alive_BWT, sums_BW, ended, _reordered(state.cache, lambda a_B: _rows(a_B, rows)))


def _over(ended: Beams, limits: _Limits):
    """The rows whose search has found enough."""
    return limits.early & (ended.scores_BW > NEVER / 2).all(1)


def _scores(sums_BW, length, penalty):
    return jnp.where(sums_BW > NEVER / 2, sums_BW / length.astype(jnp.float32)**penalty, NEVER)


def _best(one: Beams, other: Beams) -> Beams:
    """The best of two sets, as many as each has."""
    tokens_BWT, lengths_BW, scores_BW = (jnp.concatenate(pair, 1) for pair in zip(one, other))
    scores_BW, at_BW = jax.lax.top_k(scores_BW, one.scores_BW.shape[1])
    here = lambda a_BW: jnp.take_along_axis(a_BW, at_BW.reshape(*at_BW.shape, *[1] * (a_BW.ndim - 2)), 1)
    return Beams(here(tokens_BWT), here(lengths_BW), scores_BW)


def _reordered(cache: Cache, rows) -> Cache:
    """The cache with `rows` applied to all that has rows; where layers are stacked, those come second."""
    kept = lambda a: jax.vmap(rows)(a) if a.ndim == 5 else rows(a)
    return dataclasses.replace(
        cache, kept=jax.tree.map(kept, cache.kept), memory=jax.tree.map(kept, cache.memory),
        slots=jax.tree.map(rows, cache.slots), source=jax.tree.map(rows, cache.source))


def _rows(a_B, index_B):
    return a_B.at[index_B].get(out_sharding=parallel.like(a_B))
