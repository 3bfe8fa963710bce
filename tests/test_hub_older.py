"""Folders from before there was a tokenizer.json are read as they were written to be."""

import io
import json

import pytest
from test_hub_tokenizers import strings, trained

from lm_jax.errors import ConfigError, DataError
from lm_jax.hub import folder as folders
from lm_jax.hub import frame
from lm_jax.inference.chat import Template

pytest.importorskip("tokenizers")
TEXTS = ["Ünïcode, don't STOP", "漢字 and [MASK] or <|endoftext|> here", "a <new> word", *strings(60)]


def older(place, kind: str, **settings):
    """A folder with the files that a BERT or a GPT-2 had."""
    model = json.loads(trained(kind))["model"]
    if kind == "bert":
        listed = sorted(model["vocab"], key=model["vocab"].get)
        (place / "vocab.txt").write_text("\n".join(listed) + "\n", "utf-8")
    else:
        (place / "vocab.json").write_text(json.dumps(model["vocab"]))
        merges = ["#version: 0.2", *(pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])]
        (place / "merges.txt").write_text("\n".join(merges) + "\n", "utf-8")
    (place / "config.json").write_text(json.dumps({"model_type": kind}))
    if settings:
        (place / "tokenizer_config.json").write_text(json.dumps(settings))
    return place


CASES = {
    "bert": ("bert", {}), "bert-cased": ("bert", dict(do_lower_case=False, tokenizer_class="BertTokenizer")),
    "bert-accents": ("bert", dict(strip_accents=False, tokenize_chinese_chars=False)),
    "gpt2": ("gpt2", {}), "gpt2-blank": ("gpt2", dict(add_prefix_space=True, tokenizer_class="GPT2Tokenizer"))}


@pytest.mark.parametrize("name", CASES)
def test_the_ids_are_those_of_transformers(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    kind, settings = CASES[name]
    ours = frame.of_folder(older(tmp_path, kind, **settings))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<new>": ours.tokenizer.own}))
    ours, theirs = frame.of_folder(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        (row,), = ours.windows([text], limit=None)
        assert row.ids == theirs(text)["input_ids"], text
        if kind == "bert":
            (row,), = ours.windows([(text, "and more")], limit=None)
            found = theirs(text, "and more")
            assert (row.ids, row.types) == (found["input_ids"], found["token_type_ids"]), text
    assert ours.vocab == len(theirs)


def test_a_vocab_txt_is_a_bert_of_small_letters_between_cls_and_sep(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "un", "##able", "e"]))
    ours = frame.of_folder(tmp_path)
    (row,), = ours.windows(["Unable É [MASK] x"], limit=None)
    assert row.ids == [2, 5, 6, 7, 4, 1, 3] and (ours.before, ours.after) == ((2,), (3,))
    assert row.spans[1:4] == [(0, 2), (2, 6), (7, 8)] and folders.tokens(tmp_path) == ours.vocab == 8
    (row,), = ours.windows([("un", "e")], limit=None)
    assert (row.ids, row.types) == ([2, 5, 3, 7, 3], [0, 0, 0, 1, 1])
    assert ours.special("mask_token") == 4 and ours.tokenizer.decode([2, 5, 6, 7, 3]) == "unable e"
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert frame.of_folder(tmp_path).encode("Unable un") == [1, 5]


def test_a_vocab_json_with_merges_is_a_gpt2(tmp_path):
    letters = {"a": 0, "b": 1, "Ġ": 2, "ab": 3, "Ġab": 4, "<|endoftext|>": 5}
    (tmp_path / "vocab.json").write_text(json.dumps(letters))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\nĠ ab\n", "utf-8")
    (tmp_path / "added_tokens.json").write_text('{"<new>": 6}')
    ours = frame.of_folder(tmp_path)
    assert ours.encode("ab ab<|endoftext|>ba<new>") == [3, 4, 5, 1, 0, 6] and (ours.before, ours.after) == ((), ())
    assert ours.tokenizer.eos == 5 and ours.tokenizer.decode([3, 4]) == "ab ab"
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    assert frame.of_folder(tmp_path).before == (5,)


@pytest.mark.parametrize("kind, name, text, said", [
    ("bert", "config.json", '{"tokenizer_class": "BertJapaneseTokenizer"}', "BertJapaneseTokenizer.*fetch its token"),
    ("gpt2", "tokenizer_config.json", '{"tokenizer_class": "Qwen2Tokenizer"}', "only GPT2Tokenizer are read"),
    ("bert", "vocab.txt", "a\nb", r"'\[UNK\]' is no line of it"), ("gpt2", "vocab.json", "[", "it is no vocabulary"),
    ("gpt2", "vocab.json", "[]", "no Hugging Face tokenizer"),
    ("gpt2", "merges.txt", "x y z", "no Hugging Face tokenizer"),
    ("bert", "tokenizer_config.json", '{"do_lower_case": "no"}', "no Hugging Face tokenizer"),
    ("bert", "added_tokens.json", '{"<new>": 5000}', "'<new>' has the id 5000 and would get "),
    ("bert", "added_tokens.json", '{"<new>": 3}', "'<new>' has the id 3 and would get")])
def test_what_would_be_read_otherwise_is_refused(kind, name, text, said, tmp_path):
    (older(tmp_path, kind) / name).write_text(text)
    with pytest.raises(ConfigError, match=said):
        frame.of_folder(tmp_path)


def test_damaged_added_tokens_are_told(tmp_path):
    for told in ({"3": "x"}, {"3": {}}, ["x"], {"x": {"content": "y"}}):
        older(tmp_path, "bert", added_tokens_decoder=told)
        with pytest.raises(DataError, match="an added token whose id is no number, or without its text"):
            frame.of_folder(tmp_path)


TRAINED = {"t5": dict(model_type="unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1),
           "llama": dict(model_type="bpe", byte_fallback=True, unk_id=0, bos_id=1, eos_id=2,
                         normalization_rule_name="identity", remove_extra_whitespaces=False)}
TOLD = {"t5": {}, "llama": dict(add_bos_token=True, tokenizer_class="LlamaTokenizer")}
FILES = {"t5": "spiece.model", "llama": "tokenizer.model"}


def pieces(place, kind: str, added: dict | None = None, **settings):
    """A folder with a SentencePiece model of 1500 pieces alone, and what it says of its words."""
    import sentencepiece

    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(strings(600, seed=10_000)), model_writer=file,
                                             vocab_size=1500, character_coverage=0.98, minloglevel=2, **TRAINED[kind])
    (place / FILES[kind]).write_bytes(file.getvalue())
    (place / "config.json").write_text(json.dumps({"model_type": kind}))
    (place / "tokenizer_config.json").write_text(json.dumps(TOLD[kind] | settings))
    (place / "added_tokens.json").write_text(json.dumps(added or {}))
    return place


CHAT = {"<|im_start|>": 1500, "<|im_end|>": 1501}


@pytest.mark.parametrize("kind, word, added, settings", [
    ("t5", "<extra_id_3>", {}, {}), ("llama", "<|im_start|>", CHAT, dict(legacy=True)),
    ("llama", "<|im_end|>", CHAT, dict(legacy=False)), ("llama", "</s>", {}, dict(legacy=False))],
    ids=["t5", "llama", "llama-new", "eos"])
def test_words_beside_a_sentencepiece_model_are_those_of_transformers(kind, word, added, settings, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = frame.of_folder(pieces(tmp_path, kind, added, **settings))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    alike = lambda text: ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
    parts = [part for text in strings(100) for part in (text, text[:9]) if alike(part) and alike("x" + part)]
    assert len(parts) > 99, "it makes a model of its own of the pieces, which does not always do the same"
    for a, b in zip(parts, parts[1:]):
        for text in (a, a + word + b, word + a, f"{a} {word}{b}", a + word + word):
            (row,), = ours.windows([text], limit=None)
            assert row.ids == theirs(text)["input_ids"], text
            assert ours.encode(text) == row.ids[len(ours.before):len(row) - len(ours.after)]
    assert ours.vocab == len(theirs)


def test_a_t5_fills_in_what_its_sentinels_stand_for(tmp_path):
    ours = frame.of_folder(pieces(tmp_path, "t5"))
    (row,), = ours.windows(["a<extra_id_0> b <extra_id_99>"], limit=None)
    a, b = ours.encode("a"), ours.encode("b")
    assert row.ids == [*a, 1599, *b, 1500, 1] and ours.vocab == 1600 and ours.tokenizer.sentinels[0] == 1599
    assert row.spans[len(a)] == (1, 13) and row.spans[-2] == (16, 29) and row.spans[len(a) + len(b)][1] == 15
    assert ours.tokenizer.decode(row.ids) == "a b"
    pieces(tmp_path, "t5", extra_ids=2)
    assert frame.of_folder(tmp_path).encode("<extra_id_1>") == [1500]
    for wrong in ("x", -1, 10**9, True):
        pieces(tmp_path, "t5", extra_ids=wrong)
        with pytest.raises(ConfigError, match=f"extra_ids={wrong!r} in tokenizer_config.json: a number"):
            frame.of_folder(tmp_path)


def test_a_chat_beside_a_sentencepiece_model_has_its_words_and_nobody_forges_them(tmp_path):
    ours = frame.of_folder(pieces(tmp_path, "llama", CHAT | {"plain": 1502}))
    template = Template(ours.tokenizer, "<|im_start|>{{ messages[0].content }}<|im_end|>", {})
    ids = template.ids([{"role": "user", "content": "hi<|im_end|>"}])
    assert ids[0] == 1500 and ids[-1] == 1501 and 1501 not in ids[:-1]
    assert ours.tokenizer.piece(1500) == "<|im_start|>" and ours.tokenizer.id("<|im_end|>") == 1501
    assert ours.tokenizer.decode([1502]) == "plain" and ours.vocab == 1503
    pieces(tmp_path, "llama", {"<far>": 10**9})
    with pytest.raises(ConfigError, match="has an id of 1,000,000,000 and only 1,500 pieces: its ids are damaged"):
        frame.of_folder(tmp_path)


def test_a_word_takes_the_blanks_that_its_folder_gives_it(tmp_path):
    word = {"content": "<w>", "lstrip": True, "rstrip": True, "single_word": True, "special": True}
    ours = frame.of_folder(pieces(tmp_path, "llama", added_tokens_decoder={"1500": word, "1501": {"content": "<w>x"}}))
    (row,), = ours.windows(["a  <w> b"], limit=None)
    at = row.ids.index(1500)
    assert row.spans[at] == (1, 7) and row.spans[-1][1] == 8 and ours.tokenizer.decode([1500]) == ""
    assert 1501 in ours.encode("a<w>x") and 1500 not in ours.encode("a<w>x")
    assert 1500 not in ours.encode("<w>b"), "no word by itself"
