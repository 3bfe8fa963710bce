"""Where every number of a model lies on disk: which tensors a parameter is made of, in which order of dimensions.

What a table of names leaves open follows from a parameter's letters: torch keeps a weight as [out, in] and a head's
sizes along with the heads; layers and experts are tensors of their own.
"""

import math
from dataclasses import dataclass
from itertools import product

import numpy as np

from lm_jax.config import TransformerConfig
from lm_jax.errors import ConfigError
from lm_jax.hub.families import Family
from lm_jax.models import flops
from lm_jax.models.stack import dense_or_experts

WORDS = {"w": "weight", "scale": "weight", "table": "weight", "b": "bias", "bias": "bias",
         "sway": "e_score_correction_bias"}  # the last name of a parameter -> that of its tensors


@dataclass(frozen=True)
class Place:
    """A slice of a parameter, and the tensor on disk that it is, or is an equal part of.

    `at` are the slice's leading indices and `letters` its dimensions. The tensor has `shape` on disk; as `numbers` it
    has a dimension a letter of `order`, and where it has parts one for them, "|".
    """

    name: str
    shape: tuple[int, ...]
    at: tuple[int, ...]
    letters: str
    order: str
    numbers: tuple[int, ...]
    part: int = 0

    def read(self, tensor, start: int, stop: int) -> np.ndarray:
        """The slice, of its dimension `leads` only what lies between; no more of the file is read."""
        letters, parts = self.order.replace("|", ""), dict(zip(self.order, self.numbers)).get("|", 1)
        outer = self.order[0] == "|"  # parts lie one after another in the file; else they are dealt out in its rows
        own = self.shape[0] // (parts if outer else 1)
        unit, first = own // self.numbers[int(outer)], self.part * own if outer else 0
        rows = tensor.rows(first + start * unit, first + stop * unit)
        rows = rows.reshape(stop - start, *self.numbers[1 + outer:])
        rows = rows.take(self.part, self.order.index("|")) if parts > 1 and not outer else rows
        return rows.transpose([letters.index(letter) for letter in self.letters])

    def turned(self, array) -> np.ndarray:
        """The slice in the file's order of dimensions."""
        return array.transpose([self.letters.index(letter) for letter in self.order.replace("|", "")])

    @property
    def leads(self) -> int:
        """Which dimension of the slice is outermost on disk."""
        return self.letters.index(self.order.replace("|", "")[0])


def joined(parts: list[tuple["Place", np.ndarray]]) -> np.ndarray:
    """The tensor on disk of the slices that are its parts, in their order."""
    turned = [place.turned(array) for place, array in parts]
    place = parts[0][0]
    whole = turned[0] if len(parts) == 1 else np.stack(turned, place.order.index("|"))
    return whole.reshape(place.shape)


def places(cfg: TransformerConfig, family: Family, prefix: str) -> dict[tuple, list[Place]]:
    """Parameter's path -> its places, for every parameter of the model; the body's names begin with `prefix`."""
    table = {ours: prefix + disk for ours, disk in family.body(cfg).items()} | family.heads
    if cfg.head in family.labels:
        table["classifier.out"] = family.labels[cfg.head]
    return {weight.path: list(_places(weight, cfg, family, table)) for weight in flops.weights(cfg)}


def _places(weight, cfg, family, table):
    layers = dense_or_experts(cfg, cfg.depth)
    kind, (*module, last) = weight.kind, weight.path
    module[1:2] = ["blocks" if module[0] == "decoder" and name == "dense" else name for name in module[1:2]]
    ours = ".".join(module) if last in WORDS else ".".join((*module, last, "{E}"))
    if ours not in table:
        raise ConfigError(f"{'.'.join(weight.path)} has no name in a model of type {family.kind!r}")
    disk, _, part = table[ours].partition(" ")
    part, parts = map(int, part.split("/")) if part else (0, 1)
    leading = [letter for letter in "LE" if f"{{{letter}}}" in disk]
    sizes = dict(zip(kind.letters, weight.shape))
    letters = kind.letters[len(leading):]
    groups = _groups(kind, letters, parts, reverse=family.inputs_first and "L" in leading)
    shape = tuple(math.prod({"|": parts, **sizes}[letter] for letter in group) for group in groups)
    order = "".join(groups)
    numbers = tuple({"|": parts, **sizes}[letter] for letter in order)
    which = {"dense": "D", "blocks": "E" if len(set(layers)) == 2 else "DE"}.get(weight.path[1], "")
    own = [i for i, letter in enumerate(layers) if letter in which]
    own = range(cfg.encoder_depth) if module[0] == "encoder" else own
    for at in product(*(range(sizes[letter]) for letter in leading)):
        index = {letter: i for letter, i in zip(leading, at)}
        named = disk.format(**index | ({"L": own[index["L"]]} if "L" in index else {}))
        yield Place(f"{named}.{WORDS.get(last, 'weight')}", shape, at, letters, order, numbers, part)


def _groups(kind, letters, parts, *, reverse):
    """Letters that are one dimension on disk, in the file's order."""
    if kind.role == "embedding":
        return tuple(letters)
    into = "".join(letter for letter in letters if letter in kind.fan_in)
    out = "|" * (parts > 1) + "".join(letter for letter in letters if letter not in kind.fan_in)
    if not into:
        return (out,)
    return (into, out) if reverse else (out, into)
