"""The three kinds of vocabulary behind `tokenizer.Tokenizer`: bytes, SentencePiece models, Hugging Face files.

Each is the bytes of a file and a table of the bytes that each id stands for. Encoding is the library's; decoding is
the table, so that what was encoded without loss comes back without loss.
"""

import hashlib
import json
import os
import re

import numpy as np

from lm_jax.config import ConfigError

ROLES = ("system", "user", "assistant", "end")
SENTINELS = tuple(f"<extra_id_{i}>" for i in range(100))
NAMES = ("<pad>", "<bos>", "<eos>", "<unk>", "<mask>", "<R>", "<X>", "<S>", *(f"<{role}>" for role in ROLES), *SENTINELS)
OTHER_NAMES = {  # what a special may be called in a vocabulary from elsewhere, the likeliest first
    "<pad>": ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>"),
    "<bos>": ("<s>", "<bos>", "[CLS]", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>"),
    "<eos>": ("</s>", "<eos>", "[SEP]", "<|end_of_text|>", "<|endoftext|>"),
    "<mask>": ("<mask>", "[MASK]"),
}


class Vocabulary:
    """A file, its table of bytes an id, and the special ids found in it or appended behind it."""

    suffix: str  # of the file

    def __init__(self, file: bytes, table: list[bytes | None], find):
        """`table`: None for a special; `find(name)` is its id or None. Those absent get new ids behind the file's.

        Sentinels come first and in falling order, which is where T5 keeps them behind its 32000 pieces.
        """
        ids, end = {}, len(table)
        for name in (*reversed(SENTINELS), *NAMES):
            if name in ids or name == "<unk>":
                continue
            found = [i for i in map(find, OTHER_NAMES.get(name, (name,))) if i is not None]
            ids[name] = found[0] if found else end
            end += not found
        self.pad, self.bos, self.eos, self.mask = (ids[name] for name in ("<pad>", "<bos>", "<eos>", "<mask>"))
        self.modes = tuple(ids[name] for name in ("<R>", "<X>", "<S>"))
        self.chat = {role: ids[f"<{role}>"] for role in ROLES}
        self.sentinels = tuple(ids[name] for name in SENTINELS)
        self.vocab = end
        for i in ids.values():
            table[i:i + 1] = [None]  # in place, or one more at the end
        self.word_starts = np.array([piece is None or _starts_word(piece) for piece in table])
        self._table = [piece or b"" for piece in table]
        self.byte_lengths = np.array([len(piece) for piece in self._table], np.int32)
        self._file = file
        self.digest = hashlib.sha256(type(self).__name__.encode() + b"\0" + file).hexdigest()[:12]

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def decode(self, ids) -> str:
        return b"".join([self._table[i] for i in np.asarray(ids, int).ravel()]).decode(errors="replace")

    def save(self, folder: str) -> None:
        os.makedirs(folder, exist_ok=True)
        saved = {"backend": type(self).__name__, "file": f"tokenizer{self.suffix}", "digest": self.digest}
        with open(os.path.join(folder, saved["file"]), "wb") as file:
            file.write(self._file)
        with open(os.path.join(folder, "saved.json"), "w", encoding="utf-8") as file:
            json.dump(saved, file)


class Bytes(Vocabulary):
    """The specials, then the 256 bytes; padded to 384 ids, a multiple of 128 that divides well over devices."""

    suffix = ".bytes"

    def __init__(self, file: bytes = b""):
        self._first = len(NAMES)
        table = [None] * self._first + [bytes([i]) for i in range(256)]
        super().__init__(file, table + [None] * (384 - len(table)), dict(zip(NAMES, range(len(NAMES)))).get)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) + self._first for text in texts]


class Pieces(Vocabulary):
    """A SentencePiece model. One trained here is lossless; one from elsewhere is as lossless as it was made."""

    suffix = ".model"
    blank = "\u2581"  # how SentencePiece writes a space inside a piece

    def __init__(self, file: bytes):
        import sentencepiece  # a quarter of a second, and not everyone needs it

        try:
            self._model = model = sentencepiece.SentencePieceProcessor(model_proto=file)
        except RuntimeError as error:
            raise ConfigError(f"data.tokenizer is no SentencePiece model: {error}") from error
        names = [model.id_to_piece(i) for i in range(len(model))]
        found = {name: i for i, name in enumerate(names)}
        super().__init__(file, [self._bytes(i, name) for i, name in enumerate(names)], found.get)
        self._prefix = model.encode("a", out_type=str)[0].startswith(self.blank)  # a blank before every text
        escape = [found.get(f"<0x{byte:02X}>") for byte in self.blank.encode()]
        self._escape = None if None in escape or self._prefix else np.array(escape, np.int32)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """To SentencePiece a literal U+2581 is a space, so it is spelled in bytes where the model has them."""
        if self._escape is None or not any(self.blank in text for text in texts):
            return [np.array(ids, np.int32) for ids in self._model.encode(texts)]
        return [self._escaped(text) for text in texts]

    def decode(self, ids) -> str:
        text = super().decode(ids)
        return text.removeprefix(" ") if self._prefix else text

    def _escaped(self, text: str) -> np.ndarray:
        parts = [np.array(ids, np.int32) for ids in self._model.encode(text.split(self.blank))]
        return np.concatenate([parts[0], *(part for later in parts[1:] for part in (self._escape, later))])

    def _bytes(self, i: int, name: str) -> bytes | None:
        if self._model.is_byte(i):
            return bytes([int(name[1:-1], 16)])
        if self._model.is_control(i):
            return None
        return "\ufffd".encode() if self._model.is_unknown(i) else name.replace(self.blank, " ").encode()


BACKENDS = {"Bytes": Bytes, "Pieces": Pieces}


def _starts_word(piece: bytes) -> bool:
    """Whether whole-word masking begins a word at this piece: at a blank, a symbol or an ideograph, not inside letters."""
    first = piece.decode(errors="ignore")[:1]
    return bool(first) and (not (first.isalnum() or first == "_") or "\u2e80" <= first <= "\u9fff")
