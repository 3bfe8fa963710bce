"""Sources whose entropy is known, so that a run can be judged by its distance to the truth.

A spec such as `markov:order=2,symbols=8` names a law and its numbers. Documents are strings of visible ASCII of a fixed
length n, so their end is certain, and each comes with its exact cost, -log P in nats under the law that made it.
With a token a character, a perfect model's loss is sum(cost) / sum(n + 1); its expectation is `entropy(spec)`.
"""

import dataclasses
import difflib
import itertools
import math
import string
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lm_jax.config import ConfigError

ALPHABET = np.frombuffer((string.ascii_letters + string.digits + string.punctuation).encode(), np.uint8)
BLOCK = 256  # documents drawn at a time


def read(spec: str) -> Iterator[tuple[str, float]]:
    """Texts and their costs in nats."""
    law = make(spec)
    for start in range(0, law.documents, BLOCK):
        codes, nats = law.draw(np.random.default_rng([law.seed, 1, start]), BLOCK)
        for row, cost in zip(ALPHABET[codes][: law.documents - start], nats.tolist()):
            yield row.tobytes().decode(), cost


def entropy(spec: str) -> float:
    """The expected loss of a perfect model, in nats a token (a token a character, and one for the end)."""
    law = make(spec)
    return law.nats() / (law.length + 1)


def make(spec: str) -> "Law":
    """The law of a spec; raises ConfigError for an unknown name, a wrong type, or numbers that no law can have."""
    kind, _, argument = spec.partition(":")
    hints = {field.name: field.type for field in dataclasses.fields(LAWS[kind])}
    given = {}
    for part in filter(None, argument.split(",")):
        name, _, value = (word.strip() for word in part.partition("="))
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1) or [", ".join(hints)]
            raise ConfigError(f"data.sources: {spec!r} has no {name!r}: did you mean {near[0]}?")
        try:
            given[name] = hints[name](value)
        except ValueError as error:
            raise ConfigError(f"data.sources: {name}={value!r} in {spec!r}: {hints[name].__name__} wanted") from error
    law = LAWS[kind](**given)
    for problem in (*_out_of_range(law), *law.problems()):
        raise ConfigError(f"data.sources: {spec!r}: {problem}")
    return law


@dataclass(frozen=True)
class Law:
    """What the laws share. Two corpora of one law, as a longer one and a shorter one, begin alike."""

    documents: int = 1000
    seed: int = 0

    def problems(self) -> Iterator[str]:
        """Why these numbers have no law; each with its cure."""
        yield from ()

    def draw(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Codes [count, length] of symbols in ALPHABET and costs [count] in nats."""
        raise NotImplementedError

    def nats(self) -> float:
        """The expected cost of a document."""
        raise NotImplementedError

    def _tables(self) -> np.random.Generator:
        return np.random.default_rng([self.seed, 0])


@dataclass(frozen=True)
class Markov(Law):
    """Each symbol hangs on the `order` before it, through a random table whose rows are from a Dirichlet.

    A document begins as if the first symbol of the alphabet had stood before it.
    """

    length: int = 63
    symbols: int = 8
    order: int = 1
    concentration: float = 0.5  # of the Dirichlet: 0 makes a symbol certain, infinity makes all alike

    def problems(self):
        if self.symbols ** (self.order + 1) > 1e7:
            yield f"a table of {self.symbols}**{self.order + 1} numbers: lower symbols or order"

    @cached_property
    def table(self) -> np.ndarray:
        """P(next symbol | context) [symbols**order, symbols]; the latest symbol is the context's last digit."""
        return self._tables().dirichlet([self.concentration] * self.symbols, self.symbols**self.order)

    def draw(self, rng, count):
        codes, nats = np.zeros((count, self.length), int), np.zeros(count)
        context = np.zeros(count, int)
        for t in range(self.length):
            codes[:, t] = _choose(rng, self.table[context])
            nats -= np.log(self.table[context, codes[:, t]])
            context = (context * self.symbols + codes[:, t]) % len(self.table)
        return codes, nats

    def nats(self):
        total, contexts = 0.0, np.eye(1, len(self.table))[0]
        for _ in range(self.length):
            total += contexts @ _entropy(self.table)
            pairs = contexts[:, None] * self.table  # the oldest symbol is the first digit, and drops out
            contexts = pairs.reshape(self.symbols, -1).sum(0)
        return total


@dataclass(frozen=True)
class Grammar(Law):
    """A probabilistic context-free grammar that no string can be parsed by in two ways.

    It is the Random Hierarchy Model (Cagnetta et al. 2023) with unequal rules: at each of `depth` levels a symbol
    becomes one of `rules` strings of `branch` symbols. No two rules of a level share a string, hence one parse.
    """

    depth: int = 5
    symbols: int = 8
    rules: int = 4
    branch: int = 2

    def problems(self):
        if self.symbols * self.rules > self.symbols**self.branch:
            yield f"symbols*rules={self.symbols * self.rules} rules, {self.symbols}**{self.branch} strings: lower rules"
        if self.symbols**self.branch > 1e7 or self.length > 1e6:
            yield "lower symbols, branch or depth"

    @property
    def length(self) -> int:
        return self.branch**self.depth

    @cached_property
    def levels(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """A level's strings [symbols, rules, branch] and their probabilities [symbols, rules], from the root down."""
        rng, levels = self._tables(), []
        for _ in range(self.depth):
            chosen = rng.choice(self.symbols**self.branch, (self.symbols, self.rules), replace=False)
            strings = np.stack(np.unravel_index(chosen, [self.symbols] * self.branch), -1)
            levels.append((strings, rng.dirichlet(np.ones(self.rules), self.symbols)))
        return levels

    def draw(self, rng, count):
        codes = rng.integers(self.symbols, size=(count, 1))  # the root
        nats = np.full(count, math.log(self.symbols))
        for strings, odds in self.levels:
            rule = _choose(rng, odds[codes])
            nats -= np.log(odds[codes, rule]).sum(1)
            codes = strings[codes, rule].reshape(count, -1)
        return codes, nats

    def nats(self):
        total, visits = math.log(self.symbols), np.full(self.symbols, 1 / self.symbols)
        for strings, odds in self.levels:
            total += visits @ _entropy(odds)
            times = np.repeat(visits[:, None] * odds, self.branch)  # how often each place of each string is reached
            visits = np.bincount(strings.ravel(), times, self.symbols)
        return total


@dataclass(frozen=True)
class Copy(Law):
    """A random string, then the same again: the second half is free to a model that looks back (induction)."""

    length: int = 62
    symbols: int = 16

    def problems(self):
        if self.length % 2:
            yield f"length={self.length}: make it even"

    def draw(self, rng, count):
        half = rng.integers(self.symbols, size=(count, self.length // 2))
        return np.concatenate([half, half], 1), np.full(count, self.nats())

    def nats(self):
        return self.length // 2 * math.log(self.symbols)


@dataclass(frozen=True)
class Facts(Law):
    """Facts with Zipf's frequencies, of which a width holds so many: a loss that is a power law known beforehand.

    A document is pairs of a key and a value, a symbol each. Fact k has a key, drawn with probability p_k =
    (2k-1)^-a - (2k+1)^-a, a = `exponent` (a Pareto variable, rounded), and a code of +1 and -1 over the V values: value
    v follows with probability (1 + contrast * code[v]) / V. A fact not known costs `information` nats each time.

    Codes are orthogonal, so that no two can share a dimension: a model of width D, whose logits are a product of rank
    D, holds D of them, and with a norm before it D - 1/2. What is left out has probability (2D)^-a: a is the exponent
    of width. Values are noise, so that Adam's steps for a fact are proportional to its p_k, and it is known after
    n0 / p_k pairs: n pairs teach facts up to (n/n0)^(1/(1+a)), and a/(1+a) is the exponent of data (Hutter 2021,
    Learning Curve Theory). The two leave, above the `entropy`, the law of Kaplan et al. (2020, eq. 1.5):
    (D^-(1+a) + n0/n)^(a/(1+a)).

    Few symbols are few facts: those beyond `exact` share evenly the tail that a power law has beyond.
    """

    facts: int = 46
    exponent: float = 1.0
    pairs: int = 32
    contrast: float = 0.9

    def problems(self):
        if self.facts + self.values > len(ALPHABET):
            yield f"facts={self.facts} and {self.values} values: there are {len(ALPHABET)} symbols: lower facts"
        if self.contrast >= 1:
            yield f"contrast={self.contrast}: below 1, else a value is impossible"

    @property
    def length(self) -> int:
        return 2 * self.pairs

    @property
    def values(self) -> int:
        """V: one more than a prime that leaves 3 when divided by 4, for which there is Paley's matrix (1933)."""
        return 1 + next(n for n in itertools.count(3, 4) if n >= self.facts and all(n % d for d in range(3, n, 2)))

    @property
    def exact(self) -> int:
        """The last fact of the power law; those beyond are each about as likely."""
        return int(self.facts * self.exponent / (1 + self.exponent))

    @cached_property
    def odds(self) -> np.ndarray:
        tail = (2 * np.arange(self.facts + 1) + 1.0) ** -self.exponent
        tail[self.exact :] = np.linspace(tail[self.exact], 0, self.facts + 1 - self.exact)
        return tail[:-1] - tail[1:]

    @cached_property
    def codes(self) -> np.ndarray:
        """+1 and -1 [facts, values], as many of one as of the other in a row; rows are orthogonal."""
        prime = self.values - 1
        residues = np.full(prime, -1)
        residues[np.arange(1, prime) ** 2 % prime] = 1
        residues[0] = 1  # the diagonal
        n = np.arange(prime)
        return np.insert(residues[(n[:, None] - n) % prime], 0, -1, axis=1)[: self.facts]

    @property
    def information(self) -> float:
        """Nats that knowing a fact saves each time."""
        more, less = 1 + self.contrast, 1 - self.contrast
        return (more * math.log(more) + less * math.log(less)) / 2

    def draw(self, rng, count):
        fact = rng.choice(self.facts, p=self.odds, size=(count, self.pairs))
        right = rng.random(fact.shape) < (1 + self.contrast) / 2
        halves = np.argsort(self.codes, axis=1, kind="stable").reshape(self.facts, 2, -1)  # values of code -1, of +1
        value = halves[fact, right.astype(int), rng.integers(self.values // 2, size=fact.shape)]
        symbols = self._tables().permutation(self.facts + self.values)  # that of a key tells not how likely it is
        codes = symbols[np.stack([fact, self.facts + value], -1)].reshape(count, -1)
        odds = self.odds[fact] * np.where(right, 1 + self.contrast, 1 - self.contrast) / self.values
        return codes, -np.log(odds).sum(1)

    def nats(self):
        return self.pairs * (float(_entropy(self.odds)) + math.log(self.values) - self.information)

    def excess(self, *, stored: float = math.inf, seen: float = math.inf) -> float:
        """Nats a document above `nats()` to expect if only the `stored` likeliest facts can be known, and one of
        probability p is not yet with probability exp(-seen p), `seen` being n / n0."""
        held = np.clip(stored - np.arange(self.facts), 0, 1)
        missed = 1 - held * -np.expm1(-seen * self.odds)
        return self.pairs * self.information * float(self.odds @ missed)


LAWS = {"markov": Markov, "pcfg": Grammar, "copy": Copy, "zipf": Facts}


def _out_of_range(law: Law) -> Iterator[str]:
    for name, value in dataclasses.asdict(law).items():
        if value < 0 or value == 0 and name != "seed":
            yield f"{name}={value} is too small"
        if name == "symbols" and value > len(ALPHABET):
            yield f"{name}={value}: there are {len(ALPHABET)} letters, digits and marks"


def _choose(rng: np.random.Generator, odds: np.ndarray) -> np.ndarray:
    """One index drawn for each row of `odds` [..., n]."""
    edges = odds.cumsum(-1)
    return (rng.random(odds.shape[:-1])[..., None] * edges[..., -1:] >= edges).sum(-1)


def _entropy(odds: np.ndarray) -> np.ndarray:
    """In nats, over the last axis; what is impossible adds nothing."""
    return -(odds * np.log(np.where(odds > 0, odds, 1))).sum(-1)
