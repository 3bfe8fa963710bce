"""Continuing prompts with a cache: one program reads the prompts at once, then writes token by token."""

from functools import partial

import jax
import jax.numpy as jnp

from lm_jax import parallel
from lm_jax.batch import Batch
from lm_jax.config import ConfigError, TransformerConfig
from lm_jax.inference.sample import Sampler, row_keys, sample


@partial(jax.jit, static_argnames=("sampler", "length", "vocab"))
def generate(model, batch: Batch, sampler: Sampler, *, length: int, key, stop: int | None = None, vocab: int = 0):
    """Up to `length` new tokens a row: int32 tokens_BT [B, length] and how many were written, lengths_B.

    `batch` holds the prompts: tokens, positions and segments [B, T], padded with segments of 0 to one width; for an
    encoder-decoder also "source", the decoder's prompt being its start token. Each row goes on from its own last token,
    and its padding is a hole in the cache that no query sees: a batch gives what its rows give alone. A row ends at the
    token `stop`, which is written and counted, and holds 0 from there on; a row of padding alone stays empty. The
    program ends when every row has.

    What is drawn depends on the row's key and on how many tokens it has written: `key` is one for the batch, which is
    folded with the row's number, or one a row [B]. `vocab` as in `sample`. Raises ConfigError where the model cannot.
    """
    B, T = batch["tokens"].shape
    _check(model.cfg, T, length)
    keys_B = row_keys(key, B)
    last_BT = _last(batch["segments"])
    end_B1 = {name: jnp.where(last_BT, batch[name], 0).sum(1, keepdims=True)
              for name in ("positions", "segments", "types") if name in batch}

    def draw(written, hidden_B1D, done_B):
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys_B, written)
        return jnp.where(done_B, 0, sample(model.logits(hidden_B1D)[:, 0], sampler, keys, vocab=vocab))

    def more(state):
        written, _, _, done_B, _ = state
        return (written < length) & ~done_B.all()

    def write(state):
        """The newest token goes into the cache, and the next one after it."""
        written, tokens_BT, lengths_B, done_B, cache = state
        token_B1 = jax.lax.dynamic_slice_in_dim(tokens_BT, written - 1, 1, axis=1)
        step = end_B1 | {"tokens": token_B1, "positions": end_B1["positions"] + written}
        hidden_B1D, cache, _ = model.hidden(step, cache=cache)
        return _append(state, draw(written, hidden_B1D, done_B), stop, cache)

    x_BTD, cache, _ = model.hidden(batch, cache=model.cache(batch, T + length - 1))  # nobody reads the last token
    hidden_B1D = jnp.where(last_BT[..., None], x_BTD, 0).sum(1, keepdims=True)
    done_B = end_B1["segments"][:, 0] == 0
    empty_BT = parallel.constrain(jnp.zeros((B, length), jnp.int32), "BS")
    state = jnp.int32(0), empty_BT, jnp.zeros_like(done_B, jnp.int32), done_B, None
    state = _append(state, draw(0, hidden_B1D, done_B), stop, cache)
    _, tokens_BT, lengths_B, _, _ = jax.lax.while_loop(more, write, state)
    return tokens_BT, lengths_B


def _append(state, token_B, stop, cache):
    """The state with one more token in each row that goes on."""
    written, tokens_BT, lengths_B, done_B, _ = state
    tokens_BT = jax.lax.dynamic_update_slice_in_dim(tokens_BT, token_B[:, None], written, axis=1)
    lengths_B += ~done_B
    done_B = done_B if stop is None else done_B | (token_B == stop)
    return written + 1, tokens_BT, lengths_B, done_B, cache


def _last(segments_BT):
    """True at each row's last token that is no padding; nowhere in a row of padding."""
    index_T = jnp.arange(segments_BT.shape[1])
    last_B = jnp.where(segments_BT > 0, index_T, -1).max(1)
    return index_T == last_B[:, None]


def _check(cfg: TransformerConfig, prompt: int, length: int):
    if not cfg.causal:
        raise ConfigError("generate with model.causal=False: a model that sees both ways cannot continue a text")
    if length < 1:
        raise ConfigError(f"generate length={length}: at least 1")
    if cfg.positions == "learned" and prompt + length - 1 > cfg.max_length:
        raise ConfigError(f"a prompt of {prompt} tokens and {length} new ones pass model.max_length={cfg.max_length} "
                          f"learned positions: at most {cfg.max_length + 1} in all")
