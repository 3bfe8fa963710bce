"""Tokenizers of folders from before there was a tokenizer.json, as the tokenizer.json that they mean."""

import json

from lm_jax.errors import ConfigError
from lm_jax.hub.vocabulary import spec

BERT = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]", "mask_token": "[MASK]"}
GPT2 = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}


def word_pieces(listed: bytes, settings: dict, added: dict[int, dict]) -> bytes:
    """Of a BERT's vocab.txt, a piece on each line: words, of which those without a piece are cut from the left (Wu et
    al. 2016), between [CLS] and [SEP]. Where its settings say nothing, letters are made small and lose their accents.
    """
    _check_class(settings, "vocab.txt", "BertTokenizer", "DistilBertTokenizer")
    vocab = {piece: i for i, piece in enumerate(_text(listed, "vocab.txt").removesuffix("\n").split("\n"))}
    words = {name: _word(settings.get(name)) or word for name, word in BERT.items()}
    if gone := [words[name] for name in ("unk_token", "cls_token", "sep_token") if words[name] not in vocab]:
        raise ConfigError(f"{gone[0]!r} is no line of it: put its name there into tokenizer_config.json")
    cls, sep = words["cls_token"], words["sep_token"]
    one = [_special(cls), _sequence("A"), _special(sep)]
    frame = {"type": "TemplateProcessing", "single": one, "pair": [*one, _sequence("B", 1), _special(sep, 1)],
             "special_tokens": _used(vocab, cls, sep)}
    core = {"type": "WordPiece", "unk_token": words["unk_token"], "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": vocab}
    small = settings.get("do_lower_case", True)
    normalizer = {"type": "BertNormalizer", "clean_text": True, "lowercase": small,
                  "handle_chinese_chars": settings.get("tokenize_chinese_chars", True),
                  "strip_accents": settings.get("strip_accents")}  # null: as `lowercase`
    return _file(core, _specials(vocab, words) | added, normalizer=normalizer, post_processor=frame,
                 pre_tokenizer={"type": "BertPreTokenizer"},
                 decoder={"type": "WordPiece", "prefix": "##", "cleanup": True})


def byte_pairs(listed: bytes, merges: bytes, settings: dict, added: dict[int, dict]) -> bytes:
    """Of a GPT-2's vocab.json and merges.txt: bytes as letters, and the pairs that are joined, the first before all."""
    _check_class(settings, "vocab.json with merges.txt", "GPT2Tokenizer")
    try:
        vocab = json.loads(listed)
        words = {name: _word(settings.get(name)) or word for name, word in GPT2.items()}
        specials = _specials(vocab, words)
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"it is no vocabulary ({error}): fetch it again") from error
    pairs = [line.split(" ") for line in _text(merges, "merges.txt").split("\n") if line]
    core = {"type": "BPE", "continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": False, "vocab": vocab,
            "merges": pairs[1:] if pairs and pairs[0][0] == "#version:" else pairs}
    level = {"type": "ByteLevel", "add_prefix_space": settings.get("add_prefix_space", False), "trim_offsets": False,
             "use_regex": True}
    frame, bos = level, words["bos_token"]
    if settings.get("add_bos_token"):
        one = [_special(bos), _sequence("A")]
        frame = {"type": "TemplateProcessing", "single": one, "pair": [*one, _sequence("B", 1)],
                 "special_tokens": _used(vocab, bos)}
    return _file(core, specials | added, pre_tokenizer=level, decoder=level, post_processor=frame)


def _check_class(settings, file, *known):
    """Refuse the files of tokenizers that cut words otherwise."""
    told = settings.get("tokenizer_class")
    if told and str(told).removesuffix("Fast") not in known:
        raise ConfigError(f"tokenizer_class={told!r}: of a folder with {file} alone only {' and '.join(known)} are "
                          "read; fetch its tokenizer.json, or write one: AutoTokenizer.from_pretrained(folder)"
                          ".save_pretrained(folder)")


def _text(file: bytes, name: str) -> str:
    try:
        return file.decode().replace("\r\n", "\n")
    except ValueError as error:
        raise ConfigError(f"{name} is no text ({error}): fetch it again") from error


def _word(told) -> str | None:
    return told.get("content") if isinstance(told, dict) else told


def _specials(vocab, words) -> dict[int, dict]:
    return {vocab[word]: {"id": vocab[word], "content": word, "special": True}
            for word in words.values() if word in vocab}


def _special(word, kind=0) -> dict:
    return {"SpecialToken": {"id": word, "type_id": kind}}


def _sequence(name, kind=0) -> dict:
    return {"Sequence": {"id": name, "type_id": kind}}


def _used(vocab, *words) -> dict:
    return {word: {"id": word, "ids": [vocab[word]], "tokens": [word]} for word in words}


def _file(core, added, **parts) -> bytes:
    return json.dumps(spec(core, [added[id] for id in sorted(added)], **parts)).encode()
