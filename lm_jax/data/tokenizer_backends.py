"""The three kinds of vocabulary behind `tokenizer.Tokenizer`: bytes, SentencePiece models, Hugging Face files.

Each is the bytes of a file and a table of the bytes that each id stands for. Encoding is the library's; decoding is
the table, so that what was encoded without loss comes back without loss.
"""

import hashlib
import json
import os
import re
from unicodedata import category

import numpy as np

from lm_jax.config import ConfigError

GAPS = 100  # times more ids than pieces are none of a vocabulary, and a table of them would fill the memory
BLANK = "\u2581"  # how SentencePiece writes a space inside a piece
UNKNOWN = "\ufffd".encode()
ROLES = ("system", "user", "assistant", "end")
SENTINELS = tuple(f"<extra_id_{i}>" for i in range(100))
NAMES = ("<pad>", "<bos>", "<eos>", "<unk>", "<mask>", "<R>", "<X>", "<S>",
         *(f"<{role}>" for role in ROLES), *SENTINELS)  # ids 0, 1, 2, ... of a vocabulary made here
OTHER_NAMES = {  # what a special may be called in a vocabulary from elsewhere, the likeliest first
    "<pad>": ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>"),
    "<bos>": ("<s>", "<bos>", "[CLS]", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>"),
    "<eos>": ("</s>", "<eos>", "[SEP]", "<|end_of_text|>", "<|endoftext|>"),
    "<mask>": ("<mask>", "[MASK]"),
}


class Vocabulary:
    """A file, its table of bytes an id, and the special ids found in it or appended behind it."""

    suffix: str  # of the file
    whole_words = False  # whether pieces tell where a word goes on

    def __init__(self, file: bytes, table: list[bytes | None], specials: dict[str, int]):
        """`table`: None for a special; `specials` are those of the file. Those absent get new ids behind the file's.

        Sentinels come first and in falling order, which is where T5 keeps them behind its 32000 pieces.
        """
        self.own = len(table)  # ids of the file; those from here on are known to nobody else
        ids, end = {}, len(table)
        for name in (*reversed(SENTINELS), *NAMES):
            if name in ids or name == "<unk>":
                continue
            found = [i for i in map(specials.get, OTHER_NAMES.get(name, (name,))) if i is not None]
            ids[name] = found[0] if found else end
            end += not found
        self.pad, self.bos, self.eos, self.mask = (ids[name] for name in ("<pad>", "<bos>", "<eos>", "<mask>"))
        self.modes = tuple(ids[name] for name in ("<R>", "<X>", "<S>"))
        self.chat = {role: ids[f"<{role}>"] for role in ROLES}
        self.sentinels = tuple(ids[name] for name in SENTINELS)
        self.specials, self.vocab = specials, end
        for i in ids.values():
            table[i:i + 1] = [None]  # in place, or one more at the end
        self.word_starts = np.array([piece is None or _starts_word(piece) for piece in table])
        self._table = [piece or b"" for piece in table]
        self.byte_lengths = np.array([len(piece) for piece in self._table], np.int32)
        self.file = file
        self.digest = hashlib.sha256(type(self).__name__.encode() + b"\0" + file).hexdigest()[:12]

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def decode(self, ids) -> str:
        known = (i for i in np.asarray(ids, int).ravel() if i < len(self._table))  # a model's table may be longer
        return b"".join([self._table[i] for i in known]).decode(errors="replace")

    def save(self, folder: str) -> None:
        os.makedirs(folder, exist_ok=True)
        saved = {"backend": type(self).__name__, "file": f"tokenizer{self.suffix}", "digest": self.digest}
        with open(os.path.join(folder, saved["file"]), "wb") as file:
            file.write(self.file)
        with open(os.path.join(folder, "saved.json"), "w", encoding="utf-8") as file:
            json.dump(saved, file)


class Bytes(Vocabulary):
    """The specials, then the 256 bytes; padded to 384 ids, a multiple of 128 that divides well over devices."""

    suffix = ".bytes"

    def __init__(self, file: bytes = b""):
        self._first = len(NAMES)
        table = [None] * self._first + [bytes([i]) for i in range(256)]
        super().__init__(file, table + [None] * (384 - len(table)), dict(zip(NAMES, range(len(NAMES)))))

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) + self._first for text in texts]


class Pieces(Vocabulary):
    """A SentencePiece model. One trained here is lossless; one from elsewhere is as lossless as it was made."""

    suffix = ".model"

    def __init__(self, file: bytes, added: dict[int, dict] | None = None):
        """`added`: tokens that a folder puts behind its pieces: of each its "content" and whether it is "special"."""
        self.model = model = sentences(file)
        controls = {model.id_to_piece(i): i for i in range(len(model)) if model.is_control(i)}  # no text becomes these
        self._added = {id: token["content"] for id, token in (added or {}).items() if id >= len(model)}
        _check_gaps(max(self._added, default=-1), len(model))
        table = [self._bytes(i) for i in range(len(model))]
        table += [None] * (1 + max(self._added, default=-1) - len(model))
        for id, word in self._added.items():
            table[id] = None if added[id]["special"] else word.encode()
        super().__init__(file, table, controls | {word: id for id, word in self._added.items()})
        self._prefix = model.encode("a", out_type=str)[0].startswith(BLANK)  # it puts a space before every text
        escape = [model.piece_to_id(f"<0x{byte:02X}>") for byte in BLANK.encode()]
        self._escape = None if self._prefix or not all(map(model.is_byte, escape)) else np.array(escape, np.int32)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """To SentencePiece a literal U+2581 is a space, so it is spelled in bytes where the model has them."""
        if self._escape is None or not any(BLANK in text for text in texts):
            return [np.array(ids, np.int32) for ids in self.model.encode(texts)]
        return [self._escaped(text) for text in texts]

    def decode(self, ids) -> str:
        text = super().decode(ids)
        return text.removeprefix(" ") if self._prefix else text

    def id(self, piece: str) -> int | None:
        found = self.model.piece_to_id(piece)
        return self.specials.get(piece) if self.model.is_unknown(found) else found

    def piece(self, id: int) -> str:
        return self._added[id] if id in self._added else self.model.id_to_piece(id)

    def joined(self, pieces: list[str]) -> str:
        return self.model.decode_pieces(pieces)

    def _escaped(self, text: str) -> np.ndarray:
        first, *rest = [np.array(ids, np.int32) for ids in self.model.encode(text.split(BLANK))]
        return np.concatenate([first, *(part for later in rest for part in (self._escape, later))])

    def _bytes(self, i: int) -> bytes | None:
        piece = self.model.id_to_piece(i)
        if self.model.is_byte(i):
            return _byte(piece)
        if self.model.is_control(i):
            return None
        return UNKNOWN if self.model.is_unknown(i) else piece.replace(BLANK, " ").encode()


class HuggingFace(Vocabulary):
    """A `tokenizer.json`, run by the `tokenizers` package without its templates, truncation and padding."""

    suffix = ".json"

    def __init__(self, file: bytes):
        self.model = model = library(file)
        model.encode_special_tokens = True  # text that spells a special is text
        spec, added = json.loads(file), model.get_added_tokens_decoder()
        specials = {token.content: i for i, token in added.items() if token.special}
        last = max(model.get_vocab().values(), default=-1)
        _check_gaps(last, len(model.get_vocab()))
        table: list[bytes | None] = [None] * (1 + last)
        spell = _speller(spec)
        for piece, i in model.get_vocab().items():
            table[i] = None if piece in specials else piece.encode() if i in added else spell(piece)
        self.whole_words = bool(spec["model"].get("continuing_subword_prefix"))
        super().__init__(file, table, specials)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array(row.ids, np.int32) for row in self.model.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids, *, specials: str = "drop") -> str:
        """The library's own decoding: it knows where a kind of tokenizer (BERT's, T5's) drops or adds spaces."""
        known = [i for i in np.asarray(ids, int).ravel().tolist() if i < self.own]
        return self.model.decode(known, skip_special_tokens=specials == "drop")

    def id(self, piece: str) -> int | None:
        return self.model.token_to_id(piece)

    def piece(self, id: int) -> str:
        return self.model.id_to_token(id)

    def joined(self, pieces: list[str]) -> str:
        return self.model.decoder.decode(pieces) if self.model.decoder else " ".join(pieces)


def sentences(file: bytes):
    """A SentencePiece model, as its package runs it."""
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_proto=file)
    except RuntimeError as error:
        raise ConfigError(f"data.tokenizer is no SentencePiece model: {error}") from error


def library(file: bytes):
    """A tokenizer.json as the `tokenizers` package runs it, without its truncation and padding."""
    try:
        import tokenizers
    except ImportError as error:
        raise ConfigError("a Hugging Face tokenizer.json needs a package: pip install tokenizers") from error
    try:
        model = tokenizers.Tokenizer.from_str(file.decode())
    except Exception as error:  # the package raises bare Exceptions
        raise ConfigError(f"data.tokenizer is no Hugging Face tokenizer.json: {error}") from error
    model.no_truncation()
    model.no_padding()
    return model


BACKENDS = {"Bytes": Bytes, "Pieces": Pieces, "HuggingFace": HuggingFace}


def _check_gaps(last: int, pieces: int):
    if last > GAPS * (pieces + 1):
        raise ConfigError(f"data.tokenizer has an id of {last:,} and only {pieces:,} pieces: its ids are damaged")


def _starts_word(piece: bytes) -> bool:
    """Whether a word (for whole-word masking) begins here: at a blank, a symbol or an ideograph, not inside letters."""
    first = piece.decode(errors="ignore")[:1]
    return bool(first) and (not (category(first)[0] in "LMN" or first == "_") or "\u2e80" <= first <= "\u9fff")


def _byte(piece: str) -> bytes:
    """The byte that <0x1F> stands for."""
    return bytes([int(piece[1:-1], 16)])


def _speller(spec: dict):
    """The function from a piece of this tokenizer.json to the bytes that it stands for inside a text."""
    if spec["model"].get("type") == "WordPiece":
        inside = spec["model"]["continuing_subword_prefix"]
        return lambda piece: piece.removeprefix(inside).encode() if piece.startswith(inside) else b" " + piece.encode()
    if '"ByteLevel"' in json.dumps([spec.get("pre_tokenizer"), spec.get("decoder")]):
        shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2 writes printable bytes as themselves
        hidden = sorted(set(range(256)) - set(shown))  # and the others as the characters from 256 on
        table = {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}
        return lambda piece: bytes(map(table.__getitem__, piece)) if set(piece) <= table.keys() else piece.encode()
    return lambda piece: _byte(piece) if re.fullmatch("<0x[0-9A-F]{2}>", piece) else piece.replace(BLANK, " ").encode()
