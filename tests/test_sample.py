"""Each filter's law is the one that its definition gives, and draws follow it; wrong numbers are named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from lm_jax.config import ConfigError
from lm_jax.inference.sample import History, Rules, law, sample, words
from lm_jax.inference.sampler import Sampler

LOGITS = np.array([1.0, 0.5, 0.0, 2.0, -1.0, 0.5, 1.5, 3.0])
GREEDY, V = Sampler(temperature=0), 8
SAMPLERS = [
    Sampler(), Sampler(temperature=2.0), Sampler(temperature=0.3), Sampler(top_k=3), Sampler(top_k=1),
    Sampler(top_k=99), Sampler(top_p=0.65), Sampler(top_p=1e-9), Sampler(min_p=0.2), Sampler(min_p=1.0),
    Sampler(temperature=2.0, top_k=6, top_p=0.9, min_p=0.25), Sampler(logit_bias={0: 2.5, 7: -np.inf}),
    Sampler(repetition_penalty=1.7), Sampler(presence_penalty=0.8), Sampler(frequency_penalty=-0.4),
    Sampler(no_repeat_ngram_size=1), Sampler(no_repeat_ngram_size=2), Sampler(no_repeat_ngram_size=3),
    Sampler(0.8, 5, 0.9, 0.05, 1.3, 0.4, 0.2, 2, {2: 3.0}),
]
PROMPT, WRITTEN = [1, 4, 4, 7], [3, 4, 4]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_the_law_is_the_definition_and_draws_follow_it(sampler):
    expected = by_definition(LOGITS, sampler, PROMPT, WRITTEN)
    rules, history = Rules.of(sampler, 1, V), remembered(1)
    logits_V = jax.jit(law)(words(jnp.asarray(LOGITS[None])), rules, history)[0]
    np.testing.assert_allclose(jax.nn.softmax(logits_V), expected, atol=1e-6)
    draws = draws_of(logits_V, 20_000)
    counts, kept = np.bincount(draws, minlength=V), expected > 0
    assert not counts[~kept].any()
    if kept.sum() > 1:
        assert stats.chisquare(counts[kept], 20_000 * expected[kept] / expected.sum()).pvalue > 1e-3


def test_rows_of_a_batch_have_their_own_samplers():
    """One program for all of them, greedy ones too; each row's law is what it would be alone."""
    samplers = [*SAMPLERS, GREEDY]
    rules = Rules.of(samplers, len(samplers), V)
    logits_BV = jax.jit(law)(jnp.broadcast_to(jnp.asarray(LOGITS, jnp.float32), (len(samplers), V)), rules,
                             remembered(len(samplers)))
    for row, sampler in zip(jax.nn.softmax(logits_BV), samplers):
        np.testing.assert_allclose(row, by_definition(LOGITS, sampler, PROMPT, WRITTEN), atol=1e-6)


def test_filters_of_a_large_vocabulary_are_those_of_a_sorted_one(rng):
    logits_BV = rng.normal(size=(4, 5000)).astype(np.float32) * 2
    samplers = [Sampler(top_k=40), Sampler(top_p=0.9), Sampler(top_k=100, top_p=0.7), Sampler(0.7, min_p=0.01)]
    found_BV = jax.nn.softmax(jax.jit(law)(jnp.asarray(logits_BV), Rules.of(samplers, 4, 5000)))
    for found_V, logits_V, sampler in zip(found_BV, logits_BV, samplers):
        expected = by_definition(logits_V, sampler, [], [])
        assert (np.asarray(found_V) > 0).sum() == (expected > 0).sum() > 5
        np.testing.assert_allclose(found_V, expected, atol=1e-6)


def test_nothing_that_would_be_a_repeat_is_left(rng):
    """Texts of few ids, padded anywhere, of which each row forbids repeats of another length, also longer than it."""
    rows, room = 60, 9
    real_BT, tokens_BT = rng.random((rows, 7)) < 0.8, rng.integers(0, 3, (rows, 7))
    sizes, written_BT = rng.integers(0, 5, rows), rng.integers(0, 3, (rows, room - 1))
    rules = Rules.of([Sampler(no_repeat_ngram_size=int(n)) for n in sizes], rows, 4)
    history = History.of(jnp.asarray(tokens_BT), jnp.asarray(real_BT, jnp.int32), 4, room=room)
    seen = set()
    for at in range(room):
        kept_BV = np.isfinite(jax.jit(law)(jnp.zeros((rows, 4)), rules, history))
        for row, size in enumerate(sizes):
            text = [*tokens_BT[row][real_BT[row]], *written_BT[row, :at]]
            assert set(np.flatnonzero(~kept_BV[row])) == repeated(text, size), (text, size)
            seen.add((int(size), int((~kept_BV[row]).sum())))
        history = history.add(jnp.asarray(written_BT[:, at % (room - 1)]), jnp.ones(rows, bool))
    assert {(0, 0), (1, 3), (2, 0), (2, 3), (3, 1), (4, 1)} <= seen


def test_equals_are_kept_or_dropped_together():
    tied_BV = jnp.asarray([[2.0, 1.0, 1.0, 1.0, 0.0]])
    kept = lambda sampler: np.isfinite(law(tied_BV, Rules.of(sampler, 1, 5))[0]).tolist()
    assert kept(Sampler(top_k=2)) == kept(Sampler(top_p=0.6)) == [True] * 4 + [False]
    assert int(sample(tied_BV.at[0, 3].set(2.0), GREEDY, jax.random.key(0))[0]) == 0  # the first of the likeliest


def test_other_numbers_are_the_same_program():
    counted = jax.jit(lambda logits, rules: law(logits, rules))
    logits_BV = jnp.asarray(LOGITS[None], jnp.float32)
    for sampler in (Sampler(0.5, top_k=3), Sampler(0.7, top_k=5), Sampler(1.3, top_k=1)):
        counted(logits_BV, Rules.of(sampler, 1, V))
    assert counted._cache_size() == 1


def test_padding_of_the_table_is_never_drawn():
    logits_BV = jnp.broadcast_to(jnp.asarray(LOGITS), (500, V))
    for sampler in (GREEDY, Sampler(), Sampler(top_k=8), Sampler(top_p=0.99)):
        assert sample(logits_BV, sampler, jax.random.key(0), vocab=7).max() < 7


@pytest.mark.parametrize("knobs, said", [
    (dict(temperature=-1.0), "temperature=-1.0"), (dict(temperature=np.nan), "temperature=nan"),
    (dict(top_k=-2), "top_k=-2"), (dict(top_p=0.0), "top_p=0.0"), (dict(top_p=1.5), "top_p=1.5"),
    (dict(min_p=-0.1), "min_p=-0.1"), (dict(repetition_penalty=0.0), "repetition_penalty=0.0"),
    (dict(presence_penalty=np.inf), "presence_penalty=inf"), (dict(logit_bias={-1: 2.0}), "-1: 2.0"),
    (dict(logit_bias={1: np.inf}), "1: inf"), (dict(no_repeat_ngram_size=-1), "no_repeat_ngram_size=-1")], ids=str)
def test_a_number_that_no_sampler_has_is_named(knobs, said):
    with pytest.raises(ConfigError, match=said):
        Sampler(**knobs)


def test_what_does_not_fit_the_batch_is_named():
    with pytest.raises(ConfigError, match="2 samplers for 3 rows"):
        Rules.of([GREEDY, GREEDY], 3, V)
    with pytest.raises(ConfigError, match="id 8, and the vocabulary ends at 7"):
        Rules.of(Sampler(logit_bias={8: 1.0}), 1, V)


def by_definition(logits, sampler, prompt, written):
    """The law in plain numpy, token by token and sorted."""
    x = np.array(logits, np.float64)
    for id, add in sampler.logit_bias:
        x[id] += add
    for id in set(prompt) | set(written):
        x[id] = x[id] / sampler.repetition_penalty if x[id] > 0 else x[id] * sampler.repetition_penalty
    for id in set(written):
        x[id] -= sampler.presence_penalty + sampler.frequency_penalty * written.count(id)
    for id in repeated([*prompt, *written], sampler.no_repeat_ngram_size):
        x[id] = -np.inf
    if sampler.temperature == 0:
        return np.eye(len(x))[x.argmax()]
    x /= sampler.temperature
    if sampler.top_k:
        x[x < np.sort(x)[-min(sampler.top_k, len(x))]] = -np.inf
    probs = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
    held, least = 0.0, 0.0
    for prob in np.sort(probs)[::-1]:
        if held >= sampler.top_p:
            break
        held, least = held + prob, prob
    probs[(probs < least) | (probs < sampler.min_p * probs.max() * (1 - 1e-6))] = 0
    return probs / probs.sum()


def repeated(text, size):
    """The ids that would make `size` tokens of a text come again."""
    last = text[len(text) - size + 1:]
    return {text[i + size - 1] for i in range(len(text) - size + 1) if text[i:i + size - 1] == last} if size else set()


def remembered(rows: int) -> History:
    repeat = lambda ids: jnp.broadcast_to(jnp.asarray(ids), (rows, len(ids)))
    history = History.of(repeat([*PROMPT, 6]), repeat([1, 1, 1, 1, 0]), V, room=len(WRITTEN) + 1)  # the 6 is padding
    for token in WRITTEN:
        history = history.add(jnp.full(rows, token), jnp.ones(rows, bool))
    return history.add(jnp.full(rows, 0), jnp.zeros(rows, bool))  # a row that has ended


def draws_of(logits_V, count: int):
    rows = jnp.broadcast_to(logits_V, (count, V))
    return np.asarray(jax.jit(lambda rows, key: sample(rows, Sampler(), key))(rows, jax.random.key(0)))
