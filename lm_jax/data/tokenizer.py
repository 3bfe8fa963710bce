"""Text to ids and back, to the byte: one protocol, three backends, and the training of a vocabulary.

`make` chooses: "bpe" and "unigram" are trained by SentencePiece on a sample of the corpus, "byte" needs no training,
and a path to a SentencePiece `.model` or a Hugging Face `tokenizer.json` is taken as it is. What is trained here is
lossless: identity normalisation, byte fallback, no dummy prefix, whitespace kept, newline a symbol.
"""

import heapq
import io
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np

from lm_jax import disk
from lm_jax.data.tokenizer_backends import BACKENDS, NAMES, Bytes, HuggingFace, Pieces
from lm_jax.errors import ConfigError, DataError


class Tokenizer(Protocol):
    """What the rest of the house knows of a tokenizer. Ids are int32; V is `vocab`, which counts the specials too."""

    vocab: int
    own: int  # ids of its file, before those of specials that it lacks
    pad: int
    bos: int  # begins each document; BERT's [CLS]
    eos: int  # ends each document; BERT's [SEP]
    mask: int
    modes: tuple[int, ...]  # UL2's denoisers: R, X, S
    chat: dict[str, int]  # system, user, assistant, end
    specials: dict[str, int]  # names that its file has as ids and never as text
    sentinels: tuple[int, ...]  # 100 ids; the first corrupted span of a row is sentinels[0]
    digest: str  # of all that decides how text becomes ids
    byte_lengths: np.ndarray  # int32 [V]: bytes of text that an id stands for; specials have 0
    word_starts: np.ndarray  # bool [V]: a word (with the blank before it), a symbol or a special begins here

    def encode(self, text: str) -> np.ndarray: ...  # no specials are added, and none comes from text that spells one

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]: ...

    def decode(self, ids) -> str: ...  # specials are dropped

    def save(self, folder: str) -> None: ...


def make(kind: str, texts: Iterable[str], *, vocab: int, seed: int = 0) -> Tokenizer:
    """The tokenizer that `config.data.tokenizer` asks for; `texts` are read only if one must be trained."""
    if kind in TRAINED:
        return Pieces(train(kind, texts, vocab=vocab, seed=seed))
    if kind == "byte":
        return Bytes()
    if not os.path.isfile(kind):
        raise ConfigError(f"data.tokenizer={kind!r}: no such file; else bpe, unigram or byte")
    backend = HuggingFace if kind.endswith(".json") else Pieces
    with open(kind, "rb") as file:
        data = file.read()
    try:
        return backend(data)
    except ConfigError as error:
        raise ConfigError(f"{kind}: {error}") from error


def load(folder: str) -> Tokenizer:
    """The tokenizer that was saved there. Raises ConfigError if a file is missing or is not what was saved."""
    try:
        saved = disk.parse_json(Path(folder, "saved.json").read_bytes())
        tokenizer = BACKENDS[saved["backend"]](disk.inside(Path(folder), saved["file"]).read_bytes())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"no whole tokenizer in {folder}: {error}; delete the store's manifest.json to build it "
                        "again") from error
    if tokenizer.digest != saved["digest"]:
        raise DataError(f"the tokenizer in {folder} is not the one saved there: delete the store's manifest.json to "
                        "build it again")
    return tokenizer


TRAINED = ("bpe", "unigram")
SAMPLE = 10_000_000  # bytes of text to train on: merges hardly change beyond, and 8192 take seconds
SLICE = 16_384  # characters that are sampled together: a corpus of a single file is sampled from its whole length too
COVERAGE = 0.9995  # of the characters; rarer ones are spelled in bytes


def train(kind: str, texts: Iterable[str], *, vocab: int, seed: int = 0) -> bytes:
    """A lossless SentencePiece model of exactly `vocab` ids, from a sample of `texts`; equal input gives equal bytes.

    Raises ConfigError if the sample is empty, or cannot fill `vocab` ids, or has more characters than ids.
    """
    import sentencepiece

    lines = [line for text in sample(texts, budget=SAMPLE, seed=seed) for line in text.split("\n") if line]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, model_type=kind, vocab_size=vocab,
            normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,  # runs of blanks, as in indented code, become one id
            byte_fallback=True, character_coverage=COVERAGE, split_digits=True,
            max_sentence_length=4 * SLICE,  # in bytes; a longer one would be left out
            user_defined_symbols=["\n"], control_symbols=list(NAMES[4:]),  # control: no text ever becomes one
            pad_id=0, bos_id=1, eos_id=2, unk_id=3, pad_piece="<pad>", bos_piece="<bos>", eos_piece="<eos>",
            seed_sentencepiece_size=max(100_000, 8 * vocab),  # unigram: the default million is slower and no better
            num_threads=4,  # fixed: sums of unigram training depend on it
            minloglevel=2)
    except RuntimeError as error:
        raise ConfigError(_cure(kind, str(error), vocab, lines)) from error
    return model.getvalue()


def sample(texts: Iterable[str], *, budget: int, seed: int) -> list[str]:
    """Slices of `texts` of about `budget` bytes in all, each as likely as any other; in the order of the corpus.

    Each slice draws a number and the smallest are kept, so one pass and `budget` memory do for a corpus of any size.
    """
    rng = np.random.default_rng(seed)
    heap: list[tuple[float, int, int, str]] = []  # (-number, order, bytes, slice): the first to leave is on top
    held = count = 0
    for text in texts:
        for at in range(0, len(text), SLICE):
            drawn, count = rng.random(), count + 1
            if held >= budget and -drawn < heap[0][0]:
                continue
            piece = text[at : at + SLICE]
            heapq.heappush(heap, (-drawn, count, len(piece.encode()), piece))
            held += len(piece.encode())
            while held - heap[0][2] >= budget:
                held -= heapq.heappop(heap)[2]
    return [piece for _, _, _, piece in sorted(heap, key=lambda item: item[1])]


def _cure(kind: str, error: str, vocab: int, lines: list[str]) -> str:
    if not lines:
        return f"data.tokenizer={kind!r} has no text to train on: are the sources empty?"
    if fits := re.search(r"<= (\d+)", error):
        return f"data.vocab={vocab} is more than this corpus can fill: use at most {fits[1]}, or more text"
    if least := re.search(r"(\d+) vs (\d+)", error):
        return f"data.vocab={vocab} cannot hold specials, bytes and characters of the corpus: use at least {least[2]}"
    return f"data.tokenizer={kind!r} could not be trained with data.vocab={vocab}: {error}"
