import itertools
import math
import string
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm_jax.config import ConfigError
from lm_jax.data import sources, synthetic

SPECS = ("markov:order=2,documents=2000", "pcfg:documents=2000", "copy:documents=2000", "zipf:documents=2000")


@pytest.mark.parametrize("spec", SPECS)
def test_mean_cost_of_documents_is_the_entropy(spec):
    texts, nats = zip(*synthetic.read(spec))
    assert len(texts) == 2000 and len(set(map(len, texts))) == 1
    assert set("".join(texts)) <= set(string.ascii_letters + string.digits + string.punctuation)
    loss = np.array(nats) / (len(texts[0]) + 1)
    error = loss.std() / len(loss) ** 0.5 + 1e-9
    assert abs(loss.mean() - synthetic.entropy(spec)) < 4 * error


@pytest.mark.parametrize("spec", SPECS)
def test_a_longer_corpus_of_a_law_begins_like_a_shorter_one(spec):
    short = list(synthetic.read(spec.replace("2000", "300")))
    assert len(short) == 300
    assert list(itertools.islice(synthetic.read(spec), 300)) == short
    assert list(synthetic.read(spec.replace("2000", "300") + ",seed=1")) != short


@pytest.mark.parametrize("order", (1, 2))
def test_markov_costs_are_those_of_its_table(order):
    spec = f"markov:order={order},symbols=3,length=7,documents=500"
    table = synthetic.make(spec).table.reshape([3] * (order + 1))

    def probability(codes):
        padded = (0,) * order + tuple(codes)
        return math.prod(table[padded[t : t + order + 1]] for t in range(len(codes)))

    every = np.array([probability(codes) for codes in itertools.product(range(3), repeat=7)])
    assert every.sum() == pytest.approx(1)
    assert synthetic.entropy(spec) == pytest.approx(-(every * np.log(every)).sum() / 8)
    for text, nats in synthetic.read(spec):
        assert nats == pytest.approx(-math.log(probability([ord(c) - ord("a") for c in text])))


def test_markov_documents_follow_the_table():
    law = synthetic.make("markov:order=1,symbols=3,length=50,documents=1000")
    seen = np.zeros((3, 3))
    for text, _ in synthetic.read("markov:order=1,symbols=3,length=50,documents=1000"):
        for a, b in itertools.pairwise(text):
            seen[ord(a) - ord("a"), ord(b) - ord("a")] += 1
    error = np.sqrt(law.table * (1 - law.table) / seen.sum(1, keepdims=True))
    assert (abs(seen / seen.sum(1, keepdims=True) - law.table) < 4.5 * error).all()


def test_every_string_of_the_grammar_has_one_derivation_and_its_probability_as_cost():
    spec = "pcfg:depth=2,symbols=3,rules=2,branch=2,documents=3000"
    law = synthetic.make(spec)
    strings = [((root,), 1 / 3) for root in range(3)]
    for rhs, odds in law.levels:
        strings = [(sum((tuple(rhs[s, r]) for s, r in zip(string, rules)), ()),
                    p * math.prod(odds[s, r] for s, r in zip(string, rules)))
                   for string, p in strings for rules in itertools.product(range(2), repeat=len(string))]
    table = {"".join(chr(ord("a") + s) for s in string): p for string, p in strings}
    assert len(table) == len(strings) == 3 * 2**3  # no string twice: one parse each
    assert sum(table.values()) == pytest.approx(1)
    assert law.nats() == pytest.approx(-sum(p * math.log(p) for p in table.values()))
    seen = Counter()
    for text, nats in synthetic.read(spec):
        assert nats == pytest.approx(-math.log(table[text]))
        seen[text] += 1
    assert all(abs(seen[text] - 3000 * p) < 5 * math.sqrt(3000 * p) + 1 for text, p in table.items())


def test_the_second_half_of_a_copy_costs_nothing():
    for text, nats in synthetic.read("copy:length=20,symbols=5,documents=50"):
        assert text[:10] == text[10:] and nats == pytest.approx(10 * math.log(5))


def test_a_fact_is_a_code_that_its_values_follow_and_costs_their_probability():
    spec = "zipf:facts=10,pairs=4,documents=5000"
    law = synthetic.make(spec)
    assert law.values == 12 and (law.codes @ law.codes.T == 12 * np.eye(10)).all()  # orthogonal
    assert (law.codes.sum(1) == 0).all()  # the values by themselves tell nothing
    names = synthetic.ALPHABET[np.random.default_rng([0, 0]).permutation(22)].tobytes().decode()
    seen = np.zeros((10, 12))
    for text, nats in synthetic.read(spec):
        pairs = [(names.index(key), names.index(value) - 10) for key, value in zip(text[::2], text[1::2])]
        odds = [law.odds[key] * (1 + 0.9 * law.codes[key, value]) / 12 for key, value in pairs]
        assert nats == pytest.approx(-np.log(odds).sum())
        np.add.at(seen, tuple(np.array(pairs).T), 1)
    expected = 20_000 * law.odds[:, None] * (1 + 0.9 * law.codes) / 12
    assert (abs(seen - expected) < 5 * np.sqrt(expected) + 1).all()
    assert law.odds[0] / law.odds[1] == pytest.approx((1 - 1 / 3) / (1 / 3 - 1 / 5))  # Pareto, a = 1, rounded


@pytest.mark.parametrize("a", (0.5, 1.0))
def test_facts_have_the_exponents_they_promise(a):
    law = synthetic.make(f"zipf:exponent={a}")

    def slope(low, high, **of):
        name = of.popitem()[0]
        return math.log(law.excess(**{name: low}) / law.excess(**{name: high})) / math.log(high / low)

    assert law.odds.sum() == pytest.approx(1) and (np.diff(law.odds) < 1e-3 * law.odds[-1]).all()  # the likeliest first
    for width in (4, law.exact // 2):
        lost = [law.excess(stored=n - 0.5) for n in (width, 2 * width)]
        assert lost[0] / lost[1] == pytest.approx(2**a, rel=0.03)
    if a == 1:  # with less the few facts are felt everywhere
        assert slope(20, 60, seen=0) == pytest.approx(a / (1 + a), rel=0.05)
    assert law.excess() == 0 and law.excess(seen=0) == pytest.approx(law.pairs * law.information)


@pytest.mark.parametrize("D", (3, 8))
def test_a_softmax_of_rank_d_can_know_as_much_as_excess_says(D):
    """Least expected loss of any logits that are a product of rank D, found by descent, against D - 1/2 facts."""
    law = synthetic.make("zipf:")
    odds_KV = jnp.asarray(law.odds[:, None] * (1 + law.contrast * law.codes) / law.values)

    def loss(weights):
        h_KD, w_VD = weights
        h_KD *= (D / jnp.square(h_KD).sum(-1, keepdims=True)) ** 0.5  # as a model's last norm leaves it
        return -(odds_KV * jax.nn.log_softmax(h_KD @ w_VD.T)).sum()

    rng, tx = np.random.default_rng(0), optax.adam(optax.cosine_decay_schedule(0.05, 2000))
    weights = tuple(jnp.asarray(rng.standard_normal((n, D)) * 0.1) for n in (law.facts, law.values))

    def step(_, carry):
        weights, state = carry
        updates, state = tx.update(jax.grad(loss)(weights), state)
        return optax.apply_updates(weights, updates), state

    weights, _ = jax.jit(lambda carry: jax.lax.fori_loop(0, 2000, step, carry))((weights, tx.init(weights)))
    floor = math.log(law.values) - law.information
    assert float(loss(weights)) - floor == pytest.approx(law.excess(stored=D - 0.5) / law.pairs, rel=0.1)


def test_a_spec_that_no_law_can_have_says_why():
    for spec, said in (("markov:ordr=2", "order"), ("markov:order=two", "int wanted"), ("markov:order=0", "too small"),
                       ("copy:length=7", "even"), ("pcfg:rules=40", "lower rules"),
                       ("markov:order=30", "lower symbols"), ("markov:symbols=95", "94 letters"),
                       ("zipf:exponent=-1", "too small"), ("zipf:facts=47", "lower facts"),
                       ("zipf:contrast=1", "below 1")):
        with pytest.raises(ConfigError, match=said):
            synthetic.make(spec)


def test_synthetic_documents_carry_their_cost():
    report = Counter()
    documents = list(sources.read("copy:documents=3,length=4", invalid="error", report=report))
    assert [d.meta["nats"] for d in documents] == [pytest.approx(2 * math.log(16))] * 3
    assert len({d.id for d in documents}) == 3 and report == {"documents": 3, "bytes": 12}
