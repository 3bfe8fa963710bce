import argparse
import functools
import inspect
import io
import json
import logging
import tarfile

import numpy as np
import pytest

from lm_jax.config import ConfigError
from lm_jax.data import tokenizer

KINDS = ("byte", "bpe", "unigram")
SCRIPTS = ("abcdef XYZ 012389 _.,;()[]{}'\"", " \t\n\r\v\f\0\x01\x7f\u2028\u3000\ufeff", "äßéñ", "αβγдж", "漢字かな한글",
           "שלוםمرحبا", "हिन्दी", "🙂👩‍👩‍👧🏳️‍🌈\U0010ffff", "\u2581\u2585\ufffd\u2047", "<eos><mask><0x41>", "e\u0301ﬁＡ½")


@functools.cache
def corpus():
    """A few modules of code and prose, 400 kB."""
    return tuple(inspect.getsource(module) for module in (inspect, argparse, logging, tarfile))


@functools.cache
def made(kind):
    return tokenizer.make(kind, corpus(), vocab=1024)


def hard_texts(count):
    rng = np.random.default_rng(0)
    words = ["<eos>", "<extra_id_0>", "<0x0A>", "\r\n", "\n\n\n", "        ", "\u2581\u2581", "def f(x):", "\0"]
    pool = [*words, *SCRIPTS, *"".join(SCRIPTS), *map(chr, range(0x20, 0x250)), *map(chr, range(0x1F300, 0x1F400))]
    yield from ("", " ", "\n", "\u2581", "\u2581 \u2581", "  a  ", "\r", "\x00")
    for _ in range(count):
        yield "".join(pool[i] for i in rng.integers(len(pool), size=rng.integers(1, 30)))


@pytest.mark.parametrize("kind", KINDS)
def test_any_text_comes_back_to_the_byte(kind):
    coder, texts = made(kind), list(hard_texts(1000))
    for text, ids in zip(texts, coder.encode_batch(texts), strict=True):
        assert ids.dtype == np.int32 and coder.decode(ids) == text
        assert (ids == coder.encode(text)).all()
        assert coder.byte_lengths[ids].sum() == len(text.encode())


@pytest.mark.parametrize("kind", KINDS)
def test_specials_have_their_places_and_stand_for_no_text(kind):
    coder = made(kind)
    assert (coder.pad, coder.bos, coder.eos, coder.mask, coder.modes) == (0, 1, 2, 4, (5, 6, 7))
    assert coder.chat == {"system": 8, "user": 9, "assistant": 10, "end": 11}
    assert tuple(coder.sentinels) == tuple(range(12, 112))
    assert coder.vocab == len(coder.byte_lengths) == len(coder.word_starts) == (384 if kind == "byte" else 1024)
    specials = [0, 1, 2, *range(4, 112)]
    assert not coder.byte_lengths[specials].any() and coder.word_starts[specials].all()
    assert coder.decode([1, *coder.encode("a b"), 4, 12, 2, 0]) == "a b"


@pytest.mark.parametrize("kind", KINDS)
def test_text_that_spells_a_special_never_becomes_one(kind):
    coder = made(kind)
    for name in ("<pad>", "<bos>", "<eos>", "<unk>", "<mask>", "<R>", "<system>", "<extra_id_7>"):
        ids = coder.encode(f"x {name}{name}")
        assert ids.min() >= 112 and coder.decode(ids) == f"x {name}{name}"


@pytest.mark.parametrize("kind", ("bpe", "unigram"))
def test_training_again_gives_the_same_tokenizer(kind):
    assert tokenizer.make(kind, iter(corpus()), vocab=1024).digest == made(kind).digest
    assert tokenizer.make(kind, corpus()[1:], vocab=1024).digest != made(kind).digest


def test_trained_tokenizers_compress_and_keep_newlines_digits_and_indentation_apart():
    text = corpus()[0]
    assert len(text.encode()) / len(made("bpe").encode(text)) > 2.5
    assert len(text.encode()) / len(made("unigram").encode(text)) > 2.3
    coder = made("bpe")
    assert len(coder.encode("\n\n")) == 2  # newline is a symbol that merges with nothing
    assert len(coder.encode("        ")) == 1  # and indentation one piece
    years = tokenizer.make("bpe", ["1999 1999 1999 wordy wordless\n" * 9], vocab=384)
    assert len(years.encode("1999")) == 4 and len(years.encode("word")) < 4  # a number is its digits


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_tokenizer_is_the_same_when_loaded_and_a_changed_one_is_refused(kind, tmp_path):
    coder = made(kind)
    coder.save(tmp_path / "t")
    again = tokenizer.load(tmp_path / "t")
    assert again.digest == coder.digest and type(again) is type(coder)
    assert (again.encode(corpus()[0]) == coder.encode(corpus()[0])).all()
    (file,) = (tmp_path / "t").glob("tokenizer.*")
    other = tokenizer.make("bpe", corpus(), vocab=600) if kind != "bpe" else made("unigram")
    file.write_bytes(other.file)
    with pytest.raises(ConfigError, match="build it again"):
        tokenizer.load(tmp_path / "t")
    file.unlink()
    with pytest.raises(ConfigError, match="no whole tokenizer"):
        tokenizer.load(tmp_path / "t")


@pytest.mark.parametrize("kind", ("bpe", "unigram"))
def test_a_vocabulary_the_corpus_cannot_fill_names_the_size_that_fits(kind):
    texts = ["the cat sat on the mat, and the rat sat on the hat\n" * 3] * 3
    with pytest.raises(ConfigError, match=r"data.vocab=8192 .* at most (\d+)") as caught:
        tokenizer.make(kind, texts, vocab=8192)
    fits = int(str(caught.value).split("at most ")[1].split(",")[0])
    assert tokenizer.make(kind, texts, vocab=fits).vocab == fits
    with pytest.raises(ConfigError, match=r"data.vocab=300 .* at least (\d+)"):
        tokenizer.make(kind, texts, vocab=300)
    with pytest.raises(ConfigError, match="no text"):
        tokenizer.make(kind, ["\n"], vocab=512)


def test_training_text_is_a_fair_sample_of_a_corpus_of_any_size():
    texts = (f"{i:07}" + "x" * 93 for i in range(20_000))  # 2 MB
    kept = tokenizer.sample(texts, budget=100_000, seed=0)
    numbers = np.array([int(text[:7]) for text in kept])
    assert len(kept) == 1000 and (np.diff(numbers) > 0).all()
    assert abs(numbers.mean() - 10_000) < 4 * 20_000 / 12**0.5 / 1000**0.5
    pieces = tokenizer.sample(["a" * 1_000_000], budget=100_000, seed=0)
    assert sum(map(len, pieces)) < 100_000 + 2 * tokenizer.SLICE  # one huge document does not come whole
    assert tokenizer.sample(["ab", "c"], budget=100, seed=0) == ["ab", "c"]


def test_words_start_at_blanks_symbols_and_ideographs():
    for kind in KINDS:
        coder = made(kind)
        ids = coder.encode("return argument_value (x)\n")
        words = [coder.decode(word) for word in np.split(ids, np.flatnonzero(coder.word_starts[ids]))]
        assert [word for word in words if word.strip()][:2] == ["return", " argument_value"], kind
        assert coder.word_starts[ids[-1]]  # the newline
    pieces = tokenizer.make("bpe", ["漢字漢字漢字 漢字漢字漢字\n" * 9], vocab=374)
    assert pieces.word_starts[pieces.encode("漢字")].all()


def test_the_model_of_another_house_keeps_its_ids_and_gets_the_missing_specials_behind_them(tmp_path):
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # as T5's: a blank before every text, no byte fallback, no bos
        sentence_iterator=iter(corpus()[0].split("\n")), model_writer=model, model_type="unigram", vocab_size=500,
        seed_sentencepiece_size=10_000, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        minloglevel=2)
    (tmp_path / "t5.model").write_bytes(model.getvalue())
    coder = tokenizer.make(str(tmp_path / "t5.model"), [], vocab=8192)
    assert (coder.pad, coder.eos) == (0, 1)
    assert coder.sentinels == tuple(range(599, 499, -1))  # <extra_id_0> is last, as in T5
    assert {coder.bos, coder.mask, *coder.modes, *coder.chat.values()} == set(range(600, 609)) and coder.vocab == 609
    assert coder.decode(coder.encode("return the value")) == "return the value"
    (tmp_path / "bad.model").write_bytes(b"not a model")
    for path, said in (("bad.model", "no SentencePiece model"), ("none.model", "no such file")):
        with pytest.raises(ConfigError, match=said):
            tokenizer.make(str(tmp_path / path), [], vocab=8192)


def test_a_byte_level_tokenizer_json_is_lossless_too(tmp_path):
    hf = pytest.importorskip("tokenizers")
    source = hf.Tokenizer(hf.models.BPE())
    source.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    source.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False,
                                     initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet())
    source.train_from_iterator(corpus()[:1], trainer)
    source.save(str(tmp_path / "tokenizer.json"))
    coder = tokenizer.make(str(tmp_path / "tokenizer.json"), [], vocab=8192)
    assert coder.bos == coder.eos == 0 and coder.pad == 500 and coder.vocab == 509
    for text in [*hard_texts(200), "<|endoftext|>"]:
        ids = coder.encode(text)
        assert coder.decode(ids) == text and coder.byte_lengths[ids].sum() == len(text.encode()) and 0 not in ids
    coder.save(tmp_path / "saved")
    assert tokenizer.load(tmp_path / "saved").digest == coder.digest


def test_a_wordpiece_tokenizer_json_gives_bert_its_specials(tmp_path):
    hf = pytest.importorskip("tokenizers")
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "##s", "world", ","]
    source = hf.Tokenizer(hf.models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    source.add_special_tokens(pieces[:5])
    source.normalizer, source.pre_tokenizer = hf.normalizers.BertNormalizer(), hf.pre_tokenizers.BertPreTokenizer()
    source.decoder = hf.decoders.WordPiece()
    source.enable_padding(length=20)
    source.enable_truncation(2)
    source.save(str(tmp_path / "tokenizer.json"))
    coder = tokenizer.make(str(tmp_path / "tokenizer.json"), [], vocab=8192)
    assert (coder.pad, coder.bos, coder.eos, coder.mask) == (0, 2, 3, 4)
    ids = coder.encode("Hellos, world")
    assert ids.tolist() == [5, 6, 8, 7] and coder.word_starts[ids].tolist() == [True, False, True, True]
    assert coder.decode([2, *ids, 3, coder.sentinels[0]]) == "hellos, world"
    (tmp_path / "bad.json").write_text(json.dumps({"model": 1}))
    with pytest.raises(ConfigError, match="no Hugging Face tokenizer.json"):
        tokenizer.make(str(tmp_path / "bad.json"), [], vocab=8192)
