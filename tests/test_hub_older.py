"""Folders from before there was a tokenizer.json are read as they were written to be."""

import json

import pytest
from test_hub_tokenizers import strings, trained

from lm_jax.errors import ConfigError, DataError
from lm_jax.hub import folder as folders
from lm_jax.hub import frame

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
