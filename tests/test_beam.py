"""Beam search: one as wide as all texts finds the best of them, a narrow one what its definition finds."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lm_jax import hosts, parallel
from lm_jax.config import ConfigError, MeshConfig
from lm_jax.inference import beam

V, LENGTH, STOPS = 4, 4, (2,)
PROMPTS = [[1, 3, 0], [2, 1], [3]]


@pytest.fixture(scope="module")
def model():
    return tiny.model(vocab=V, width=16, heads=2, hidden=32, depth=1, dtype="float32")


@pytest.fixture(scope="module")
def logprobs(model):
    """For each prompt, of every text: the log-probability of each of its tokens."""
    texts = list(itertools.product(range(V), repeat=LENGTH))
    forward = jax.jit(lambda model, batch: jax.nn.log_softmax(model(batch)))
    found = []
    for prompt in PROMPTS:
        rows = forward(model, batch([prompt + list(text) for text in texts]))[:, len(prompt) - 1:]
        each = zip(texts, np.array(rows))
        found.append({text: [float(row[i, id]) for i, id in enumerate(text)] for text, row in each})
    return found


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.5, -1.0])
def test_a_search_as_wide_as_all_texts_finds_the_best(model, logprobs, penalty):
    """27 beams hold every text of three tokens that goes on."""
    found = beam.search(model, batch(PROMPTS), beams=27, length=LENGTH, stop=STOPS, length_penalty=penalty)
    for row, of_texts in enumerate(logprobs):
        scores = {}
        for text, each in of_texts.items():
            n = next((i + 1 for i, id in enumerate(text) if id in STOPS), LENGTH)
            scores[text[:n]] = sum(each[:n]) / n**penalty
        best = sorted(scores, key=scores.get, reverse=True)[:27]
        np.testing.assert_allclose(found.scores_BW[row], [scores[text] for text in best], atol=1e-4)
        assert written(found, row, 0) == best[0]


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_a_narrow_search_is_the_definition(model, logprobs, penalty):
    found = beam.search(model, batch(PROMPTS), beams=2, length=LENGTH, stop=STOPS, length_penalty=penalty)
    for row, of_texts in enumerate(logprobs):
        expected = by_definition(of_texts, 2, penalty)
        assert [written(found, row, beam) for beam in range(2)] == [text for _, text in expected]
        np.testing.assert_allclose(found.scores_BW[row], [score for score, _ in expected], atol=1e-4)


@pytest.mark.parametrize("penalty", [0.0, 2.5])
def test_an_early_end_and_a_least_length_are_their_definition(model, logprobs, penalty):
    """Each alone and both; somewhere each changes what is found."""
    plain, *others = ([by_definition(of_texts, 2, penalty, least, early) for of_texts in logprobs]
                      for least, early in ((0, False), (3, False), (0, True), (2, True)))
    assert others[0] != plain and (others[1] != plain or not penalty)
    for (least, early), expected in zip(((3, False), (0, True), (2, True)), others):
        found = beam.search(model, batch(PROMPTS), beams=2, length=LENGTH, stop=STOPS, length_penalty=penalty,
                            least=least, early=early)
        for row, best in enumerate(expected):
            assert [written(found, row, beam) for beam in range(2)] == [text for _, text in best]
            np.testing.assert_allclose(found.scores_BW[row], [score for score, _ in best], atol=1e-4)


@pytest.mark.parametrize("size", [1, 2])
def test_nothing_is_said_twice_where_it_may_not_be(model, logprobs, size):
    """Neither of what it says itself nor of its prompt."""
    found = beam.search(model, batch(PROMPTS), beams=2, length=LENGTH, stop=STOPS, no_repeat_ngram_size=size)
    for row, (prompt, of_texts) in enumerate(zip(PROMPTS, logprobs)):
        said = lambda text: [*zip(*([*prompt, *text][i:] for i in range(size)))]
        expected = by_definition(of_texts, 2, 1.0, able=lambda text: len(set(said(text))) == len(said(text)))
        np.testing.assert_allclose(found.scores_BW[row, :len(expected)], [score for score, _ in expected], atol=1e-4)
        assert [written(found, row, beam) for beam in range(len(expected))] == [text for _, text in expected]


def test_each_token_has_its_log_probability(model, logprobs):
    found = beam.search(model, batch(PROMPTS), beams=3, length=LENGTH, stop=STOPS, vocab=3, length_penalty=0.0)
    for row, of_texts in enumerate(logprobs):
        for beam_ in range(3):
            text = written(found, row, beam_)
            each = next(each for whole, each in of_texts.items() if whole[:len(text)] == text)[:len(text)]
            np.testing.assert_allclose(found.logprobs_BWT[row, beam_, :len(text)], each, atol=1e-4)
            np.testing.assert_allclose(found.scores_BW[row, beam_], sum(each), atol=1e-4)


@pytest.mark.parametrize("axes, rows, beams", [(dict(data=4, fsdp=1, model=2), 3, 4),
                                               (dict(fsdp=2, sequence=2, model=2), 8, 2)], ids=str)
def test_a_mesh_finds_the_same_texts(axes, rows, beams, rng):
    """Also where only the beams divide over devices, with repeats forbidden, and an early end."""
    model = tiny.model(vocab=16, width=16, heads=2, hidden=32, depth=2, dtype="float32")
    prompts = batch([rng.integers(0, 16, 3 + i % 3).tolist() for i in range(rows)])
    knobs = dict(beams=beams, length=6, stop=(2, 5), no_repeat_ngram_size=2, early=True)
    expected = beam.search(model, prompts, **knobs)
    with jax.set_mesh(parallel.make_mesh(MeshConfig(**axes))):
        found = beam.search(tiny.on_mesh(model), hosts.put_batch(jax.tree.map(np.asarray, prompts)), **knobs)
    jax.tree.map(np.testing.assert_array_equal, found[:2], expected[:2])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found[2:], expected[2:])


def test_scores_are_over_all_ids_also_where_few_may_be_drawn(model, logprobs):
    found = beam.search(model, batch(PROMPTS[:1]), beams=1, length=1, vocab=2)
    of_all = {text[0]: each[0] for text, each in logprobs[0].items()}
    np.testing.assert_allclose(found.scores_BW[0, 0], max(of_all[0], of_all[1]), atol=1e-4)


def test_a_search_without_beams_is_refused(model):
    with pytest.raises(ConfigError, match="beams=0"):
        beam.search(model, batch(PROMPTS), beams=0, length=2)


def by_definition(of_texts, beams, penalty, least=0, early=False, able=lambda text: True):
    """(score, text) of the best two, by lists and sorting."""
    alive, ended = [(0.0, ())], []
    for n in range(1, LENGTH + 1):
        grown = [(value, text) for _, prefix in alive for text, value in
                 {text[:n]: sum(each[:n]) for text, each in of_texts.items() if text[:n - 1] == prefix}.items()]
        grown = sorted((one for one in grown if able(one[1]) and (n > least or one[1][-1] not in STOPS)), reverse=True)
        some = grown[:beams] if early else grown
        ended += [(value / n**penalty, text) for value, text in some if text[-1] in STOPS][:beams]
        if early and len(ended) >= beams:
            return sorted(ended, reverse=True)[:beams]
        alive = [(value, text) for value, text in grown if text[-1] not in STOPS][:beams]
    ended += [(value / LENGTH**penalty, text) for value, text in alive]
    return sorted(ended, reverse=True)[:beams]


def written(found, row, beam):
    return tuple(int(id) for id in found.tokens_BWT[row, beam, :found.lengths_BW[row, beam]])


def batch(rows):
    T = max(map(len, rows))
    fill = lambda each: jnp.asarray([list(row) + [0] * (T - len(row)) for row in each], jnp.int32)
    return {"tokens": fill(rows), "positions": fill([range(len(row)) for row in rows]),
            "segments": fill([[1] * len(row) for row in rows])}
