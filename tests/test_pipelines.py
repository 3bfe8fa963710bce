"""Tasks by name give what the pipelines of `transformers` give (tests/golden/pipelines), and refuse what cannot be."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tasks
from tasks import CASES, LONG, TEXT, TWO, close

import lm_jax
from lm_jax import pipelines
from lm_jax.config import ConfigError
from lm_jax.hub import store
from lm_jax.pipelines.reader import fitting
from lm_jax.pipelines.wish import Wish

EXPECTED = json.loads(tasks.OUTPUTS.read_text())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """name -> the folder of a model of tests/tasks.py."""
    folders = {}

    def get(name):
        if name not in folders:
            folders[name] = tasks.make(name, tmp_path_factory.mktemp(name))
        return folders[name]

    return get


@pytest.fixture(scope="module")
def run(made):
    """(task, name) -> the pipeline, loaded once."""
    loaded = {}

    def get(task, name):
        if (task, name) not in loaded:
            loaded[task, name] = lm_jax.pipeline(task, model=made(name))
        return loaded[task, name]

    return get


@pytest.mark.parametrize("name", CASES)
def test_a_task_gives_what_it_gives_in_transformers(name, run):
    folder, task, *_ = CASES[name]
    close(tasks.asked(run(task, folder), name), EXPECTED[name])


def test_every_task_is_held_to_transformers():
    asked = {task.replace("_en_to_de", "") for _, task, *_ in CASES.values()}
    assert asked == pipelines.TASKS.keys()


def test_knobs_given_first_hold_for_every_call_that_says_no_other(made, run):
    named = lm_jax.pipeline("ner", model=made("names"), aggregation_strategy="simple")
    plain = run("token-classification", "names")
    text = TEXT[:60]
    assert named(text) == plain(text, aggregation_strategy="simple") != plain(text)
    assert named(text, aggregation_strategy="none") == plain(text)


def test_a_batch_gives_what_its_texts_give_alone_in_few_programs(run, monkeypatch):
    widths = set()
    batch = pipelines.reader.Reader._batch
    monkeypatch.setattr(pipelines.reader.Reader, "_batch", lambda self, rows, width: (
        widths.add(width), batch(self, rows, width))[1])
    texts = [TEXT[: 5 * n].strip() for n in range(1, 36, 3)]
    classify = run("text-classification", "sentiment")
    together = classify(texts, top_k=None)
    assert widths <= {8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64}
    close(together[::4], [classify(text, top_k=None) for text in texts[::4]])
    for n in range(1, 2000):
        assert n <= fitting(n) <= max(8, n + 3, 1.25 * n)
    assert len(set(map(fitting, range(1, 513)))) == 23


def test_what_is_cut_or_read_in_windows_is_said(made):
    said = []
    classify = lm_jax.pipeline("text-classification", model=made("sentiment"), say=said.append)
    classify([TWO[0], LONG])
    assert said.pop() == ("1 of 2 texts, such as number 1, pass the model's 64 tokens: only their beginnings are read")
    with pytest.raises(ConfigError, match="number 0, pass the model's 64 tokens: cut them, or pass truncation=True"):
        classify(LONG, truncation=False)
    tag = lm_jax.pipeline("token-classification", model=made("names"), say=said.append)
    found = tag(LONG, ignore_labels=[])
    assert "read in windows of so many, 16 shared by neighbours; that one in 3" in said.pop()
    assert [LONG[one["start"]:one["end"]] for one in found] == LONG.split(), "each token once, wherever it stands"
    assert not said


def test_a_mask_is_filled_with_words_that_the_tokenizer_has(made, tmp_path):
    """The model's table is longer, as those of published models are."""
    folder = shutil.copytree(made("masked"), tmp_path / "padded")
    file = json.loads((folder / "tokenizer.json").read_text())
    words = {word: i for word, i in file["model"]["vocab"].items() if i < 50}
    (folder / "tokenizer.json").write_text(json.dumps(file | {"model": file["model"] | {"vocab": words}}))
    found = lm_jax.pipeline("fill-mask", model=folder, top_k=99)("the film was [MASK]")
    assert sorted(one["token"] for one in found) == list(range(50)) and all(one["token_str"] for one in found)


def test_a_special_token_in_a_text_is_what_it_spells(run):
    """As in transformers: T5's users write <extra_id_0> where words are missing."""
    frame, speaker = run("fill-mask", "masked").by.frame, run("text-generation", "gpt2").by.speaker
    assert frame.encode("the [MASK]")[-1] == frame.special("mask_token")
    assert speaker.ids("good</s>") == [*speaker.ids("good"), 2]
    assert 2 not in speaker.tokenizer.encode("good</s>"), "where people speak with a model it is text"


def test_a_long_document_is_answered_from_whichever_window_has_the_answer(run):
    tell = run("question-answering", "questions")
    context = " ".join([*TEXT.split(), *reversed(TEXT.split())])
    found = tell(question="who works ?", context=context, top_k=40, max_seq_len=32)
    assert {one["start"] // (len(TEXT) + 1) for one in found} == {0, 1}
    assert all(one["answer"] == context[one["start"]:one["end"]] for one in found)
    several = tell(question=["who works ?", "where ?"], context=TEXT)
    close(several, [tell({"question": asked, "context": TEXT}) for asked in ("who works ?", "where ?")])


def test_features_are_pooled(run):
    of = run("feature-extraction", "bert")
    x_TD = np.array(of(TWO[0]))[0]
    np.testing.assert_allclose(of(TWO[0], pooling="mean"), x_TD.mean(0), atol=1e-6)
    np.testing.assert_allclose(of([TWO[0]], pooling="cls")[0], x_TD[0], atol=1e-6)
    source = run("feature-extraction", "t5")
    assert np.array(source(TWO[0])).shape == (1, 7, 32), "an encoder-decoder's are its encoder's"


def test_a_conversation_is_gone_on_with_and_draws_depend_on_the_seed(run):
    write = run("text-generation", "gpt2")
    talk = [{"role": "user", "content": "the film"}]
    found = write(talk, max_new_tokens=4)[0]["generated_text"]
    assert found[0] == talk[0] and found[1]["role"] == "assistant"
    draw = dict(do_sample=True, max_new_tokens=8, num_return_sequences=3)
    one, other = (write(TWO[0], seed=seed, **draw) for seed in (0, 3))
    assert len({text["generated_text"] for text in one}) > 1 and one != other
    assert write(TWO[0], seed=0, **draw) == one


def test_a_folder_says_how_its_model_writes(made, tmp_path):
    folder = shutil.copytree(made("t5"), tmp_path / "t5")
    (folder / "generation_config.json").write_text(json.dumps(
        {"decoder_start_token_id": 0, "eos_token_id": 1, "max_length": 6, "num_beams": 2, "typical_p": 0.9}))
    said = []
    write = lm_jax.pipeline("summarization", model=folder, say=said.append)
    assert write(TWO[0]) == write(TWO[0], max_new_tokens=5, num_beams=2)
    told = Wish(max_length=3).told(Wish(max_new_tokens=9, top_k=7))
    assert told["max_length"] == 3 and told["top_k"] == 7 and "max_new_tokens" not in told
    assert [line for line in said if "asks" in line] == [f"{folder} asks for typical_p=0.9: not followed"]
    del said[:]
    short = {"max_new_tokens": 4, "num_beams": 1}
    whole, cut = write([LONG], **short), write([LONG], **short, truncation=True)
    assert "pass the 64 tokens that this model was made for: read whole" in said[0] and "beginnings" in said[1]
    assert whole[0].keys() == cut[0].keys() == {"summary_text"}


def test_where_nobody_says_how_long_a_text_ends_with_the_models_positions(run):
    write = run("text-generation", "gpt2")
    begun = len(write.by.speaker.ids(TWO[0]))
    assert write(TWO[0]) == write(TWO[0], max_new_tokens=64 + 1 - begun)
    with refused("pass model.max_length=64 learned positions: at most 65 in all"):
        write(TWO[0], max_new_tokens=64 + 2 - begun)


def test_a_folder_of_summaries_is_followed(made, tmp_path):
    """As those of the published T5: at least so long, and ended early; with a penalty by one beam, which is said."""
    folder, said = shutil.copytree(made("t5"), tmp_path / "t5"), []
    def write(**asked):
        told = {"decoder_start_token_id": 0, "eos_token_id": list(range(1, 57, 2)), "max_length": 12} | asked
        (folder / "generation_config.json").write_text(json.dumps(told))
        return lm_jax.pipeline("summarization", model=folder, say=said.append)
    texts = [*TWO, TEXT]
    for beams in (1, 4):
        asked = {"num_beams": beams, "early_stopping": True, "length_penalty": 2.0}
        short, long = write(**asked)(texts), write(**asked, min_length=7)(texts)
        assert short != long and long == write(num_beams=beams)(
            texts, min_new_tokens=6, early_stopping=True, length_penalty=2.0)
    assert write(**asked)(texts) != write(**asked | {"early_stopping": False})(texts)
    assert not [line for line in said if "not followed" in line]
    for beams in (1, 3):
        told = {"num_beams": beams, "no_repeat_ngram_size": 2, "max_length": 20, "eos_token_id": 1}
        once = write(**told)(TWO)
        assert once == write(**told)(TWO, no_repeat_ngram_size=2) != write(**told)(TWO, no_repeat_ngram_size=0)
    punished = write(repetition_penalty=1.3, num_beams=4)
    assert punished(texts) == punished(texts, num_beams=1)
    assert any("repetition_penalty=1.3, which a search does not know: one beam" in line for line in said)


def refused(message: str):
    return pytest.raises(ConfigError, match=message)


def test_a_task_that_cannot_be_done_is_refused(made, tmp_path):
    with refused("task 'text-clasification' is not known: nearest is 'text-classification', of text-generation, .*"):
        lm_jax.pipeline("text-clasification", model=made("sentiment"))
    with refused("fill-mask needs a head that fills in masks or .*, and .* has a head of labels of a text: it can do "
                 "text-classification, feature-extraction, zero-shot-classification"):
        lm_jax.pipeline("fill-mask", model=made("sentiment"))
    with refused("summarization needs an encoder and a decoder, and .* has a decoder with a head over its vocabulary"):
        lm_jax.pipeline("summarization", model=made("gpt2"))
    with refused("text-classification has no knob 'topk': nearest is 'top_k'"):
        lm_jax.pipeline("text-classification", model=made("sentiment"), topk=3)
    folder = shutil.copytree(made("sentiment"), tmp_path / "bare")
    (folder / "tokenizer.json").unlink()
    with refused("has no tokenizer: put the tokenizer.json, tokenizer.model, .* that its model was"):
        lm_jax.pipeline("text-classification", model=folder)
    with refused("is neither a folder nor a name"):
        lm_jax.pipeline("text-classification", model=tmp_path / "nowhere")


def test_a_text_that_cannot_be_read_is_refused(run, made, tmp_path):
    classify, fill = run("text-classification", "sentiment"), run("fill-mask", "masked")
    with refused("the text is '', which is empty"):
        classify("")
    with refused("number 1, a text is None: pass a string"):
        classify([TWO[0], None])
    assert classify([]) == [] == run("zero-shot-classification", "nli")([], candidate_labels="a")
    with refused("pass {'text': .., 'text_pair': ..}"):
        classify({"text": "good", "pair": "bad"})
    with refused(r"text 0 has no \[MASK\] in what is read of it: 'the film'"):
        fill("the film")
    with refused("none is called entailment"):
        run("zero-shot-classification", "sentiment")("good", candidate_labels="a")
    with refused("names no label"):
        run("zero-shot-classification", "nli")("good", candidate_labels=" , ")
    with refused("pass question=.. and context=.."):
        run("question-answering", "questions")(question="who ?")
    with refused("no room for a text in 20 tokens of which windows share 10"):
        run("question-answering", "questions")(question="who " * 9, context=TEXT, max_seq_len=20)
    with refused("aggregation_strategy='sum' is not known, of none, simple, first, average, max"):
        run("token-classification", "names")("good", aggregation_strategy="sum")
    with refused("num_return_sequences=2 of the likeliest alone: pass do_sample=True, or num_beams=2"):
        run("text-generation", "gpt2")("good", num_return_sequences=2)
    with refused("repetition_penalty=1.2 with num_beams=4: a search knows no penalties; pass num_beams=1"):
        run("summarization", "t5")("good", repetition_penalty=1.2)
    with refused("text-generation has no knob 'wish': nearest is"):
        run("text-generation", "gpt2")("good", wish=1)
    folder = shutil.copytree(made("masked"), tmp_path / "maskless")
    text = (folder / "tokenizer.json").read_text().replace("[MASK]", "[OTHER]")
    (folder / "tokenizer.json").write_text(text)
    with refused("needs a token that stands for what is missing"):
        lm_jax.pipeline("fill-mask", model=folder)("the [MASK]")


@pytest.mark.parametrize("task, name, text, knobs, message", [
    ("text-classification", "sentiment", None, {}, "the text is None: pass a string, or a list of them"),
    ("text-generation", "gpt2", None, {}, "the prompt is None: pass a string"),
    ("text-generation", "gpt2", "good", {"max_new_tokens": "4"}, "max_new_tokens='4': pass a whole number from 1 on"),
    ("text-generation", "gpt2", "good", {"num_return_sequences": 0}, "num_return_sequences=0: pass a whole number"),
    ("text-generation", "gpt2", "good", {"temperature": "warm"}, "temperature='warm': pass a number"),
    ("text-generation", "gpt2", "good", {"stop_strings": [3]}, "stop_strings has 3: pass a string"),
    ("summarization", "t5", "good", {"num_beams": 0}, "num_beams=0: pass a whole number from 1 on"),
    ("zero-shot-classification", "nli", "good", {"candidate_labels": [None]}, "number 0, a label of .* is None"),
    ("zero-shot-classification", "nli", "good", {"candidate_labels": None}, "the label of candidate_labels is None"),
    *[("zero-shot-classification", "nli", "good", {"candidate_labels": "a", "hypothesis_template": wrong},
       "hypothesis_template=.*: write {} in it once") for wrong in ("it is", "{} or {}", "{0}", "{name} {}", "}{", 3)],
    ("token-classification", "names", "good", {"stride": -1}, "stride=-1: pass a whole number from 0 on"),
    ("fill-mask", "masked", "the [MASK]", {"top_k": 0}, "top_k=0: pass a whole number from 1 on"),
    ("question-answering", "questions", None, {"question": "a", "context": "b", "doc_stride": -2}, "doc_stride=-2: "),
    ("text-classification", "sentiment", "good", {"batch_size": 0}, "batch_size=0: pass a whole number from 1 on")],
    ids=str)
def test_a_knob_of_a_wrong_kind_is_named(run, task, name, text, knobs, message):
    with refused(message):
        run(task, name)(text, **knobs)


def test_a_batch_size_bounds_what_is_computed_at_once(run, made, monkeypatch):
    sizes, batch = [], pipelines.reader.Reader._batch
    monkeypatch.setattr(pipelines.reader.Reader, "_batch", lambda self, rows, width: (
        sizes.append(len(rows)), batch(self, rows, width))[1])
    classify = run("text-classification", "sentiment")
    close(classify(TWO * 2, batch_size=1), classify(TWO * 2))
    assert sizes[:4] == [1] * 4 and max(sizes) > 1
    write = lm_jax.pipeline("text-generation", model=made("gpt2"), batch_size=1, do_sample=True, max_new_tokens=4)
    assert write.knobs["batch_size"] == 1 and write(TWO) == write(TWO, batch_size=8)
    assert len(repr(write)) < 200, "no weights are printed"


def test_windows_wider_than_the_model_are_as_wide_as_it_is(made):
    said = []
    tell = lm_jax.pipeline("question-answering", model=made("questions"), say=said.append)
    asked = dict(question="who works ?", context=TEXT)
    assert tell(**asked, max_seq_len=10**4) == tell(**asked)
    assert f"max_seq_len=10000 passes the model's {tell.by.limit} tokens" in said[0]


def test_a_sentencepiece_model_alone_is_enough_to_read(made, tmp_path):
    import io

    import sentencepiece

    folder, file = shutil.copytree(made("gpt2-classes"), tmp_path / "pieces"), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter([TEXT]), model_writer=file, vocab_size=50,
                                             minloglevel=2)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(file.getvalue())
    assert len(lm_jax.pipeline("text-classification", model=folder)(TWO)) == 2
    read = pipelines.reader.load(folder).frame.windows([LONG], limit=40, overlap=7)[0]
    assert len(read) > 2 and all(row.ids[0] == 1 and len(row) <= 40 for row in read)
    assert read[0].spans[-7:] == read[1].spans[1:8], "neighbours share tokens"
    found = [LONG[start:end].strip() for row in read for start, end in row.spans[1 + 7 * (row is not read[0]):]]
    assert "".join(found) == LONG.replace(" ", "")


def test_a_name_in_the_local_hub_is_as_good_as_a_folder(made, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for task, name, text in (("sentiment-analysis", "sentiment", TWO), ("text-generation", "gpt2", TWO[0])):
        store.add(made(name), f"us/{name}")
        more = {"max_new_tokens": 8, "do_sample": False} if name == "gpt2" else {}
        close(lm_jax.pipeline(task, model=f"us/{name}", **more)(text),
              lm_jax.pipeline(task, model=made(name), **more)(text))


def test_importing_the_library_is_light():
    heavy = "{'jax', 'numpy', 'lm_jax.pipelines'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", f"import sys, lm_jax; lm_jax.pipeline; assert not {heavy}"], check=True)
