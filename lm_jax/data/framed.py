"""Texts as models of published weights read them: one or two between special tokens, cut into windows where they are
too long, and of each token where it stands in its text."""

import json
from dataclasses import dataclass
from pathlib import Path

from lm_jax.data.tokenizer_backends import OTHER_NAMES, library
from lm_jax.errors import ConfigError

NAMES = {"mask_token": OTHER_NAMES["<mask>"], "cls_token": ("[CLS]",), "unk_token": ("[UNK]", "<unk>")}  # if not told


@dataclass(frozen=True)
class Row:
    """Tokens that a model reads together.

    Of each: its id, its type (what a BERT adds for the second text), which characters [start, end) of its text it is,
    its word there, and which text, 0 or 1, that is: None for a token of the frame, as for the word of what has none.
    """

    ids: list[int]
    types: list[int]
    spans: list[tuple[int, int]]
    words: list[int | None]
    texts: list[int | None]

    def __len__(self):
        return len(self.ids)


def tokenizer(folder: Path, settings: dict):
    """The tokenizer of a folder as transformers saves it: `Template` or `Pieces`; `settings` are those of its
    tokenizer_config.json."""
    for name, kind in KINDS.items():
        if (folder / name).is_file():
            try:
                return kind((folder / name).read_bytes(), settings)
            except ConfigError as error:
                raise ConfigError(f"{folder / name}: {error}") from error
    raise ConfigError(f"{folder} has no tokenizer: put the {', '.join(list(KINDS)[:-1])} or {list(KINDS)[-1]} that its "
                      "model was trained with beside its weights")


class Template:
    """A `tokenizer.json` with its own template of special tokens, which a text may spell."""

    def __init__(self, file: bytes, settings: dict):
        self.settings, self._model = settings, library(file)
        spec = json.loads(file)["model"]
        self.whole_words = bool(spec.get("continuing_subword_prefix"))  # whether pieces tell where a word goes on

    def windows(self, texts: list, *, limit: int | None, overlap: int = 0, cut: str = "longest_first"):
        """For each text, or pair of texts, its Rows of at most `limit` tokens, neighbours sharing `overlap` tokens.

        `cut` says which of a pair is cut: "only_first", "only_second" or "longest_first". ConfigError where what may
        not be cut leaves no room.
        """
        self._model.no_truncation()
        if limit is not None:
            self._check_room(texts, limit, overlap, cut)
            self._model.enable_truncation(limit, stride=overlap, strategy=cut)
        found = self._model.encode_batch([text if isinstance(text, str) else tuple(text) for text in texts])
        return [[_row(one) for one in (whole, *whole.overflowing)] for whole in found]

    def special(self, name: str) -> int | None:
        """The id of "mask_token" and its like; None if it has none."""
        told = self.settings.get(name)
        told = told["content"] if isinstance(told, dict) else told
        found = (self._model.token_to_id(each) for each in ((told,) if told else NAMES[name]))
        return next((id for id in found if id is not None), None)

    def id(self, piece: str) -> int | None:
        return self._model.token_to_id(piece)

    def piece(self, id: int) -> str:
        return self._model.id_to_token(id)

    def joined(self, pieces: list[str]) -> str:
        """Pieces, such as those of a word, as text."""
        return self._model.decoder.decode(pieces) if self._model.decoder else " ".join(pieces)

    def decode(self, ids, *, specials: str = "drop") -> str:
        return self._model.decode([int(id) for id in ids], skip_special_tokens=specials == "drop")

    def _check_room(self, texts, limit, overlap, cut):
        """Refuse what the package would panic of, or fail at without a word."""
        pairs = [text for text in texts if not isinstance(text, str)]
        room = limit - self._model.num_special_tokens_to_add(bool(pairs))
        if room <= overlap:
            raise ConfigError(_no_room(limit, overlap))
        if cut != "longest_first" and pairs:
            whole, other = ([len(one) for one in self._model.encode_batch_fast(part, add_special_tokens=False)]
                            for part in (zip(*pairs) if cut == "only_second" else reversed([*zip(*pairs)])))
            if any(a + b > room and room - a <= overlap for a, b in zip(whole, other)):
                raise ConfigError(_no_room(limit, overlap))


class Pieces:
    """A SentencePiece model: <s> before a text if it is a LLaMA's, </s> behind if it is a T5's."""

    whole_words = False

    def __init__(self, file: bytes, settings: dict):
        import sentencepiece

        try:
            self._model = model = sentencepiece.SentencePieceProcessor(model_proto=file)
        except RuntimeError as error:
            raise ConfigError(f"no SentencePiece model: {error}") from error
        llama = model.bos_id() >= 0
        self._before = [model.bos_id()] * settings.get("add_bos_token", llama)
        self._after = [model.eos_id()] * settings.get("add_eos_token", not llama)

    def windows(self, texts: list, *, limit: int | None, overlap: int = 0, cut: str = "longest_first"):
        """As those of a `Template`."""
        return [list(self._windows(text, limit, overlap)) for text in texts]

    def special(self, name: str) -> int | None:
        return {"unk_token": self._model.unk_id()}.get(name)

    def id(self, piece: str) -> int | None:
        found = self._model.piece_to_id(piece)
        return None if self._model.is_unknown(found) else found

    def piece(self, id: int) -> str:
        return self._model.id_to_piece(id)

    def joined(self, pieces: list[str]) -> str:
        return self._model.decode_pieces(pieces)

    def decode(self, ids, *, specials: str = "drop") -> str:
        return self._model.decode([int(id) for id in ids])

    def _windows(self, text, limit, overlap):
        if not isinstance(text, str):
            raise ConfigError("two texts at once need a tokenizer.json, which says how they are put together: this "
                              "folder has a SentencePiece model alone")
        found = self._model.encode(text, return_type="offset_mapping")
        found = list(zip(found["ids"], found["offsets"]))
        room = (limit or len(found) + 2) - len(self._before) - len(self._after)
        if room <= overlap:
            raise ConfigError(_no_room(limit, overlap))
        for at in range(0, max(len(found) - overlap, 1), room - overlap):
            part = found[at:at + room]
            ids = [*self._before, *(id for id, _ in part), *self._after]
            framed = lambda values, empty: [empty] * len(self._before) + values + [empty] * len(self._after)
            yield Row(ids, [0] * len(ids), framed([span for _, span in part], (0, 0)),
                      [None] * len(ids), framed([0] * len(part), None))


KINDS = {"tokenizer.json": Template, "tokenizer.model": Pieces, "spiece.model": Pieces}


def _row(found) -> Row:
    texts = [None if framing else text for text, framing in zip(found.sequence_ids, found.special_tokens_mask)]
    return Row(found.ids, found.type_ids, found.offsets, found.word_ids, texts)


def _no_room(limit, overlap) -> str:
    shared = f" of which windows share {overlap}" if overlap else ""
    return f"no room for a text in {limit} tokens{shared}: pass a shorter question, fewer shared tokens or more in all"
