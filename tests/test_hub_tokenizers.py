"""A tokenizer from elsewhere gives the ids of the library that it is for, one from here the same ids there."""

import io
import json

import numpy as np
import pytest

from lm_jax.config import ConfigError, TransformerConfig
from lm_jax.data import tokenizer
from lm_jax.data.tokenizer_backends import Bytes, Pieces
from lm_jax.hub import folder, frame, vocabulary
from lm_jax.inference.chat import Template

tokenizers = pytest.importorskip("tokenizers")
SCRIPTS = [(0x41, 0x7A), (0xC0, 0x17F), (0x370, 0x3FF), (0x400, 0x4FF), (0x5D0, 0x5EA), (0x620, 0x64A), (0x900, 0x97F),
           (0xE01, 0xE3A), (0x3041, 0x30FE), (0x4E00, 0x4EFF), (0xAC00, 0xACFF), (0x1F600, 0x1F64F)]
MARKS = " " * 12 + ".,!?-'\"0123456789"


def strings(count: int, seed: int = 0) -> list[str]:
    """Words of ten and more scripts, each string mostly of one; blanks, marks, breaks, and things said twice."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        first, last = SCRIPTS[i % len(SCRIPTS)]
        letters = [chr(c) for c in rng.integers(first, last + 1, 12)] + list(MARKS)
        text = "".join(rng.choice(letters, rng.integers(1, 60)))
        if i % 7 == 0:
            text += "\n" + made[i // 2] + "\t  " + text[:9] if i else "\u3000"
        made.append(text)
    return made


def trained(kind: str) -> bytes:
    """A tokenizer.json of the kind of a family, trained on other strings."""
    t, p = tokenizers, tokenizers.pre_tokenizers
    made, trainer = {
        "gpt2": lambda: (t.Tokenizer(t.models.BPE()), t.trainers.BpeTrainer(
            vocab_size=900, initial_alphabet=p.ByteLevel.alphabet(), special_tokens=["<|endoftext|>"])),
        "bert": lambda: (t.Tokenizer(t.models.WordPiece(unk_token="[UNK]")), t.trainers.WordPieceTrainer(
            vocab_size=900, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])),
        "t5": lambda: (t.Tokenizer(t.models.Unigram()), t.trainers.UnigramTrainer(
            vocab_size=2000, unk_token="<unk>", special_tokens=["<pad>", "</s>", "<unk>"])),
        "llama": lambda: (t.Tokenizer(t.models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True)),
                          t.trainers.BpeTrainer(vocab_size=2000, special_tokens=["<unk>", "<s>", "</s>"] + [
                              f"<0x{byte:02X}>" for byte in range(256)])),
    }[kind]()
    made.pre_tokenizer = {"gpt2": p.ByteLevel(add_prefix_space=False), "bert": p.BertPreTokenizer(),
                          "t5": p.Metaspace(), "llama": p.Metaspace(prepend_scheme="first", split=False)}[kind]
    if kind == "bert":
        made.normalizer = t.normalizers.BertNormalizer()
    made.train_from_iterator(strings(400, seed=10_000), trainer)
    made.enable_truncation(5)  # as files often say, and no ids of a text are
    return made.to_str().encode()


@pytest.mark.parametrize("kind", ["gpt2", "bert", "t5", "llama"])
def test_a_tokenizer_json_gives_the_ids_of_tokenizers(kind, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(trained(kind))
    ours = tokenizer.make(str(tmp_path / "tokenizer.json"), (), vocab=0)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.no_truncation()
    assert folder.tokens(tmp_path) == theirs.get_vocab_size()
    texts = strings(1000)
    for text, ids in zip(texts, ours.encode_batch(texts), strict=True):
        assert ids.tolist() == theirs.encode(text, add_special_tokens=False).ids, text


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_sentencepiece_model_gives_the_ids_of_sentencepiece(kind, tmp_path):
    """As T5's and LLaMA's: normalised text, a blank before it, other ids for the specials."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(strings(600, seed=10_000)), model_writer=model, model_type=kind, vocab_size=2000,
        byte_fallback=True, character_coverage=0.98, minloglevel=2)
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    ours = tokenizer.make(str(tmp_path / "tokenizer.model"), (), vocab=0)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    assert folder.tokens(tmp_path) == 2000
    texts = strings(1000)
    for text, ids in zip(texts, ours.encode_batch(texts), strict=True):
        assert ids.tolist() == theirs.encode(text), text


@pytest.mark.parametrize("kind", ["bpe", "unigram", "byte"])
def test_a_tokenizer_of_here_gives_its_ids_in_tokenizers(kind, tmp_path):
    ours = Bytes() if kind == "byte" else Pieces(tokenizer.train(kind, strings(600, seed=10_000), vocab=2000))
    exported(ours, tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert folder.tokens(tmp_path) <= ours.vocab
    texts = strings(1000)
    for text, ids in zip(texts, ours.encode_batch(texts), strict=True):
        assert theirs.encode(text, add_special_tokens=False).ids == ids.tolist(), text
        assert theirs.decode(ids.tolist()) == text == ours.decode(ids)
    again = tokenizer.make(str(tmp_path / "tokenizer.json"), (), vocab=0)
    assert (again.pad, again.bos, again.eos, again.mask) == (ours.pad, ours.bos, ours.eos, ours.mask)
    assert again.sentinels == ours.sentinels and again.encode(texts[0]).tolist() == ours.encode(texts[0]).tolist()


@pytest.mark.parametrize("changes, before, after", [(dict(), 1, 0), (dict(causal=False), 1, 1),
                                                    (dict(encoder_depth=2), 0, 1)], ids=["lm", "mlm", "t5"])
def test_what_stands_around_a_text_is_what_the_model_learned(changes, before, after, tmp_path):
    ours = Bytes()
    exported(ours, tmp_path, **changes)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.encode("ab").ids == [ours.bos] * before + ours.encode("ab").tolist() + [ours.eos] * after
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (ours.bos, ours.eos, ours.pad)


SAID = [{"role": "system", "content": "be <end> brief"}, {"role": "user", "content": "hi\n"},
        {"role": "assistant", "content": " hello <user>"}, {"role": "user", "content": "漢字\n"}]
PLAIN = [one | {"content": one["content"].replace("<", "(")} for one in SAID]


@pytest.mark.parametrize("kind", ["bpe", "unigram", "byte"])
def test_a_model_from_here_is_spoken_with_as_here(kind, tmp_path):
    ours = Bytes() if kind == "byte" else Pieces(tokenizer.train(kind, strings(600, seed=10_000), vocab=2000))
    exported(ours, tmp_path)
    read = frame.of_folder(tmp_path)
    there = Template.of_folder(tmp_path, read.settings, read.tokenizer)
    said = PLAIN if kind == "unigram" else SAID  # which finds a special's letters as it finds any piece
    assert there.ids(said) == Template.of_roles(ours).ids(said)
    with pytest.raises(ConfigError, match="role pirate: one of system, user, assistant"):
        there.ids([{"role": "pirate", "content": "arr"}])
    told = json.loads((tmp_path / "generation_config.json").read_text())
    assert told == {"pad_token_id": ours.pad, "bos_token_id": ours.bos, "eos_token_id": [ours.eos, ours.chat["end"]]}


@pytest.mark.parametrize("changes, told", [
    (dict(causal=False, head="mlm"), None), (dict(head="classes"), None), (dict(encoder_depth=2), 0)])
def test_only_what_writes_is_told_how_to_and_a_decoder_what_it_begins_with(changes, told, tmp_path):
    exported(Bytes(), tmp_path, **changes)
    assert ("chat_template" in json.loads((tmp_path / "tokenizer_config.json").read_text())) == (told is not None)
    found = folder.read_json(tmp_path / "generation_config.json")
    assert found.get("decoder_start_token_id") == told and bool(found) == (told is not None)


def test_transformers_writes_a_conversation_as_here(tmp_path):
    transformers = pytest.importorskip("transformers")
    exported(Bytes(), tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    written = theirs.apply_chat_template(PLAIN, add_generation_prompt=True, return_dict=False)
    assert written == Template.of_roles(Bytes()).ids(PLAIN)
    told = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert told.eos_token_id == [Bytes().eos, Bytes().chat["end"]]


def test_transformers_reads_the_tokenizer(tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = Pieces(tokenizer.train("bpe", strings(600, seed=10_000), vocab=2000))
    exported(ours, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (ours.bos, ours.eos, ours.pad)
    for text in strings(100):
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text).tolist()
        assert theirs.decode(ours.encode(text)) == text


def exported(ours, folder, **changes):
    (folder / "config.json").write_text('{"model_type": "llama"}')
    vocabulary.write(folder, ours, TransformerConfig(vocab=ours.vocab, **changes))
