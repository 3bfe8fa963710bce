"""Drawing tokens from logits: the law that follows from what the requests of a batch ask for."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax import parallel
from lm_jax.batch import Batch
from lm_jax.errors import ConfigError
from lm_jax.inference.sampler import Sampler


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rules:
    """The samplers of a batch's rows as arrays; None for what no row asks for, which its program then lacks."""

    temperature_B: jax.Array | None = None  # None: every row is greedy
    top_k_B: jax.Array | None = None
    top_p_B: jax.Array | None = None
    min_p_B: jax.Array | None = None
    repetition_penalty_B: jax.Array | None = None
    presence_penalty_B: jax.Array | None = None
    frequency_penalty_B: jax.Array | None = None
    no_repeat_ngram_size_B: jax.Array | None = None
    bias_BV: jax.Array | None = None

    @classmethod
    def of(cls, sampler: Sampler | Sequence[Sampler], rows: int, vocab: int) -> "Rules":
        """Of one sampler for all rows, or one a row; `vocab` is how many logits there are."""
        samplers = [sampler] * rows if isinstance(sampler, Sampler) else list(sampler)
        if len(samplers) != rows:
            raise ConfigError(f"{len(samplers)} samplers for {rows} rows: one for all, or one a row")
        asked = {}
        for field in dataclasses.fields(Sampler)[:-1]:
            values = [getattr(one, field.name) for one in samplers]
            idle = 0 if field.name == "temperature" else field.default
            kind = np.int32 if field.type is int else np.float32
            asked[f"{field.name}_B"] = np.array(values, kind) if any(value != idle for value in values) else None
        return cls(**asked, bias_BV=_bias(samplers, vocab))

    def history(self, batch: Batch, vocab: int, *, room: int) -> "History | None":
        """Of prompts that go on for at most `room` tokens; None where the law does not depend on the tokens so far."""
        penalties = self.repetition_penalty_B, self.presence_penalty_B, self.frequency_penalty_B
        repeats = self.no_repeat_ngram_size_B is not None
        if repeats or any(one is not None for one in penalties):
            return History.of(batch["tokens"], batch["segments"], vocab, room=room if repeats else 0)
        return None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class History:
    """What the law looks back at: which ids a row's prompt has, and how often its continuation has each; and, where
    nothing may be repeated, its `text`, of which the next token is the one `at`."""

    prompt_BV: jax.Array
    counts_BV: jax.Array
    text_BS: jax.Array | None
    at_B: jax.Array

    @classmethod
    def of(cls, tokens_BT, segments_BT, vocab: int, *, room: int = 0) -> "History":
        """Of prompts; their text is kept if there is `room` for more."""
        found = lambda ids_T, segments_T: jnp.zeros(vocab, bool).at[jnp.where(segments_T > 0, ids_T, vocab)].set(
            True, mode="drop")
        prompt_BV = parallel.per_shard(jax.vmap(found), tokens_BT, segments_BT, letters=("BS", "BS"))
        at_B = parallel.constrain(jnp.full(len(tokens_BT), tokens_BT.shape[1]), "B")
        text_BS = aligned(tokens_BT, segments_BT, room=room) if room else None
        return cls(prompt_BV, jnp.zeros_like(prompt_BV, jnp.int32), text_BS, at_B)

    def add(self, token_B, real_B) -> "History":
        """With one more token in the rows where it is `real`."""
        new_BV = (jnp.arange(self.counts_BV.shape[1]) == token_B[:, None]) & real_B[:, None]
        text_BS = self.text_BS
        if text_BS is not None:
            here_BS = (jnp.arange(text_BS.shape[1]) == self.at_B[:, None]) & real_B[:, None]
            text_BS = jnp.where(here_BS, token_B[:, None], text_BS)
        return dataclasses.replace(self, counts_BV=self.counts_BV + new_BV, text_BS=text_BS, at_B=self.at_B + real_B)


def sample(logits_BV, sampler, key, *, vocab: int = 0):
    """One token id a row, int32 [B], of a Sampler, or one a row. With `vocab` > 0 only ids below it are drawn: the
    table's rest is padding. `key` is one for the batch or, [B], one a row: a row depends on its own key and logits."""
    rules = Rules.of(sampler, *logits_BV.shape)
    return pick(words(logits_BV, vocab), rules, row_keys(key, logits_BV.shape[0]))


def pick(logits_BV, rules: Rules, keys_B, history: History | None = None):
    """One token id a row, int32 [B], of `words`."""
    logits_BV = law(logits_BV, rules, history)
    return draw(logits_BV, keys_B) if rules.temperature_B is not None else logits_BV.argmax(-1).astype(jnp.int32)


def words(logits_BV, vocab: int = 0):
    """Logits in float32, each device seeing all tokens of its rows, and those of the table's padding at -inf."""
    logits_BV = parallel.constrain(logits_BV.astype(jnp.float32), "BA")
    return jnp.where(jnp.arange(logits_BV.shape[1]) < vocab, logits_BV, -jnp.inf) if vocab else logits_BV


def law(logits_BV, rules: Rules, history: History | None = None):
    """The logits of what may be drawn, -inf for what may not: softmax of them is the law. Greedy rows have one token.
    """
    logits_BV = logits_BV if rules.bias_BV is None else logits_BV + rules.bias_BV
    logits_BV = logits_BV if history is None else _penalised(logits_BV, rules, history)
    if rules.no_repeat_ngram_size_B is not None:
        again_BV = repeats(history.text_BS, history.at_B, rules.no_repeat_ngram_size_B, logits_BV)
        logits_BV = jnp.where(again_BV, -jnp.inf, logits_BV)
    best_BV = jnp.arange(logits_BV.shape[1]) == logits_BV.argmax(-1, keepdims=True)
    likeliest_BV = jnp.where(best_BV, 0.0, -jnp.inf)
    if rules.temperature_B is None:
        return likeliest_BV
    cold_B1 = rules.temperature_B[:, None] == 0
    logits_BV /= jnp.where(cold_B1, 1, rules.temperature_B[:, None])
    if rules.top_k_B is not None:
        k_B = jnp.where(rules.top_k_B == 0, logits_BV.shape[1], rules.top_k_B)
        logits_BV = _heaviest(logits_BV, jnp.ones_like(logits_BV), k_B.astype(jnp.float32))
    if rules.top_p_B is not None:
        p_B = jnp.where(rules.top_p_B == 1, 2, rules.top_p_B)  # which nothing reaches, so that all are kept
        logits_BV = _heaviest(logits_BV, jax.nn.softmax(logits_BV), p_B)
    if rules.min_p_B is not None:
        least_B1 = logits_BV.max(-1, keepdims=True) + jnp.log(rules.min_p_B[:, None])
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    return jnp.where(cold_B1, likeliest_BV, logits_BV)


def draw(logits_BV, keys_B):
    """Ids int32 [B] by the Gumbel maximum: argmax(logits + noise) follows softmax(logits)."""
    noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BV.shape[1:]))(keys_B)
    return (logits_BV + noise_BV).argmax(-1).astype(jnp.int32)


def row_keys(key, rows: int):
    """A key a row [B]: `key` itself if it is that already, else `key` folded with the row's number."""
    return key if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))


def aligned(tokens_BT, segments_BT, *, room: int):
    """Prompts without their padding, each up to the last of T places, and behind them `room`; nothing is -1."""
    def moved(tokens_T, segments_T):
        order_T = jnp.argsort(segments_T > 0, stable=True)
        return jnp.where(segments_T > 0, tokens_T, -1)[order_T]

    text_BT = parallel.per_shard(jax.vmap(moved), tokens_BT, segments_BT, letters=("BS", "BS"))
    return jnp.pad(text_BT, ((0, 0), (0, room)), constant_values=-1)


def repeats(text_BS, at_B, size_B, like_BV):
    """True at the ids that, as the next of its row, would make `size` tokens of it come a second time."""
    def found(like_V, text_S, at, size):
        def agrees(back, same_S):
            """Where what stands so far before is what stands so far before the next token."""
            last = jnp.where(at > back, text_S[at - 1 - back], -1)
            return same_S & (jnp.roll(text_S, 1 + back) == last) & (last >= 0)

        again_S = jax.lax.fori_loop(0, size - 1, agrees, text_S >= 0)  # the last of a text is -1: nothing goes round
        ids_S = jnp.where(again_S & (size > 0), text_S, len(like_V))
        return jnp.zeros(len(like_V), bool).at[ids_S].set(True, mode="drop")

    return parallel.per_shard(jax.vmap(found), like_BV, text_BS, at_B, size_B, letters=("BA", "BS", "B", "B"))


def _penalised(logits_BV, rules, history):
    had_BV = history.counts_BV > 0
    if rules.repetition_penalty_B is not None:
        by_B1 = rules.repetition_penalty_B[:, None]
        rarer_BV = jnp.where(logits_BV > 0, logits_BV / by_B1, logits_BV * by_B1)
        logits_BV = jnp.where(had_BV | history.prompt_BV, rarer_BV, logits_BV)
    if rules.presence_penalty_B is not None:
        logits_BV -= jnp.where(had_BV, rules.presence_penalty_B[:, None], 0)
    if rules.frequency_penalty_B is not None:
        logits_BV -= rules.frequency_penalty_B[:, None] * history.counts_BV
    return logits_BV


def _heaviest(logits_BV, weights_BV, enough_B):
    """The fewest largest logits whose weights add up to `enough`, or all if they do not; the others become -inf.

    The 32 bits of the least that is kept are found one by one: sorting a vocabulary takes longer, on any machine.
    """
    bits_BV = jax.lax.bitcast_convert_type(logits_BV, jnp.uint32)
    rank_BV = jnp.where(bits_BV >> 31 == 1, ~bits_BV, bits_BV | np.uint32(1 << 31))  # in the order of the numbers

    def settle(i, least_B):
        higher_B = least_B | jnp.uint32(1) << (31 - i).astype(jnp.uint32)
        held_B = jnp.where(rank_BV >= higher_B[:, None], weights_BV, 0).sum(-1)
        return jnp.where(held_B >= enough_B, higher_B, least_B)

    least_B = jax.lax.fori_loop(0, 32, settle, jnp.zeros_like(rank_BV[:, 0]))
    return jnp.where(rank_BV >= least_B[:, None], logits_BV, -jnp.inf)


def _bias(samplers, vocab):
    if not any(one.logit_bias for one in samplers):
        return None
    bias_BV = np.zeros((len(samplers), vocab), np.float32)
    for row, one in zip(bias_BV, samplers):
        for id, add in one.logit_bias:
            if id >= vocab:
                raise ConfigError(f"logit_bias has id {id}, and the vocabulary ends at {vocab - 1}")
            row[id] += add
    return bias_BV
