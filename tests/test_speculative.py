"""A draft changes how fast text is written and not what: greedy rows to the token, others in distribution."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy import stats

from lm_jax import hosts, parallel
from lm_jax.config import ConfigError, MeshConfig, RopeConfig
from lm_jax.inference.generate import generate
from lm_jax.inference.sampler import Sampler
from lm_jax.inference.speculative import speculate

V = 5
SETTINGS = dict(vocab=V, width=16, heads=2, hidden=32, dtype="float32", max_length=40)
GREEDY = Sampler(temperature=0)


@pytest.fixture(scope="module")
def pair():
    """A model, and a draft that is it with other numbers added: often right and often wrong."""
    model = tiny.model(**SETTINGS, depth=1)
    return model, changed(model)


def changed(model):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda w: w + jnp.asarray(0.1 * rng.normal(size=w.shape), w.dtype), model)


def prompts(sizes):
    real_BT = np.arange(max(sizes)) < np.array(sizes)[:, None]
    tokens_BT = np.random.default_rng(2).integers(0, V, real_BT.shape)
    return {name: jnp.asarray(np.where(real_BT, x, 0), jnp.int32)
            for name, x in dict(tokens=tokens_BT, positions=np.arange(max(sizes)), segments=1).items()}


def test_greedy_rows_are_plain_greedy_token_for_token(pair):
    """Rows of unequal prompts that keep unequal parts of their drafts, one of padding alone, and a stop token."""
    batch, knobs = prompts([4, 2, 0, 3, 6]), dict(length=20, key=jax.random.key(0), stop=3)
    plain = generate(pair[0], batch, GREEDY, **knobs)
    drafted = speculate(*pair, batch, GREEDY, ahead=3, **knobs)
    jax.tree.map(np.testing.assert_array_equal, drafted[:2], plain[:2])
    np.testing.assert_allclose(drafted.logprobs_BT, plain.logprobs_BT, atol=1e-4)
    once = Sampler(temperature=0, no_repeat_ngram_size=2)
    plain, drafted = generate(pair[0], batch, once, **knobs), speculate(*pair, batch, once, ahead=3, **knobs)
    np.testing.assert_array_equal(drafted.tokens_BT, plain.tokens_BT)
    few = [write(batch=batch, sampler=GREEDY, vocab=3, **knobs).logprobs_BT
           for write in (partial(generate, pair[0]), partial(speculate, *pair, ahead=3))]
    np.testing.assert_allclose(*few, atol=1e-4)  # both over all ids, also where few may be drawn
    free = speculate(*pair, batch, GREEDY, ahead=3, length=20, key=jax.random.key(0))
    shares = np.asarray(free.kept_B / np.maximum(free.drafted_B, 1))
    assert 0 < shares.max() and shares[[0, 1, 3, 4]].min() < 1 and len(set(shares)) > 2  # or nothing would be shown


def test_a_row_of_a_batch_is_what_it_is_alone(pair):
    batch, keys_B = prompts([4, 2, 5]), jax.random.split(jax.random.key(3), 3)
    sampler = Sampler(0.9, top_k=4, frequency_penalty=0.3, no_repeat_ngram_size=3)
    together = speculate(*pair, batch, sampler, length=12, ahead=3, key=keys_B)
    alone = speculate(*pair, {k: x[1:2, :2] for k, x in batch.items()}, sampler, length=12, ahead=3, key=keys_B[1:2])
    assert (together.tokens_BT[1] == alone.tokens_BT[0]).all() and together.kept_B[1] == alone.kept_B[0]


def test_a_mesh_drafts_and_keeps_the_same(pair):
    batch, keys_B = prompts([4, 2, 0, 3, 6, 1, 5, 2]), jax.random.split(jax.random.key(4), 8)
    samplers = [GREEDY, Sampler(0.9, top_k=4, frequency_penalty=0.3, no_repeat_ngram_size=3)] * 4
    knobs = dict(length=10, ahead=3, key=keys_B, stop=3)
    expected = speculate(*pair, batch, samplers, **knobs)
    with jax.set_mesh(parallel.make_mesh(MeshConfig(data=2, fsdp=1, sequence=2, model=2))):
        found = speculate(*map(tiny.on_mesh, pair), hosts.put_batch(jax.tree.map(np.asarray, batch)), samplers, **knobs)
    for one, other in zip(found, expected):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_a_draft_that_is_the_model_is_always_kept(pair):
    made = speculate(pair[0], pair[0], prompts([3, 4]), Sampler(), length=12, ahead=3, key=jax.random.key(1))
    assert (made.kept_B == made.drafted_B).all() and (made.drafted_B > 0).all()


@pytest.mark.parametrize("sampler", [Sampler(), Sampler(0.8, top_k=4, top_p=0.9, presence_penalty=0.5)], ids=str)
def test_what_is_written_follows_the_models_law(pair, sampler):
    """All texts of three tokens, counted, against their probabilities by full passes."""
    rows, length = 4000, 3
    batch = jax.tree.map(lambda x: jnp.repeat(x, rows, 0), prompts([2]))
    made = speculate(*pair, batch, sampler, length=length, ahead=2, key=jax.random.key(7))
    counts = np.bincount(np.asarray(made.tokens_BT) @ V ** np.arange(length)[::-1], minlength=V**length)
    expected = text_probabilities(pair[0], np.asarray(prompts([2])["tokens"][0]), sampler, length)
    assert counts[expected == 0].sum() == 0
    rare = expected * rows < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum()) * rows
    keep = wanted > 0
    assert stats.chisquare(observed[keep], wanted[keep] * rows / wanted.sum()).pvalue > 1e-3
    assert 0.1 < made.kept_B.sum() / made.drafted_B.sum() < 0.95


def test_what_cannot_be_drafted_says_why(pair):
    other = tiny.model(**SETTINGS | dict(vocab=7), depth=1)
    go = partial(speculate, pair[0], batch=prompts([3]), length=4, key=jax.random.key(0))
    with pytest.raises(ConfigError, match="7 tokens and the model 5"):
        go(other)
    with pytest.raises(ConfigError, match="ahead=0"):
        go(pair[1], ahead=0)


@pytest.mark.parametrize("rows", [V + 2, V + 5])
def test_a_draft_whose_table_is_padded_otherwise_changes_nothing(rows):
    """Greedy rows and log-probabilities are the model's, under all that looks back at ids; no padding is drawn."""
    of = lambda rows: tiny.model(**SETTINGS | dict(vocab=rows), depth=1)
    model, draft, batch = of(V + 3), changed(of(rows)), prompts([4, 2, 5])
    batch["tokens"] = batch["tokens"].at[0, 1].set(V + 2)  # an id that is no word, and may be none of the draft's table
    greedy = Sampler(0, logit_bias={1: 0.5}, repetition_penalty=1.3, no_repeat_ngram_size=3)
    knobs = dict(length=12, key=jax.random.key(0), vocab=V)
    plain, drafted = generate(model, batch, greedy, **knobs), speculate(model, draft, batch, greedy, ahead=3, **knobs)
    jax.tree.map(np.testing.assert_array_equal, drafted[:2], plain[:2])
    np.testing.assert_allclose(drafted.logprobs_BT, plain.logprobs_BT, atol=1e-4)
    drawn = speculate(model, draft, batch, Sampler(), ahead=3, **knobs)
    assert drawn.tokens_BT.max() < V and 0 < drawn.kept_B.sum() < drawn.drafted_B.sum()
    with pytest.raises(ConfigError, match=f"the draft has {rows} tokens and the model {V + 3}: .* pass vocab"):
        speculate(model, draft, batch, greedy, length=4, key=jax.random.key(0))


def test_a_dynamic_rope_is_drafted_for_as_far_as_it_does_not_stretch(pair):
    rope = RopeConfig(scaling="dynamic", factor=2.0, original=12)
    model, batch = tiny.model(**SETTINGS, depth=1, rope=rope), prompts([3, 2])
    knobs = dict(length=7, key=jax.random.key(0))
    drafted = speculate(model, pair[1], batch, GREEDY, ahead=3, **knobs)
    np.testing.assert_array_equal(drafted.tokens_BT, generate(model, batch, GREEDY, **knobs).tokens_BT)
    with pytest.raises(ConfigError, match="rope.scaling='dynamic' up to 13 tokens, of 12 trained on: .* use generate"):
        speculate(model, pair[1], batch, GREEDY, ahead=4, **knobs)


def text_probabilities(model, prompt, sampler, length):
    """Of every text of so many tokens, in the order of counting."""
    texts = np.array(list(itertools.product(range(V), repeat=length)))
    rows = np.concatenate([np.broadcast_to(prompt, (len(texts), len(prompt))), texts], 1)
    batch = {"tokens": rows, "positions": np.broadcast_to(np.arange(rows.shape[1]), rows.shape),
             "segments": np.ones_like(rows)}
    logits_BTV = np.asarray(jax.jit(lambda model, batch: model(batch))(model, batch), np.float64)
    total = np.ones(len(texts))
    for i in range(length):
        for row, text in enumerate(texts):
            total[row] *= law_of(logits_BTV[row, len(prompt) - 1 + i], sampler, text[:i])[text[i]]
    return total


def law_of(logits, sampler, written):
    x = logits.copy()
    for id in set(written):
        x[id] -= sampler.presence_penalty
    x /= sampler.temperature
    if sampler.top_k:
        x[x < np.sort(x)[-sampler.top_k]] = -np.inf
    probs = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
    order = np.argsort(-probs)
    before = np.cumsum(probs[order]) - probs[order]
    probs[order[before >= sampler.top_p]] = 0
    return probs / probs.sum()
