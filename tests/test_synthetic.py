import itertools
import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from lm_jax.config import ConfigError
from lm_jax.data import sources, synthetic

SPECS = ("markov:order=2,documents=2000", "pcfg:documents=2000", "copy:documents=2000", "zipf:documents=2000")


@pytest.mark.parametrize("spec", SPECS)
def test_mean_cost_of_documents_is_the_entropy(spec):
    texts, nats = zip(*synthetic.read(spec))
    assert len(texts) == 2000 and len(set(map(len, texts))) == 1 and "".join(texts).isalnum()
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


def test_a_fact_has_one_value_for_ever_and_costs_its_frequency():
    spec = "zipf:facts=50,pairs=4,documents=2000"
    law, values, seen = synthetic.make(spec), defaultdict(set), Counter()
    facts = {synthetic.ALPHABET[codes].tobytes().decode(): k for k, codes in enumerate(law.spelling)}
    assert len(facts) == 50
    for text, nats in synthetic.read(spec):
        drawn = [text[i : i + 4] for i in range(0, 16, 4)]
        assert nats == pytest.approx(-sum(math.log(law.odds[facts[fact]]) for fact in drawn))
        for fact in drawn:
            values[fact[:2]].add(fact[2:])
            seen[facts[fact]] += 1
    assert all(len(value) == 1 for value in values.values()) and len(values) > 30
    assert law.odds[0] / law.odds[9] == pytest.approx(10**2)  # Zipf, 1 + a = 2
    assert seen[0] / 8000 == pytest.approx(law.odds[0], abs=0.03)


@pytest.mark.parametrize("a", (0.5, 1.0))
def test_fact_memory_has_the_exponents_it_promises(a):
    law = synthetic.make(f"zipf:facts=3000000,exponent={a}")

    def slope(low, high, **of):
        name = of.popitem()[0]
        return math.log(law.excess(**{name: low}) / law.excess(**{name: high})) / math.log(high / low)

    assert slope(100, 1000, stored=0) == pytest.approx(a, rel=0.02)
    assert slope(1e4, 1e5, seen=0) == pytest.approx(a / (1 + a), rel=0.02)


def test_a_spec_that_no_law_can_have_says_why():
    for spec, said in (("markov:ordr=2", "order"), ("markov:order=two", "int wanted"), ("markov:order=0", "too small"),
                       ("copy:length=7", "even"), ("pcfg:rules=40", "lower rules"),
                       ("markov:order=30", "lower symbols"), ("markov:symbols=63", "62 letters"),
                       ("zipf:exponent=-1", "too small")):
        with pytest.raises(ConfigError, match=said):
            synthetic.make(spec)


def test_synthetic_documents_carry_their_cost():
    report = Counter()
    documents = list(sources.read("copy:documents=3,length=4", invalid="error", report=report))
    assert [d.meta["nats"] for d in documents] == [pytest.approx(2 * math.log(16))] * 3
    assert len({d.id for d in documents}) == 3 and report == {"documents": 3, "bytes": 12}
