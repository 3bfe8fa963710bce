"""Speculative decoding: a small model drafts, the large one reads that in one pass, and the law is the large one's.

Each drafted token is kept with probability min(1, p / q), p being the model's law and q the draft's; at the first that
is not, one is drawn from what p has over q (Leviathan et al. 2023; Chen et al. 2023).
"""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lm_jax import parallel
from lm_jax.batch import Batch
from lm_jax.config import ConfigError
from lm_jax.inference.generate import asked, chosen, extent, prefill, ready, stopped
from lm_jax.inference.sample import History, draw, law, pick, row_keys, words
from lm_jax.inference.sampler import Sampler
from lm_jax.models.positions import trained_length
from lm_jax.models.stack import Cache


class Speculated(NamedTuple):
    """As `generate.Generated`, and how many tokens were drafted for each row and how many of these were kept."""

    tokens_BT: jax.Array
    lengths_B: jax.Array
    logprobs_BT: jax.Array
    drafted_B: jax.Array
    kept_B: jax.Array


def speculate(model, draft, batch: Batch, sampler=Sampler(), *, length: int, key, ahead: int = 4, stop=(),
              vocab: int = 0) -> Speculated:
    """`generate`, with `ahead` tokens at a time drafted by another model of the same vocabulary; where their tables are
    padded to different sizes, `vocab` says how many ids of them are words.

    The law of what is written is that of `generate`, and greedy rows are the same; other rows draw by other numbers.
    Rows keep as much of a draft as each may: what one did not keep is a hole in its cache, which no query sees. The
    cache has room for rows that never keep alike: at most `length` (`ahead` + 1) slots, and `length` of a single row.
    """
    if ahead < 1:
        raise ConfigError(f"ahead={ahead}: at least one drafted token, or use generate")
    if model.cfg.vocab != draft.cfg.vocab and not 0 < vocab <= min(model.cfg.vocab, draft.cfg.vocab):
        raise ConfigError(f"the draft has {draft.cfg.vocab} tokens and the model {model.cfg.vocab}: take a draft of "
                          "the model's vocabulary; if only the padding of their tables differs, pass vocab")
    knobs = dict(length=length, stop=stop, vocab=vocab)
    asked(draft, batch, sampler, **knobs)
    rules, stops_A = asked(model, batch, sampler, **knobs)
    most, last = trained_length(model.cfg), extent(batch) + length + ahead - 1
    if model.cfg.positions == "rope" and model.cfg.rope.scaling == "dynamic" and last > most:
        raise ConfigError(f"a draft for rope.scaling='dynamic' up to {last} tokens, of {most} trained on: beyond them "
                          "what is written depends on how much is read at once; use generate, or shorter texts")
    rules = rules if rules.bias_BV is None else dataclasses.replace(rules, bias_BV=rules.bias_BV[:, :vocab or None])
    keys_B = row_keys(key, batch["tokens"].shape[0])
    return _speculate(model, draft, batch, rules, keys_B, stops_A, length=length, ahead=ahead, vocab=vocab)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _State:
    made: Speculated  # with room for a whole draft behind its tokens
    newest_B: jax.Array  # each row's last token, which no cache has yet
    done_B: jax.Array
    history: History | None
    cache: Cache
    draft_cache: Cache


@partial(jax.jit, static_argnames=("length", "ahead", "vocab"))
def _speculate(model, draft, batch, rules, keys_B, stops_A, *, length, ahead, vocab):
    model, draft, (B, T) = ready(model), ready(draft), batch["tokens"].shape
    keys_B = parallel.constrain(keys_B, "B")
    slots = T + min(B * (length + ahead), length * (ahead + 1)) + ahead + 1
    cache, last_B1D, end_B1 = prefill(model, batch, slots)
    draft_cache, _, _ = prefill(draft, _known(batch, draft.cfg.vocab), slots)
    done_B = end_B1["segments"][:, 0] == 0
    room = lambda dtype: parallel.constrain(jnp.zeros((B, length + ahead + 1), dtype), "BS")
    none_B = jnp.zeros_like(done_B, jnp.int32)
    history = rules.history(batch, vocab or model.cfg.vocab, room=length + ahead + 2)
    logits_BV = words(model.logits(last_B1D)[:, 0])
    token_B = pick(_drawable(logits_BV, vocab), rules, _keys(keys_B, none_B, 2), history)
    made = Speculated(room(jnp.int32), none_B, room(jnp.float32), none_B, none_B)
    state = _State(made, token_B, done_B, history, cache, draft_cache)
    logprob_B = chosen(jax.nn.log_softmax(logits_BV), token_B)
    state = _append(state, token_B[:, None], logprob_B[:, None], none_B + 1, stops_A, length)
    go = partial(_round, model, draft, end_B1, rules, keys_B, stops_A, length=length, ahead=ahead, vocab=vocab)
    made = jax.lax.while_loop(lambda state: ~state.done_B.all(), go, state).made
    return made._replace(tokens_BT=made.tokens_BT[:, :length], logprobs_BT=made.logprobs_BT[:, :length])


def _round(model, draft, end_B1, rules, keys_B, stops_A, state: _State, *, length, ahead, vocab) -> _State:
    """One draft, and of it and what follows it as much as the model's law allows."""
    written_B, at, go_on_B = state.made.lengths_B, state.cache.at, ~state.done_B
    places_B1 = end_B1["positions"] + written_B[:, None]

    def drafted(carry, j):
        """The token after the newest; the last time only what was drafted last is remembered."""
        token_B, history, cache = carry
        step = end_B1 | {"tokens": token_B[:, None], "positions": places_B1 + j}
        x_B1D, cache, _ = draft.hidden(step, cache=cache)
        law_BV = law(_drawable(draft.logits(x_B1D)[:, 0], vocab), rules, history)
        next_B = draw(law_BV, _keys(keys_B, written_B + j, 0))
        return (next_B, history and history.add(next_B, go_on_B), cache), (token_B, law_BV, history)

    start = state.newest_B, state.history, state.draft_cache
    (_, _, draft_cache), (tokens_AB, q_ABV, history_A) = jax.lax.scan(drafted, start, jnp.arange(ahead + 1))
    read = jax.tree.map(lambda a_B1: parallel.constrain(jnp.broadcast_to(a_B1, tokens_AB.T.shape), "BT"), end_B1)
    places = {"tokens": tokens_AB.T, "positions": places_B1 + jnp.arange(ahead + 1)}
    x_BTD, cache, _ = model.hidden(read | jax.tree.map(lambda a_BT: parallel.constrain(a_BT, "BT"), places),
                                   cache=state.cache)
    logits_ABV = jnp.moveaxis(parallel.constrain(model.logits(x_BTD), "BSA"), 1, 0)
    logits_ABV = jax.lax.map(words, logits_ABV)
    laws = lambda pair: jax.nn.softmax(law(_drawable(pair[0], vocab), rules, pair[1]))
    p_ABV = jax.lax.map(laws, (logits_ABV, history_A))
    q_ABV = jax.nn.softmax(q_ABV)
    kept_B = _kept(p_ABV, q_ABV, tokens_AB, keys_B, written_B)
    next_B = _next(p_ABV, q_ABV, kept_B, keys_B, written_B)
    new_AB = jnp.where(jnp.arange(ahead + 1)[:, None] == kept_B, next_B, jnp.roll(tokens_AB, -1, axis=0))
    logprobs_AB = jax.vmap(chosen)(jax.nn.log_softmax(logits_ABV), new_AB)
    made = state.made._replace(drafted_B=state.made.drafted_B + ahead * go_on_B,
                               kept_B=state.made.kept_B + kept_B * go_on_B)
    used = jnp.where(go_on_B, kept_B, 0).max() + 1
    state = dataclasses.replace(state, made=made, cache=_cut(cache, at, kept_B, used),
                                draft_cache=_cut(draft_cache, at, kept_B, used))
    return _append(state, new_AB.T, logprobs_AB.T, kept_B + 1, stops_A, length)


def _drawable(logits_BV, vocab: int):
    """`words` of the ids that may be drawn and no others, so that laws of tables of two sizes can be compared."""
    return words(logits_BV)[:, :vocab or None]


def _known(batch: Batch, vocab: int) -> Batch:
    """The prompts as a draft reads them: ids that are no words may be beyond its table, and it only guesses."""
    source = {"source": _known(batch["source"], vocab)} if "source" in batch else {}
    return batch | {"tokens": jnp.minimum(batch["tokens"], vocab - 1)} | source


def _kept(p_ABV, q_ABV, tokens_AB, keys_B, written_B):
    """How many tokens of each row's draft stand: up to the first that min(1, p / q) does not let."""
    p_AB, q_AB = (jax.vmap(chosen)(one[:-1], tokens_AB[1:]) for one in (p_ABV, q_ABV))
    uniform = lambda j: jax.vmap(jax.random.uniform)(_keys(keys_B, written_B + j, 1))
    falls_AB = jax.vmap(uniform)(jnp.arange(len(p_AB))) * q_AB >= p_AB
    return (jnp.cumsum(falls_AB, 0) == 0).sum(0)


def _next(p_ABV, q_ABV, kept_B, keys_B, written_B):
    """The token after what was kept: of what p has over q where a drafted one fell, of p after a whole draft."""
    here_AB = jnp.arange(len(p_ABV))[:, None] == kept_B
    at = lambda each_ABV: jnp.where(here_AB[..., None], each_ABV, 0).sum(0)
    over_BV = at(jnp.maximum(p_ABV - q_ABV.at[-1].set(0), 0))
    over_BV = jnp.where(over_BV.any(-1, keepdims=True), over_BV, at(p_ABV))  # laws that are equal but for rounding
    return draw(jnp.log(over_BV), _keys(keys_B, written_B + kept_B, 2))


def _append(state: _State, new_BT, logprobs_BT, count_B, stops_A, length) -> _State:
    """The state with the first `count` of these tokens in each row that goes on, up to its stop or its length."""
    (tokens_BT, lengths_B, old_BT, *_), A = state.made, new_BT.shape[1]
    index_A = jnp.arange(A)
    ends_BA = jax.vmap(stopped, (1, None), 1)(new_BT, stops_A)
    before_BA = jnp.cumsum(ends_BA, 1) - ends_BA  # stops that came earlier
    real_BA = (index_A < count_B[:, None]) & (before_BA == 0) & (lengths_B[:, None] + index_A < length)
    real_BA &= ~state.done_B[:, None]
    history = state.history
    for j in range(A) if history else ():
        history = history.add(new_BT[:, j], real_BA[:, j])
    put = lambda a_BT, new_BA: parallel.per_shard(
        jax.vmap(lambda a_T, new_A, real_A, at: jax.lax.dynamic_update_slice_in_dim(
            a_T, jnp.where(real_A, new_A, 0).astype(a_T.dtype), at, 0)),
        a_BT, new_BA, real_BA, lengths_B, letters=("BS", "BS", "BS", "B"))
    count_B = real_BA.sum(1)
    made = state.made._replace(tokens_BT=put(tokens_BT, new_BT), logprobs_BT=put(old_BT, logprobs_BT),
                               lengths_B=lengths_B + count_B)
    newest_B = jnp.where(index_A == count_B[:, None] - 1, new_BT, 0).sum(1)
    done_B = state.done_B | (ends_BA & real_BA).any(1) | (made.lengths_B >= length)
    return dataclasses.replace(state, made=made, newest_B=newest_B, done_B=done_B, history=history)


def _cut(cache: Cache, at, kept_B, used) -> Cache:
    """The cache with what a row did not keep as holes, going on behind what the longest row did."""
    index_S = jnp.arange(cache.slots.segments_BT.shape[1])
    hole_BS = index_S > at + kept_B[:, None]
    segments_BS = jnp.where(hole_BS, 0, cache.slots.segments_BT)
    return dataclasses.replace(cache, at=at + used, slots=dataclasses.replace(cache.slots, segments_BT=segments_BS))


def _keys(keys_B, position_B, stream: int):
    """A row's key for what is drawn at a position: the draft's token (0), whether it stands (1), the model's own (2).
    """
    return jax.vmap(lambda key, at: jax.random.fold_in(jax.random.fold_in(key, at), stream))(keys_B, position_B)
