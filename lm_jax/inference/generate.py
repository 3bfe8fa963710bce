"""Continuing prompts with a cache: one program reads the prompts at once, then writes token by token."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax import parallel
from lm_jax.batch import Batch
from lm_jax.config import ConfigError
from lm_jax.inference.sample import History, Rules, pick, row_keys, words
from lm_jax.inference.sampler import Sampler
from lm_jax.models.stack import Cache
from lm_jax.models.transformer import Transformer, apart


class Generated(NamedTuple):
    """Continuations of a batch: int32 tokens_BT, how many of each row are its own (the rest is 0), and their
    log-probabilities under the model itself, over all ids of its table, before any bias, penalty, temperature or
    filter."""

    tokens_BT: jax.Array
    lengths_B: jax.Array
    logprobs_BT: jax.Array


def generate(model: Transformer, batch: Batch, sampler: Sampler | Sequence[Sampler] = Sampler(), *, length: int, key,
             stop: int | Sequence[int] | None = (), vocab: int = 0) -> Generated:
    """Up to `length` new tokens a row.

    `batch` holds the prompts: tokens, positions and segments [B, T], padded with segments of 0 to one width; for an
    encoder-decoder also "source", the decoder's prompt being its start token. Each row goes on from its own last token,
    and its padding is a hole in the cache that no query sees: a batch gives what its rows give alone. A row ends at the
    first token that is in `stop`, which is written and counted; a row of padding alone stays empty. The program ends
    when every row has.

    `sampler` is one for all rows, or one a row. What is drawn depends on the row's key and on how many tokens it has
    written: `key` is one for the batch, which is folded with the row's number, or one a row [B]. With `vocab` > 0 only
    ids below it are drawn. Raises ConfigError where the model cannot.

    What is written is what full passes would write, with one exception: a `rope.scaling` of "dynamic" turns by the
    length at hand, and past the length trained on keys stay in the cache as they were turned when they were read. So do
    those of transformers, whose greedy text this is there too.
    """
    rules, stops = asked(model, batch, sampler, length=length, stop=stop, vocab=vocab)
    keys_B = row_keys(key, batch["tokens"].shape[0])
    return _generate(model, batch, rules, keys_B, stops, length=length, vocab=vocab)


def asked(model, batch: Batch, sampler, *, length: int, stop, vocab: int) -> tuple[Rules, np.ndarray]:
    """The rules of a batch's rows and its stop ids, once it is sure that the model can do what is asked."""
    cfg, (B, T) = model.cfg, batch["tokens"].shape
    if not cfg.causal:
        raise ConfigError("generate with model.causal=False: a model that sees both ways cannot continue a text")
    if cfg.head != "lm":
        raise ConfigError(f"generate with model.head={cfg.head!r}: a text wants a head over the vocabulary, 'lm'")
    if T < 1 or B < 1:
        raise ConfigError(f"generate of {B} prompts of {T} tokens: at least one of one token, such as the text's start")
    if length < 1:
        raise ConfigError(f"generate length={length}: at least 1")
    if vocab > cfg.vocab:
        raise ConfigError(f"vocab={vocab} and the model has {cfg.vocab} tokens: they are not of the same tokenizer")
    prompt = extent(batch)
    if cfg.positions == "learned" and prompt + length - 1 > cfg.max_length:
        raise ConfigError(f"a prompt of {prompt} tokens and {length} new ones pass model.max_length={cfg.max_length} "
                          f"learned positions: at most {cfg.max_length + 1} in all")
    read = 0 if "source" not in batch else extent(batch["source"])
    if cfg.positions == "learned" and read > cfg.max_length:
        raise ConfigError(f"a source of {read} tokens passes model.max_length={cfg.max_length} learned positions: "
                          "cut it")
    stops = np.array([], np.int32) if stop is None else np.atleast_1d(np.array(stop, np.int32))
    return Rules.of(sampler, B, cfg.vocab), stops


def extent(batch: Batch) -> int:
    """How many positions a batch takes; in a program, where numbers are unknown, those of a whole row."""
    places = batch["positions"]
    return places.shape[1] if isinstance(places, jax.core.Tracer) else int(np.max(places)) + 1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Writing:
    """A batch that is being continued: what it has by now, and what it takes to go on."""

    written: jax.Array  # tokens of the rows that go on
    made: Generated
    done_B: jax.Array
    history: History | None  # where some row's sampler looks back
    end_B1: Batch  # where each prompt's last token stands
    cache: Cache


def begin(model, batch: Batch, rules: Rules, keys_B, stops_A, *, length: int, vocab: int = 0) -> Writing:
    """Read the prompts and write each row's first token."""
    (B, T), V = batch["tokens"].shape, model.cfg.vocab
    cache, last_B1D, end_B1 = prefill(model, batch, T + length - 1)  # nobody reads the last token
    empty = lambda dtype: parallel.constrain(jnp.zeros((B, length), dtype), "BS")
    made = Generated(empty(jnp.int32), jnp.zeros_like(end_B1["segments"][:, 0]), empty(jnp.float32))
    history = rules.history(batch, V, room=length)
    state = Writing(jnp.int32(0), made, end_B1["segments"][:, 0] == 0, history, end_B1, cache)
    return _append(model, state, last_B1D, rules, keys_B, stops_A, vocab)


def advance(model, state: Writing, rules: Rules, keys_B, stops_A, *, until, vocab: int = 0) -> Writing:
    """Write on until rows have `until` tokens, or all have ended."""

    def write(state):
        """The newest token goes into the cache, and the next one after it."""
        newest_B1 = jax.lax.dynamic_slice_in_dim(state.made.tokens_BT, state.written - 1, 1, axis=1)
        places = {"positions": state.end_B1["positions"] + state.written, "tokens": newest_B1}
        hidden_B1D, cache, _ = model.hidden(state.end_B1 | places, cache=state.cache)
        state = dataclasses.replace(state, cache=cache)
        return _append(model, state, hidden_B1D, rules, keys_B, stops_A, vocab)

    return jax.lax.while_loop(lambda state: (state.written < until) & ~state.done_B.all(), write, state)


def prefill(model, batch: Batch, slots: int):
    """A cache of so many slots that holds the prompts, the hidden state of each row's last token, and where that is."""
    last_BT = _last(batch["segments"])
    end_B1 = {name: jnp.where(last_BT, batch[name], 0).sum(1, keepdims=True)
              for name in ("positions", "segments", "types") if name in batch}
    x_BTD, cache, _ = model.hidden(batch, cache=model.cache(batch, slots))
    return cache, jnp.where(last_BT[..., None], x_BTD, 0).sum(1, keepdims=True), end_B1


def stopped(token_B, stops_A):
    """Whether a token is one that ends its row."""
    return (token_B[:, None] == stops_A).any(1)


def ready(model: Transformer) -> Transformer:
    """The model as it decodes best where programs run; for who decodes often: `generate` does it each time."""
    return apart(model) if parallel.on_cpu() else model


@partial(jax.jit, static_argnames=("length", "vocab"))
def _generate(model, batch, rules, keys_B, stops_A, *, length, vocab):
    model = ready(model)
    state = begin(model, batch, rules, keys_B, stops_A, length=length, vocab=vocab)
    return advance(model, state, rules, keys_B, stops_A, until=length, vocab=vocab).made


def _append(model, state: Writing, hidden_B1D, rules, keys_B, stops_A, vocab) -> Writing:
    """The state with one more token in each row that goes on."""
    at, (tokens_BT, lengths_B, logprobs_BT) = state.written, state.made
    keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, at)
    logits_BV = words(model.logits(hidden_B1D)[:, 0])
    token_B = jnp.where(state.done_B, 0, pick(words(logits_BV, vocab), rules, keys_B, state.history))
    logprob_B = jnp.where(state.done_B, 0, chosen(jax.nn.log_softmax(logits_BV), token_B))
    put = lambda old_BT, new_B: jax.lax.dynamic_update_slice_in_dim(old_BT, new_B[:, None], at, axis=1)
    made = Generated(put(tokens_BT, token_B), lengths_B + ~state.done_B, put(logprobs_BT, logprob_B))
    history = state.history and state.history.add(token_B, ~state.done_B)
    done_B = state.done_B | stopped(token_B, stops_A)
    return dataclasses.replace(state, written=at + 1, made=made, done_B=done_B, history=history)


def chosen(values_BV, token_B):
    """Each row's value of its token."""
    return jnp.where(jnp.arange(values_BV.shape[1]) == token_B[:, None], values_BV, 0).sum(1)


def _last(segments_BT):
    """True at each row's last token that is no padding; nowhere in a row of padding."""
    index_T = jnp.arange(segments_BT.shape[1])
    last_B = jnp.where(segments_BT > 0, index_T, -1).max(1)
    return index_T == last_B[:, None]
