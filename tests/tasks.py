"""Folders with tokenizers, and what pipelines are asked there: for the tests and for tests/golden/pipelines/make.py."""

import copy
import json
import pathlib

from checkpoints import GOLDEN, HERE, checkpoint

TEXT = ("the film was very good and we liked it . a bad plot , but great music ! where did the man live ? the old man "
        "lived in a small house near paris . she said that he works for the bank in london and not in berlin .")
OUTPUTS = HERE / "pipelines" / "outputs.json"
NLI = {"0": "contradiction", "1": "neutral", "2": "entailment"}
NER = {"0": "O", "1": "B-PER", "2": "I-PER", "3": "B-LOC"}
DISTIL = "distilbert-classes"


def changed(name: str, *, architecture: str, head: str, rows: int, **config) -> dict:
    """A golden model with another head: of the type's class `architecture`, its tensors `head` of so many labels."""
    golden = copy.deepcopy(GOLDEN[name])
    golden["config"] |= {"architectures": [architecture]} | config
    for key in ("classifier", "score"):
        for end in (".weight", ".bias"):
            golden["tensors"].pop(key + end, None)
    return golden | {"tensors": golden["tensors"] | {f"{head}.weight": [rows, 32], f"{head}.bias": [rows]}}


def shallow(golden: dict) -> dict:
    """A T5 whose decoder is no deeper than its encoder: transformers 4 decodes no other."""
    tensors = {name: shape for name, shape in golden["tensors"].items() if not name.startswith("decoder.block.2.")}
    special = {"translation_en_to_de": {"prefix": "we said that "}}
    config = golden["config"] | {"num_decoder_layers": 2, "task_specific_params": special}
    return golden | {"config": config, "tensors": tensors}


def labelled(labels: dict) -> dict:
    return {"id2label": labels, "label2id": {label: int(i) for i, label in labels.items()}}


FOLDERS = {  # name -> (golden model, kind of tokenizer)
    "sentiment": (changed(DISTIL, architecture="DistilBertForSequenceClassification", head="classifier", rows=2,
                          **labelled({"0": "NEGATIVE", "1": "POSITIVE"})), "wordpiece"),
    "sides": (GOLDEN["bert-classes"], "wordpiece"),  # token types, labels without names
    "nli": (changed(DISTIL, architecture="DistilBertForSequenceClassification", head="classifier", rows=3,
                    **labelled(NLI)), "wordpiece"),
    "names": (changed("distilbert-tags", architecture="DistilBertForTokenClassification", head="classifier", rows=4,
                      **labelled(NER)), "wordpiece"),
    "names-bpe": (changed("distilbert-tags", architecture="DistilBertForTokenClassification", head="classifier", rows=4,
                          **labelled(NER)), "metaspace"),
    "questions": (changed("distilbert-tags", architecture="DistilBertForQuestionAnswering", head="qa_outputs", rows=2,
                          **labelled({"0": "LABEL_0", "1": "LABEL_1"})), "wordpiece"),
    "masked": (GOLDEN["distilbert"], "wordpiece"),
    "bert": (GOLDEN["bert-base"], "wordpiece"),
    "gpt2-classes": (GOLDEN["gpt2-classes"], "metaspace"),
    "gpt2": (GOLDEN["gpt2"], "metaspace"),
    "t5": (shallow(GOLDEN["t5"]), "unigram"),
    "t5-classes": (GOLDEN["t5-classes"] | {"config": GOLDEN["t5-classes"]["config"] | {"decoder_start_token_id": 0}},
                   "unigram"),
}
LONG = " ".join([TEXT] * 3)
TWO = ["the film was very good .", "a bad plot , but great music !"]
CASES = {  # name -> (folder, task, input or inputs by name, knobs)
    "classify": ("sentiment", "text-classification", TWO[0], {}),
    "classify-two": ("sentiment", "text-classification", TWO, {}),
    "classify-all": ("sentiment", "text-classification", TWO, {"top_k": None}),
    "classify-one": ("sentiment", "text-classification", TWO[0], {"top_k": 1}),
    "classify-sigmoid": ("sentiment", "text-classification", TWO[1], {"function_to_apply": "sigmoid"}),
    "classify-long": ("sentiment", "text-classification", LONG, {"truncation": True}),
    "classify-pair": ("sides", "text-classification", {"text": TWO[0], "text_pair": TWO[1]}, {"top_k": None}),
    "classify-decoder": ("gpt2-classes", "text-classification", TWO[1], {"top_k": None}),
    "classify-both": ("t5-classes", "text-classification", TWO, {"top_k": None}),
    "zero-shot": ("nli", "zero-shot-classification", TWO[0], {"candidate_labels": "music, film, bank"}),
    "zero-shot-each": ("nli", "zero-shot-classification", TWO, {
        "candidate_labels": ["music", "film"], "multi_label": True, "hypothesis_template": "it works for the {} ."}),
    "tags": ("names", "token-classification", TEXT[60:180], {}),
    "tags-simple": ("names", "token-classification", [TEXT[:60], TEXT[60:180]], {"aggregation_strategy": "simple"}),
    "tags-first": ("names", "token-classification", TEXT[:150], {"aggregation_strategy": "first"}),
    "tags-average": ("names", "token-classification", "the filming was unlikely xyz .", {
        "aggregation_strategy": "average", "ignore_labels": []}),
    "tags-max": ("names", "token-classification", TEXT[60:180], {"aggregation_strategy": "max"}),
    "tags-bpe": ("names-bpe", "token-classification", "where did the man live ?", {"aggregation_strategy": "max"}),
    "tags-windows": ("names", "token-classification", LONG, {"aggregation_strategy": "simple", "stride": 12}),
    "answer": ("questions", "question-answering", {"question": "where did the man live ?", "context": TEXT[80:]}, {}),
    "answers": ("questions", "question-answering", {"question": "who works ?", "context": TEXT}, {
        "top_k": 3, "max_answer_len": 5, "handle_impossible_answer": True}),
    "answers-windows": ("questions", "question-answering", {"question": "who works ?", "context": LONG}, {
        "top_k": 2, "max_seq_len": 40, "doc_stride": 10, "align_to_words": False}),
    "fill": ("masked", "fill-mask", "the film was [MASK] good .", {}),
    "fill-two": ("masked", "fill-mask", ["the [MASK] was [MASK] .", "[MASK] man"], {"top_k": 2}),
    "fill-targets": ("masked", "fill-mask", "the film was [MASK] .", {"targets": ["good", "bad", "great"]}),
    "features": ("bert", "feature-extraction", "the film was filming", {}),
    "features-two": ("masked", "feature-extraction", ["good film", "paris"], {}),
    "go-on": ("gpt2", "text-generation", "the film was", {"max_new_tokens": 8, "do_sample": False}),
    "go-on-two": ("gpt2", "text-generation", TWO, {"max_new_tokens": 6, "do_sample": False,
                                                   "return_full_text": False, "repetition_penalty": 1.3}),
    "rewrite": ("t5", "text2text-generation", TWO, {"max_new_tokens": 8, "num_beams": 1, "do_sample": False}),
    "translate": ("t5", "translation_en_to_de", TWO[0], {"max_new_tokens": 8, "num_beams": 1, "do_sample": False}),
    "rewrite-default": ("t5", "text2text-generation", TWO[1], {"max_new_tokens": 12}),
    "summarize": ("t5", "summarization", TEXT, {"max_new_tokens": 8, "num_beams": 3, "do_sample": False}),
    "summarize-once": ("t5", "summarization", TEXT, {"max_new_tokens": 12, "no_repeat_ngram_size": 2}),
    "go-on-once": ("gpt2", "text-generation", TWO[0], {"max_new_tokens": 12, "do_sample": False,
                                                       "no_repeat_ngram_size": 2}),
}
CALLED = {"question-answering"}  # whose inputs have names
THEIRS = {"text-generation": {"clean_up_tokenization_spaces": False}}  # version 4 takes blanks out, 5 does not


def make(name: str, place: pathlib.Path) -> pathlib.Path:
    """The folder of a model of FOLDERS."""
    golden, kind = FOLDERS[name]
    checkpoint(golden, place)
    reads = ["input_ids", "attention_mask", "token_type_ids"]
    TOKENIZERS[kind](place, reads if golden["config"]["model_type"] == "bert" else reads[:2])
    if name == "t5":
        (place / "generation_config.json").write_text(json.dumps(
            {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}))
    return place


def asked(run, name: str, more: dict = {}):
    """What a pipeline gives in a case; `more` are knobs for some tasks."""
    _, task, inputs, knobs = CASES[name]
    knobs = knobs | more.get(task, {})
    return run(**inputs, **knobs) if task in CALLED else run(inputs, **knobs)


def close(ours, theirs, where: str = ""):
    """The same, numbers to 1e-4 of the larger or one."""
    assert type(ours) is type(theirs), (where, ours, theirs)
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key in theirs:
            close(ours[key], theirs[key], where=f"{where}.{key}")
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs), (where, ours, theirs)
        for i, pair in enumerate(zip(ours, theirs)):
            close(*pair, where=f"{where}.{i}")
    else:
        same = abs(ours - theirs) <= 1e-4 * max(1, abs(theirs)) if isinstance(theirs, float) else ours == theirs
        assert same, (where, ours, theirs)


def wordpiece(place: pathlib.Path, reads: list[str]):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from tokenizers.decoders import WordPiece

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = dict.fromkeys([*TEXT.split(), "##ing", "##s", "##ed", "un", "##like", "##ly", "works", "liv", "##e", "who"])
    vocab = {word: i for i, word in enumerate(full([*specials, *words]))}
    made = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer, made.decoder = (
        normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer(), WordPiece())
    made.add_special_tokens(specials)
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    saved(place, made, reads, mask_token="[MASK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]",
          unk_token="[UNK]")


def metaspace(place: pathlib.Path, reads: list[str]):
    from tokenizers import Tokenizer, models, trainers
    from tokenizers.decoders import Metaspace
    from tokenizers.pre_tokenizers import Metaspace as Split

    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = Split(), Metaspace()
    specials = ["<pad>", "<s>", "</s>", "<unk>"]
    made.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=99, special_tokens=specials, show_progress=False))
    saved(place, made, reads, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def unigram(place: pathlib.Path, reads: list[str]):
    from tokenizers import Tokenizer, models, processors
    from tokenizers.decoders import Metaspace
    from tokenizers.pre_tokenizers import Metaspace as Split

    pieces = ["<pad>", "</s>", "<unk>", *dict.fromkeys("▁" + word for word in TEXT.split()), "▁", *"abcdefghijklm"]
    made = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(full(pieces))], unk_id=2))
    made.pre_tokenizer, made.decoder = Split(), Metaspace()
    made.add_special_tokens(["<pad>", "</s>", "<unk>"])
    made.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>",
                                                        special_tokens=[("</s>", 1)])
    saved(place, made, reads, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def full(pieces: list[str]) -> list[str]:
    """As many as the models have, so that there is nothing which only transformers would write."""
    return pieces + [f"filler{i}" for i in range(len(pieces), 99)]


def saved(place: pathlib.Path, tokenizer, reads: list[str], **names):
    tokenizer.save(str(place / "tokenizer.json"))
    assert tokenizer.get_vocab_size() <= 99
    (place / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64, "model_input_names": reads} | names))


TOKENIZERS = {"wordpiece": wordpiece, "metaspace": metaspace, "unigram": unigram}
