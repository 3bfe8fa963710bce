"""Texts as a folder says that its model reads them: one or two between special tokens, which a text may spell, cut into
windows where they are too long, and of each token where it stands in its text."""

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path

from lm_jax.data.tokenizer_backends import OTHER_NAMES, HuggingFace, Pieces, sentences
from lm_jax.errors import ConfigError, DataError
from lm_jax.hub import older
from lm_jax.hub.folder import read_json

NAMES = {"mask_token": OTHER_NAMES["<mask>"], "cls_token": ("[CLS]",), "unk_token": ("[UNK]", "<unk>")}  # if not told
ANCHOR = "\ue000"  # private use: no piece goes across it


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


def of_folder(folder: Path):
    """The frame of a folder as transformers saves it. ConfigError where it has no tokenizer."""
    settings = _settings(folder)
    added = _added(folder, settings)
    for names, kind in KINDS.items():
        files = [folder / name for name in names.split(" with ")]
        if all(file.is_file() for file in files):
            try:
                return kind(*(file.read_bytes() for file in files), settings, added)
            except ConfigError as error:
                raise ConfigError(f"{files[0]}: {error}") from error
    raise ConfigError(f"{folder} has no tokenizer: put the {', '.join(list(KINDS)[:-1])} or {list(KINDS)[-1]} that its "
                      "model was trained with beside its weights")


class Template:
    """Of a `tokenizer.json`, which has a template of its special tokens."""

    def __init__(self, file: bytes, settings: dict, added: dict[int, dict]):
        self.tokenizer, self.settings = HuggingFace(file), settings
        self.vocab = max(self.tokenizer.own, *(1 + id for id in added), 0)  # ids of texts; a model may have more
        (row,), = self.windows(["a"], limit=None)
        own = [i for i, of in enumerate(row.texts) if of == 0] or [len(row)]
        self.before, self.after = tuple(row.ids[:own[0]]), tuple(row.ids[own[-1] + 1:])

    def encode(self, text: str) -> list[int]:
        """The ids of a text by itself."""
        with self._reading() as model:
            return model.encode(text, add_special_tokens=False).ids

    def windows(self, texts: list, *, limit: int | None, overlap: int = 0, cut: str = "longest_first"):
        """For each text, or pair of texts, its Rows of at most `limit` tokens, neighbours sharing `overlap` tokens.

        `cut` says which of a pair is cut: "only_first", "only_second" or "longest_first". ConfigError where what may
        not be cut leaves no room.
        """
        with self._reading() as model:
            if limit is not None:
                _check_room(model, texts, limit, overlap, cut)
                model.enable_truncation(limit, stride=overlap, strategy=cut)
            found = model.encode_batch([text if isinstance(text, str) else tuple(text) for text in texts])
        return [[_row(one) for one in (whole, *whole.overflowing)] for whole in found]

    def special(self, name: str) -> int | None:
        """The id of "mask_token" and its like; None if it has none."""
        told = self.settings.get(name)
        told = told["content"] if isinstance(told, dict) else told
        found = (self.tokenizer.id(each) for each in ((told,) if told else NAMES[name]))
        return next((id for id in found if id is not None), None)

    @contextlib.contextmanager
    def _reading(self):
        """The package's tokenizer, to which a special token in a text is what it spells."""
        model = self.tokenizer.model
        model.encode_special_tokens = False
        try:
            yield model
        finally:
            model.encode_special_tokens = True
            model.no_truncation()


class Ends:
    """Of a SentencePiece model: <s> before a text if it is a LLaMA's, </s> behind if it is a T5's. The model knows
    nothing of the words that a folder adds: a text is cut at them, and what is between is read by itself."""

    def __init__(self, file: bytes, settings: dict, added: dict[int, dict]):
        model = sentences(file)
        llama = model.bos_id() >= 0
        added = added if llama else _sentinels(len(model), settings.get("extra_ids", 100)) | added
        self.tokenizer, self.settings, self._model = Pieces(file, added), settings, model
        self.vocab = self.tokenizer.own
        self.before = (model.bos_id(),) * settings.get("add_bos_token", llama)
        self.after = (model.eos_id(),) * settings.get("add_eos_token", not llama)
        specials = (i for i in range(len(model)) if model.is_control(i) or model.is_unknown(i))
        words = {model.id_to_piece(i): {"id": i, "content": model.id_to_piece(i)} for i in specials}
        self._words = words | {token["content"]: token for token in added.values()}
        self._word = _pattern(self._words.values())
        self._anchor = ANCHOR if llama and settings.get("legacy") is False else ""

    def encode(self, text: str) -> list[int]:
        return [id for id, _ in self._placed(text)]

    def windows(self, texts: list, *, limit: int | None, overlap: int = 0, cut: str = "longest_first"):
        """As those of a `Template`."""
        return [list(self._windows(text, limit, overlap)) for text in texts]

    def special(self, name: str) -> int | None:
        return {"unk_token": self._model.unk_id()}.get(name)

    def _windows(self, text, limit, overlap):
        if not isinstance(text, str):
            raise ConfigError("two texts at once need a tokenizer.json, which says how they are put together: this "
                              "folder has a SentencePiece model alone")
        found = self._placed(text)
        room = (limit or len(found) + 2) - len(self.before) - len(self.after)
        if room <= overlap:
            raise ConfigError(_no_room(limit, overlap))
        for at in range(0, max(len(found) - overlap, 1), room - overlap):
            part = found[at:at + room]
            ids = [*self.before, *(id for id, _ in part), *self.after]
            framed = lambda values, empty: [empty] * len(self.before) + values + [empty] * len(self.after)
            yield Row(ids, [0] * len(ids), framed([span for _, span in part], (0, 0)),
                      [None] * len(ids), framed([0] * len(part), None))

    def _placed(self, text: str) -> list[tuple[int, tuple[int, int]]]:
        """The ids of a text, each with the characters that it is."""
        found, at = [], 0
        for word in [*self._word.finditer(text), None]:
            anchor = self._anchor if at else ""  # it takes the blank that is put before every text
            hidden = len(self._model.encode(anchor))
            read = self._model.encode(anchor + text[at:word.start() if word else len(text)],
                                      return_type="offset_mapping")
            moved = ((at - len(anchor) + start, at - len(anchor) + end) for start, end in read["offsets"])
            found += [*zip(read["ids"], moved)][hidden:]
            if word:
                found.append((self._words[word[word.lastindex]]["id"], word.span()))
                at = word.end()
        return found


def _older(made):
    """A `Template` out of what `made` makes of a folder's older files."""
    def frame(*files_and_more):
        *_, settings, added = files_and_more
        found = Template(made(*files_and_more), settings, added)
        for id, token in added.items():
            if (there := found.tokenizer.id(token["content"])) != id:
                raise ConfigError(f"the added token {token['content']!r} has the id {id} and would get {there}: fetch "
                                  "the tokenizer.json of this model, or its added_tokens.json again")
        return found
    return frame


Frame = Template | Ends
KINDS = {"tokenizer.json": Template, "tokenizer.model": Ends, "spiece.model": Ends,
         "vocab.txt": _older(older.word_pieces), "vocab.json with merges.txt": _older(older.byte_pairs)}


def _settings(folder: Path) -> dict:
    """What a folder says of its tokenizer; older ones name its class and its special tokens elsewhere."""
    named = read_json(folder / "config.json").get("tokenizer_class")
    return {"tokenizer_class": named} | read_json(folder / "special_tokens_map.json") | read_json(
        folder / "tokenizer_config.json")


def _added(folder: Path, settings: dict) -> dict[int, dict]:
    """Tokens that a folder adds to those of its file, by their ids, each as a tokenizer.json says it."""
    try:
        names = [told for name, told in settings.items() if name.endswith("_token")]
        names += settings.get("additional_special_tokens") or []
        specials = [name["content"] if isinstance(name, dict) else name for name in names]
        found = {int(id): {"content": word, "special": word in specials, "normalized": word not in specials}
                 for word, id in read_json(folder / "added_tokens.json").items()}
        found |= {int(id): token for id, token in (settings.get("added_tokens_decoder") or {}).items()}
        return {id: {"special": False} | token | {"id": id, "content": "" + token["content"]}
                for id, token in found.items()}
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise DataError(f"{folder} has an added token whose id is no number, or without its text ({error}): fetch its "
                        "added_tokens.json and tokenizer_config.json again") from error


def _sentinels(first: int, count) -> dict[int, dict]:
    """What a T5 puts behind its pieces, in falling order, for what is to be filled in."""
    if type(count) is not int or not 0 <= count <= first:
        raise ConfigError(f"extra_ids={count!r} in tokenizer_config.json: a number of tokens is wanted, such as 100")
    ids = range(first + count - 1, first - 1, -1)
    return {id: {"id": id, "content": f"<extra_id_{i}>", "special": True} for i, id in enumerate(ids)}


def _pattern(tokens) -> re.Pattern:
    """Finds tokens in a text, the longest first, each with the blanks around it that it takes and as its last group."""
    each = [r"\s*" * bool(token.get("lstrip")) + r"(?<!\w)" * bool(token.get("single_word")) +
            f"({re.escape(token['content'])})" +
            r"(?!\w)" * bool(token.get("single_word")) + r"\s*" * bool(token.get("rstrip"))
            for token in sorted(tokens, key=lambda token: -len(token["content"])) if token["content"]]
    return re.compile("|".join(each) or "(?!)")  # which is nowhere


def _row(found) -> Row:
    texts = [None if framing else text for text, framing in zip(found.sequence_ids, found.special_tokens_mask)]
    return Row(found.ids, found.type_ids, found.offsets, found.word_ids, texts)


def _check_room(model, texts, limit, overlap, cut):
    """Refuse what the package would panic of, or fail at without a word."""
    pairs = [text for text in texts if not isinstance(text, str)]
    room = limit - model.num_special_tokens_to_add(bool(pairs))
    if room <= overlap:
        raise ConfigError(_no_room(limit, overlap))
    if cut != "longest_first" and pairs:
        whole, other = ([len(one) for one in model.encode_batch_fast(part, add_special_tokens=False)]
                        for part in (zip(*pairs) if cut == "only_second" else reversed([*zip(*pairs)])))
        if any(a + b > room and room - a <= overlap for a, b in zip(whole, other)):
            raise ConfigError(_no_room(limit, overlap))


def _no_room(limit, overlap) -> str:
    shared = f" of which windows share {overlap}" if overlap else ""
    return f"no room for a text in {limit} tokens{shared}: pass a shorter question, fewer shared tokens or more in all"
