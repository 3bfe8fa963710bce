"""Sources whose entropy is known, so that a run can be judged by its distance to the truth.

A spec such as `markov:order=2,symbols=8` names a law and its numbers. Documents are strings of letters and digits of a
fixed length n, so their end is certain, and each comes with its exact cost, -log P in nats under the law that made it.
With a token a character, a perfect model's loss is sum(cost) / sum(n + 1); its expectation is `entropy(spec)`.
"""

import dataclasses
import difflib
import math
import string
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lm_jax.config import ConfigError

ALPHABET = np.frombuffer((string.ascii_lowercase + string.ascii_uppercase + string.digits).encode(), np.uint8)
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
    """Facts, a key and its value, recalled with Zipf's frequencies: the loss falls as a power law of known exponent.

    Fact k of `facts` is drawn with probability p_k ~ k^-(1+a), a = `exponent`; its key (small letters) has one value
    for ever (`value` capitals, drawn evenly). What is not known costs value * log 26 nats each time. A model with room
    for C facts keeps the likeliest, and misses sum_{k>C} p_k ~ C^-a: the exponent of capacity is a. After D draws a
    fact has not been seen with probability (1-p_k)^D, which is about 1 for k > D^(1/(1+a)), and the sum of p_k over
    those is ~ D^(-a/(1+a)): the exponent of data is a/(1+a) (Hutter 2021, Learning Curve Theory; Michaud et al. 2023,
    The Quantization Model). Both hold while C and D^(1/(1+a)) are far below `facts`.
    """

    facts: int = 10_000
    exponent: float = 1.0
    pairs: int = 8  # facts in a document
    value: int = 2

    def problems(self):
        if self.facts > 1e7:
            yield f"facts={self.facts}: at most 10 million"

    @property
    def width(self) -> int:
        """Letters of a key."""
        return next(width for width in range(1, 9) if 26**width >= self.facts)

    @property
    def length(self) -> int:
        return self.pairs * (self.width + self.value)

    @cached_property
    def odds(self) -> np.ndarray:
        weights = np.arange(1, self.facts + 1) ** -(1 + self.exponent)
        return weights / weights.sum()

    @cached_property
    def spelling(self) -> np.ndarray:
        """Codes [facts, width + value]: keys are in random order, so that none tells how frequent it is."""
        rng = self._tables()
        keys = np.stack(np.unravel_index(rng.permutation(self.facts), [26] * self.width), -1)
        return np.concatenate([keys, 26 + rng.integers(26, size=(self.facts, self.value))], 1)

    def draw(self, rng, count):
        fact = rng.choice(self.facts, p=self.odds, size=(count, self.pairs))
        return self.spelling[fact].reshape(count, -1), -np.log(self.odds[fact]).sum(1)

    def nats(self):
        return self.pairs * float(_entropy(self.odds))

    def excess(self, *, stored: float = math.inf, seen: float = math.inf) -> float:
        """Nats a document above `nats()` to expect if only the `stored` likeliest of what `seen` draws met is known."""
        unmet = np.exp(seen * np.log1p(-self.odds)) if math.isfinite(seen) else np.zeros(self.facts)
        unmet[np.arange(self.facts) >= stored] = 1
        return float(self.odds @ unmet) * self.pairs * self.value * math.log(26)


LAWS = {"markov": Markov, "pcfg": Grammar, "copy": Copy, "zipf": Facts}


def _out_of_range(law: Law) -> Iterator[str]:
    for name, value in dataclasses.asdict(law).items():
        if value < 0 or value == 0 and name != "seed":
            yield f"{name}={value} is too small"
        if name == "symbols" and value > len(ALPHABET):
            yield f"{name}={value}: there are {len(ALPHABET)} letters and digits"


def _choose(rng: np.random.Generator, odds: np.ndarray) -> np.ndarray:
    """One index drawn for each row of `odds` [..., n]."""
    edges = odds.cumsum(-1)
    return (rng.random(odds.shape[:-1])[..., None] * edges[..., -1:] >= edges).sum(-1)


def _entropy(odds: np.ndarray) -> np.ndarray:
    """In nats, over the last axis; what is impossible adds nothing."""
    return -(odds * np.log(np.where(odds > 0, odds, 1))).sum(-1)
