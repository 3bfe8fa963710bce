"""Objectives against cases made by hand: what each array holds, position by position."""

import numpy as np
import pytest

from lm_jax.config import ConfigError, DataConfig
from lm_jax.data import examples, spans
from lm_jax.data.tokenizer import make as make_tokenizer

TOKENIZER = make_tokenizer("byte", [], vocab=384)
BOS, EOS, PAD, MASK = TOKENIZER.bos, TOKENIZER.eos, TOKENIZER.pad, TOKENIZER.mask
A, B, C, D, E, F = TOKENIZER.encode("abcdef").tolist()


def spec(**settings):
    return examples.Spec(DataConfig(**settings), TOKENIZER, lambda b, rng: [document("zyxwvutsrqponmlkjihg" * 20)])


def document(text):
    return np.concatenate([[BOS], TOKENIZER.encode(text), [EOS]]).astype(np.uint16)  # as the shards hold it


def row(*pieces, seed=0, **settings):
    return examples.make(list(pieces), np.random.default_rng(seed), spec(**settings))


def assert_arrays(made, **expected):
    for key, values in expected.items():
        np.testing.assert_array_equal(made[key], values, err_msg=key)
        assert made[key].dtype == (np.float32 if key.endswith("weights") else np.int32), key


def test_causal_by_hand():
    made = row(document("ab"), document("c")[:2], length=6)
    assert_arrays(made, tokens=[BOS, A, B, BOS, 0, 0], targets=[A, B, EOS, C, 0, 0], weights=[1, 1, 1, 1, 0, 0],
                  positions=[0, 1, 2, 0, 0, 0], segments=[1, 1, 1, 2, 0, 0])


def test_a_full_row_and_a_row_of_padding_in_one_batch():
    made = examples.batch([[document("abc")], []], [None, None], spec(length=4))
    assert_arrays(made, tokens=[[BOS, A, B, C], [0] * 4], targets=[[A, B, C, EOS], [0] * 4],
                  weights=[[1] * 4, [0] * 4], segments=[[1] * 4, [0] * 4])


@pytest.mark.parametrize("objective", examples.OBJECTIVES)
def test_a_row_of_padding_weighs_nothing(objective):
    rngs = [np.random.default_rng(i) for i in range(2)]
    made = examples.batch([[], [document("some text here")]], rngs, spec(objective=objective, length=32))
    for part in (made, made.get("source", {})):
        for key in part.keys() - {"source"}:
            assert not part[key][0].any(), key
    assert made["weights"][1].any()


@pytest.mark.parametrize("objective", examples.OBJECTIVES)
def test_a_row_does_not_depend_on_its_batch(objective):
    rows = [[document("x" * 20)], [document("hello"), document("you there")], [document("y")]]
    batch = examples.batch(rows, [np.random.default_rng(i) for i in range(3)], spec(objective=objective, length=32))
    for b, pieces in enumerate(rows):
        alone = examples.make(pieces, np.random.default_rng(b), spec(objective=objective, length=32))
        for made, whole in ((alone, batch), (alone.get("source", {}), batch.get("source", {}))):
            for key in made.keys() - {"source"}:
                np.testing.assert_array_equal(made[key], whole[key][b], err_msg=key)


def test_prefix_sees_itself_whole_and_pays_only_for_what_follows():
    cuts = set()
    for seed in range(40):
        made = row(document("abcd"), document("e"), seed=seed, objective="prefix", length=8)
        plain = row(document("abcd"), document("e"), length=8)
        for key in ("tokens", "targets", "positions", "segments"):
            np.testing.assert_array_equal(made[key], plain[key])
        cut = int(made["order"][0]) + 1  # tokens in the first segment's prefix
        assert_arrays({k: v[:5] for k, v in made.items()}, order=np.maximum(np.arange(5), cut - 1),
                      weights=np.arange(5) >= cut - 1)
        cuts.add(cut)
        assert made["weights"][5:7].any() and not made["weights"][7]
    assert cuts == {1, 2, 3, 4, 5}


def test_masked_hides_exactly_its_share_of_ordinary_tokens_as_80_10_10():
    text = "the quick brown fox jumps over the lazy dog " * 5
    fates = np.zeros(3)
    for seed in range(60):
        made = row(document(text), document("more of it"), seed=seed, objective="masked", length=240, noise=0.15)
        plain = np.concatenate([document(text), document("more of it")])
        n = len(text) + len("more of it")
        np.testing.assert_array_equal(made["targets"][: n + 4], plain)
        chosen = made["weights"] == 1
        assert chosen.sum() == round(0.15 * n)
        assert TOKENIZER.byte_lengths[made["targets"][chosen]].all()  # never bos, eos or padding
        np.testing.assert_array_equal(made["tokens"][~chosen], made["targets"][~chosen])
        hidden, same = made["tokens"][chosen] == MASK, made["tokens"][chosen] == made["targets"][chosen]
        fates += hidden.sum(), same.sum(), (~hidden & ~same).sum()
    np.testing.assert_allclose(fates / fates.sum(), [0.8, 0.1, 0.1], atol=0.025)
    assert_arrays(made, segments=[1] * (len(text) + 2) + [2] * 12 + [0] * (240 - n - 4))


def test_whole_words_are_hidden_whole():
    text = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda"
    starts = np.flatnonzero(TOKENIZER.word_starts[document(text)][1:-1]) + 1
    words = np.split(np.arange(1, len(text) + 1), starts - 1)
    for seed in range(20):
        made = row(document(text), seed=seed, objective="masked", length=80, noise=0.3, whole_words=True)
        chosen = made["weights"] == 1
        assert 0 < chosen.sum() <= round(0.3 * len(text))
        for word in words:
            assert len(set(chosen[word])) <= 1


def test_masked_pairs_by_hand_and_half_of_them_true():
    true = 0
    for seed in range(200):
        made = row(document("abcdef"), seed=seed, objective="masked_pairs", length=12, noise=0.15)
        whole = made["targets"]
        assert whole[0] == BOS and made["types"][0] == 0 and (made["segments"] == (np.arange(12) < 9)).all()
        first = np.flatnonzero(whole == EOS)[0]
        np.testing.assert_array_equal(made["types"], [int(first < t < 9) for t in range(12)])
        assert_arrays(made, pair_weights=[1] + [0] * 11)
        assert not made["pair_targets"][1:].any()
        if made["pair_targets"][0] == 0:
            np.testing.assert_array_equal([t for t in whole[:9] if t not in (BOS, EOS)], [A, B, C, D, E, F])
            true += 1
        else:
            assert set(whole[first + 1 : 8]) <= set(TOKENIZER.encode("ghijklmnopqrstuvwxyz"))
    assert 75 < true < 125


def test_pairs_are_cut_inside_the_longest_document():
    for seed in range(20):
        made = row(document("xy"), document("abcdef"), seed=seed, objective="masked_pairs", length=20)
        first = made["targets"][made["types"] == 0][1:-1]
        assert set(TOKENIZER.encode("xy")) <= set(first) and A in first and F not in first


def test_t5_lengths_are_the_papers():
    data = DataConfig(objective="span", length=512, noise=0.15, span=3.0)
    assert (examples.window(data), examples.target_length(data)) == (568, 114)


def test_span_corruption_by_hand():
    hidden = np.array([0, 1, 1, 0, 0, 1], bool)
    sentinels = np.array(TOKENIZER.sentinels)
    first, second = sentinels[:2]
    tokens = np.array([A, B, C, D, E, F])
    np.testing.assert_array_equal(spans.collapse(tokens, hidden, sentinels), [A, first, D, E, second])
    np.testing.assert_array_equal(spans.collapse(tokens, ~hidden, sentinels), [first, B, C, second, F])


@pytest.mark.parametrize("objective", ["span", "ul2"])
def test_what_the_decoder_writes_fills_the_holes_of_the_encoder(objective):
    settings = {"objective": objective, "length": 64}
    text = np.random.default_rng(3).choice(TOKENIZER.encode("abcdefgh"), examples.window(DataConfig(**settings)))
    modes = set()
    for seed in range(60):
        made = row(text, seed=seed, **settings)
        targets = made["targets"][made["segments"] == 1].tolist()
        seen = made["source"]["tokens"][made["source"]["segments"] == 1].tolist()
        assert targets.pop() == EOS and seen.pop() == EOS
        if objective == "ul2":
            modes.add(seen.pop(0))
        else:
            assert made["source"]["segments"].all() and made["segments"].all()  # both sides exactly full
        spans_of, sentinel = {}, None
        for token in targets:
            if token in TOKENIZER.sentinels:
                sentinel = token
                spans_of[sentinel] = []
            else:
                spans_of[sentinel].append(token)
        restored = [t for token in seen for t in spans_of.get(token, [token])]
        assert restored == text.tolist()
        assert list(spans_of) == list(TOKENIZER.sentinels[: len(spans_of)])
        decoder = made["tokens"][made["segments"] == 1]
        assert decoder[0] == PAD and decoder[1:].tolist() == targets  # the shift; eos is only ever a target
        assert_arrays(made, weights=made["segments"] > 0)
    assert objective == "span" or modes == set(TOKENIZER.modes)


def test_noise_spans_have_the_asked_density_and_mean_length():
    denoiser, rng = spans.t5(0.15, 3.0)[0], np.random.default_rng(0)
    masks = np.stack([spans.mask(568, denoiser, rng) for _ in range(200)])
    assert (masks.sum(1) == 85).all() and not masks[:, 0].any() and masks[:, -1].all()
    assert ((np.diff(masks.astype(int), axis=1) == 1).sum(1) == 28).all()
    lengths = masks[:, 100:400].mean(0)
    assert abs(lengths.mean() - 0.15) < 0.01  # spread evenly over the row


@pytest.mark.parametrize("length", [16, 33, 64, 250, 512])
@pytest.mark.parametrize("objective", ["span", "ul2"])
def test_any_row_fits_its_fixed_shapes(length, objective):
    data = DataConfig(objective=objective, length=length)
    rng = np.random.default_rng(0)
    for n in [*range(1, 40), examples.window(data)]:
        if n <= examples.window(data):
            for _ in range(3):
                row(np.full(n, A), seed=int(rng.integers(1 << 30)), objective=objective, length=length)


def test_too_few_sentinels_is_an_error_that_names_the_cure():
    with pytest.raises(ConfigError, match="shorten data.length or set data.span") as error:
        spec(objective="span", length=4096)
    spec(objective="span", length=4096, span=float(str(error.value).rpartition("=")[2]))
