"""A tokenizer that was trained here as the files that transformers reads: tokenizer.json and what goes with it.

SentencePiece's two kinds of model are of two kinds in a tokenizer.json as well, with the same pieces, bytes for what no
piece spells, and a space written as U+2581. What cannot be said there: that a literal U+2581 is no space.
"""

import json
from pathlib import Path

from lm_jax import disk
from lm_jax.config import TransformerConfig
from lm_jax.data.tokenizer_backends import BLANK, NAMES, Bytes, HuggingFace, Pieces, Vocabulary

SPECIALS = ("pad", "bos", "eos", "mask")  # as transformers calls them, with "_token" behind


def write(folder: Path, tokenizer: Vocabulary, cfg: TransformerConfig):
    """Write the tokenizer of a model into its folder, into its config.json the ids that begin and end texts, and, of a
    model that writes, how it is spoken with: what ends an answer, and who speaks in a conversation."""
    file = WRITERS[type(tokenizer)](tokenizer)
    words = {token["id"]: token["content"] for token in file["added_tokens"]}
    named = {f"{name}_token": words[getattr(tokenizer, name)] for name in SPECIALS if getattr(tokenizer, name) in words}
    if not isinstance(tokenizer, HuggingFace):
        file["post_processor"] = _template(cfg, tokenizer, words)
    ids = {f"{name}_token_id": getattr(tokenizer, name) for name in ("pad", "bos", "eos")}
    ids |= {"decoder_start_token_id": tokenizer.pad} if cfg.encoder_depth else {}
    writes = cfg.causal and cfg.head == "lm"
    roles = {role: words[id] for role, id in tokenizer.chat.items() if id in words}
    named |= {"chat_template": _chat(**roles)} if writes and len(roles) == len(tokenizer.chat) else {}
    _json(folder / "tokenizer.json", file)
    _json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **named,
                                             "clean_up_tokenization_spaces": False})
    _json(folder / "config.json", disk.read_json(folder / "config.json") | ids)
    if writes:
        _json(folder / "generation_config.json", ids | {"eos_token_id": [tokenizer.eos, tokenizer.chat["end"]]})


def spec(core: dict, added: list[dict], **parts) -> dict:
    """A tokenizer.json of a model, the tokens that were added to it, and its other parts."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    return {"version": "1.0", **empty, **parts, "added_tokens": [flags | token for token in added], "model": core}


def _pieces(tokenizer: Pieces) -> dict:
    model = tokenizer.model
    pieces = [model.id_to_piece(i) for i in range(len(model))]
    special = [i for i in range(len(model)) if model.is_control(i) or model.is_unknown(i)]
    symbols = [i for i in range(len(model)) if pieces[i] == "\n"]  # one that the model finds before all others
    if _unigram(model):
        core = {"type": "Unigram", "unk_id": model.unk_id(), "byte_fallback": True,
                "vocab": [[piece, model.get_score(i)] for i, piece in enumerate(pieces)]}
    else:
        core = {"type": "BPE", "unk_token": pieces[model.unk_id()], "fuse_unk": True, "byte_fallback": True,
                "vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": _merges(model, pieces)}
    spaced = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
    plain = {"type": "Replace", "pattern": {"String": BLANK}, "content": " "}
    back = [plain, {"type": "ByteFallback"}, {"type": "Fuse"}]
    added = [{"id": i, "content": pieces[i], "special": i in special} for i in sorted(special + symbols)]
    return spec(core, added, normalizer=spaced, decoder={"type": "Sequence", "decoders": back})


def _bytes(tokenizer: Bytes) -> dict:
    core = {"type": "BPE", "vocab": {word: i for i, word in enumerate([*NAMES, *_byte_letters()])}, "merges": []}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    added = [{"id": i, "content": name, "special": True} for i, name in enumerate(NAMES)]
    return spec(core, added, pre_tokenizer=level, decoder=level)


WRITERS = {Pieces: _pieces, Bytes: _bytes, HuggingFace: lambda tokenizer: json.loads(tokenizer.file)}


def _template(cfg, tokenizer, words) -> dict:
    """What stands around a text: where its documents began and ended, as the model learned to read them."""
    both = not cfg.causal
    before, after = (both or not cfg.encoder_depth), (both or cfg.encoder_depth > 0)
    special = lambda i: [{"SpecialToken": {"id": words[i], "type_id": 0}}]
    text = lambda name: [{"Sequence": {"id": name, "type_id": int(name == "B")}}]
    around = lambda name: special(tokenizer.bos) * before + text(name) + special(tokenizer.eos) * bool(after)
    used = {words[i]: {"id": words[i], "ids": [i], "tokens": [words[i]]} for i in (tokenizer.bos, tokenizer.eos)}
    pair = around("A") + text("B") + special(tokenizer.eos) * bool(after)
    return {"type": "TemplateProcessing", "single": around("A"), "pair": pair, "special_tokens": used}


def _chat(*, end: str, **roles: str) -> str:
    """A conversation as Jinja: <bos> <user> text <end> <assistant> text <end> <assistant>."""
    refused = "{{ raise_exception('role ' + message['role'] + ': one of " + ", ".join(roles) + "') }}"
    said = "{{ " + str(roles) + "[message['role']] + message['content'] + " + repr(end) + " }}"
    return ("{{ bos_token }}{% for message in messages %}{% if message['role'] not in " + str([*roles]) + " %}" +
            refused + "{% endif %}" + said + "{% endfor %}{% if add_generation_prompt %}{{ " +
            repr(roles["assistant"]) + " }}{% endif %}")


def _unigram(model) -> bool:
    """Scores of a BPE model are ranks, whole and falling; those of a unigram model log-probabilities."""
    scores = [model.get_score(i) for i in range(len(model)) if not (model.is_byte(i) or model.is_control(i))]
    return any(score != int(score) for score in scores)


def _merges(model, pieces) -> list[list[str]]:
    """Pairs of pieces that make a piece, the best first: SentencePiece joins what gives the piece of the best score."""
    joinable = {piece for i, piece in enumerate(pieces)
                if not (model.is_byte(i) or model.is_control(i) or model.is_unknown(i))}
    rank = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for piece in sorted(joinable, key=lambda piece: (-model.get_score(rank[piece]), rank[piece])):
        cuts = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        cuts = [pair for pair in cuts if joinable >= set(pair)]
        merges += [list(pair) for pair in sorted(cuts, key=lambda pair: (rank[pair[0]], rank[pair[1]]))]
    return merges


def _byte_letters() -> list[str]:
    """The letter that stands for each byte where tokens are text (GPT-2): itself if it can be seen, else one beyond."""
    seen = {*range(33, 127), *range(161, 173), *range(174, 256)}
    beyond = iter(range(256, 512))
    return [chr(byte) if byte in seen else chr(next(beyond)) for byte in range(256)]


def _json(file: Path, value):
    disk.replace(file, [json.dumps(value, indent=2, ensure_ascii=False, sort_keys=file.name == "config.json"), "\n"])
