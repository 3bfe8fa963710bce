"""A model that reads: texts in rows of a few lengths, so that few programs serve all; and what tasks ask of them."""

import numbers
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import numpy as np

from lm_jax import hub, parallel
from lm_jax.errors import ConfigError
from lm_jax.hub import folder
from lm_jax.hub import frame as frames
from lm_jax.hub.frame import Frame, Row
from lm_jax.inference.generate import ready
from lm_jax.models.transformer import Transformer

ROWS, TOKENS = 32, 16_384  # at most so many of a batch, where nobody says
UNLIMITED = 10**9  # tokenizer_config.json writes a larger number for no limit


@dataclass(frozen=True)
class Reader:
    """A model that reads, and what its folder says of it."""

    model: Transformer  # as it computes best here
    frame: Frame  # its tokenizer, as the folder says that texts are read
    settings: dict  # its config.json
    limit: int | None  # tokens that it can read at once
    say: Callable
    rows: int = ROWS  # at most so many of a batch

    @property
    def tokenizer(self):
        return self.frame.tokenizer

    @property
    def labels(self) -> list[str]:
        """What its scores are of."""
        named = self.settings.get("id2label") or {}
        return [str(named.get(str(i), f"LABEL_{i}")) for i in range(self.model.cfg.sizes["C"])]

    def beginnings(self, texts: list, *, truncation: bool, cut: str = "longest_first") -> list[Row]:
        """A row a text. Of one that is too long the beginning is read, which is said; without `truncation`, refused."""
        rows = self.frame.windows(texts, limit=self.limit, cut=cut)
        if long := [i for i, windows in enumerate(rows) if len(windows) > 1]:
            found = f"{len(long)} of {len(texts)} texts, such as number {long[0]}, pass the model's {self.limit} tokens"
            if not truncation:
                raise ConfigError(f"{found}: cut them, or pass truncation=True to read their beginnings")
            self.say(f"{found}: only their beginnings are read")
        return [windows[0] for windows in rows]

    def windows(self, texts: list, *, limit: int | None, overlap: int, cut: str = "longest_first") -> list[list[Row]]:
        """Rows that are all of each text, a long one's sharing `overlap` tokens with the next; which is said."""
        rows = self.frame.windows(texts, limit=limit, overlap=overlap, cut=cut)
        if long := [i for i, windows in enumerate(rows) if len(windows) > 1]:
            self.say(f"{len(long)} of {len(texts)} texts, such as number {long[0]}, pass {limit} tokens: read in "
                     f"windows of so many, {overlap} shared by neighbours; that one in {len(rows[long[0]])}")
        return rows

    def look(self, rows: Sequence[Row], at: Callable) -> list[np.ndarray]:
        """For each row what `at(model, batch)`, one of the functions below, gives: float32 [T, ..] of its tokens."""
        found = [None] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        while order:
            width = fitting(len(rows[order[0]]))
            some = [i for i in order[:max(1, min(self.rows, TOKENS // width))] if fitting(len(rows[i])) == width]
            order = order[len(some):]
            with jax.default_matmul_precision("highest"):
                out = np.asarray(_looked(self.model, self._batch([rows[i] for i in some], width), at), np.float32)
            for i, one in zip(some, out):
                found[i] = one[:len(rows[i])]
        return found

    def _batch(self, rows, width):
        ids, types = [row.ids for row in rows], [row.types for row in rows]
        start = self.settings.get("decoder_start_token_id") or 0
        batch = hub.labelled(self.model.cfg, ids, types, width=width, start=start)
        more = 2**(len(rows) - 1).bit_length() - len(rows)
        return jax.tree.map(lambda a_BT: np.pad(a_BT, ((0, more), (0, 0))), batch)


def load(path, *, say=print) -> Reader:
    """The model of a folder as transformers saves it, or of a name in the local hub, on the mesh in use. On CPUs it
    computes in float32, which is faster there and no less exact."""
    kinds = {"dtype": "float32", "weights": "float32"} if parallel.on_cpu() else {}
    model = hub.load(path, say=say, **kinds)
    where = Path(model.origin)
    settings, frame = folder.config(where), frames.of_folder(where)
    told = frame.settings.get("model_max_length") or UNLIMITED
    longest = model.cfg.max_length if model.cfg.positions == "learned" else settings.get("max_position_embeddings")
    limit = int(min(told, longest or UNLIMITED))
    return Reader(ready(model), frame, settings, limit if limit < UNLIMITED else None, say)


def scores(model, batch):
    """What the head gives: [B, T, C], T being 1 where labels are of rows."""
    return model(batch)


def hidden(model, batch):
    """Hidden states [B, T, D]; an encoder-decoder's are its encoder's."""
    return model.encode(batch["source"])[0] if model.cfg.encoder_depth else model.hidden(batch)[0]


def several(inputs, what: str = "text", kinds=(str,)) -> tuple[list, bool]:
    """Inputs as a list, and whether they were a single one. ConfigError names what is none, or empty."""
    single = isinstance(inputs, (*kinds, str))
    if not single and not isinstance(inputs, Iterable):
        raise ConfigError(f"the {what} is {inputs!r}: pass a string, or a list of them")
    texts = [inputs] if single else list(inputs)
    for i, text in enumerate(texts):
        number = "the" if single else f"number {i}, a"
        if not isinstance(text, kinds):
            raise ConfigError(f"{number} {what} is {text!r}: pass a string, or a list of them")
        if isinstance(text, str) and not text.strip():
            raise ConfigError(f"{number} {what} is {text!r}, which is empty: leave it out, or write something in it")
    return texts, single


def whole(*, least: int = 1, **knob) -> int:
    """The one knob that is given, once it is sure that it is a whole number from `least` on."""
    (name, number), = knob.items()
    if isinstance(number, bool) or not isinstance(number, numbers.Integral) or number < least:
        raise ConfigError(f"{name}={number!r}: pass a whole number from {least} on")
    return int(number)


def fitting(n: int) -> int:
    """The length that a row of n tokens is padded to: 8, 12, 16, 20, 24, 28, 32, 40, ..: at most a quarter as much
    again beyond the shortest, since a CPU takes as much longer; and four programs each time that lengths double."""
    step = 2 ** max(2, (n - 1).bit_length() - 3)
    return max(8, -(-n // step) * step)


def softmax(x_BC: np.ndarray) -> np.ndarray:
    e_BC = np.exp(x_BC - x_BC.max(-1, keepdims=True))
    return e_BC / e_BC.sum(-1, keepdims=True)


@partial(jax.jit, static_argnames="at")
def _looked(model, batch, at):
    return at(model, jax.tree.map(lambda a_BT: parallel.constrain(a_BT, "BT"), batch))
