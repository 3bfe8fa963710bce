"""Text comes out as it is written, never half a character, and of each prompt as if it were alone."""

import dataclasses
import io
import json
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest
import speakers

from lm_jax import generate as program
from lm_jax import parallel
from lm_jax.config import ConfigError, RopeConfig
from lm_jax.inference import text
from lm_jax.inference.load import load
from lm_jax.inference.sampler import Sampler
from lm_jax.pipelines import session

GREEDY = Sampler(temperature=0)
WORDS = "naïve 漢字 🙂 end"


@pytest.fixture(scope="module")
def speaker(tmp_path_factory):
    c = speakers.settings()
    folder = speakers.run(tmp_path_factory.mktemp("text") / "run", c, {10: {"params": speakers.parameters(c)}})
    return load(folder)


def test_no_piece_ends_inside_a_character(speaker):
    ids = [int(id) for id in speaker.tokenizer.encode(WORDS)]
    writer = text.Writer(speaker, [], [], len(ids))
    pieces = [writer.read(np.array(ids[:n + 1]), np.zeros(n + 1)) for n in range(len(ids))]
    assert "".join(pieces) == WORDS == writer.answer.text and not any("\ufffd" in piece for piece in pieces)
    assert pieces[:4] == ["n", "a", "", "ï"] and writer.answer.ended == "length"


def test_bytes_that_are_no_character_come_out_at_last(speaker):
    first = speaker.tokenizer.encode("a")[0] - ord("a")
    ids = [first + byte for byte in (0xe6, 0xe6, 0xe6, 0xe6, 0xe6)]
    writer = text.Writer(speaker, [], [], 5)
    pieces = [writer.read(np.array(ids[:n + 1]), np.zeros(n + 1)) for n in range(5)]
    assert "".join(pieces) == "\ufffd" * 5 and pieces[3] and pieces[4]  # not held back for ever


@pytest.mark.parametrize("stop, shown", [(["字 🙂"], "naïve 漢"), (["ve", "ïve"], "na"), (["🙂 x"], WORDS),
                                         (["d"], WORDS[:-1])])
def test_a_stop_string_is_never_shown_not_even_its_beginning(speaker, stop, shown):
    ids = [int(id) for id in speaker.tokenizer.encode(WORDS)]
    writer, pieces = text.Writer(speaker, [], stop, len(ids)), []
    for n in range(3, len(ids) + 3, 3):  # tokens come in threes
        if writer.answer is None:
            pieces.append(writer.read(np.array(ids[:n]), np.zeros(n)))
    answer = writer.answer
    assert "".join(pieces) == answer.text == shown
    spelt = speaker.tokenizer.decode(answer.ids)
    assert answer.ended == ("length" if shown == WORDS else "stop") and spelt.startswith(shown)
    assert shown == WORDS or any(spelt.endswith(word) for word in stop)  # the ids end with the one that completes it


def test_a_stream_is_the_answer_and_an_answer_is_its_prompts_own(speaker):
    """Several prompts side by side, each with its seed and sampler, and one of them alone."""
    prompts, samplers = ["one", [*speaker.before], "two and three"], [Sampler(), GREEDY, Sampler(0.8, top_k=20)]
    knobs = dict(length=11, seed=[5, 6, 7])
    pieces = {row: "" for row in range(3)}
    for row, new, answer in text.stream(speaker, prompts, samplers, **knobs):
        pieces[row] += new
    answers = text.answers(speaker, prompts, samplers, **knobs)
    assert [answer.text for answer in answers] == list(pieces.values())
    alone = text.answers(speaker, prompts[2:], samplers[2:], length=11, seed=7)
    assert alone[0].ids == answers[2].ids and len(alone[0].logprobs) == len(alone[0].ids)
    np.testing.assert_allclose(alone[0].logprobs, answers[2].logprobs, atol=1e-4)
    assert text.answers(speaker, prompts[2:], samplers[2:], length=11, seed=8)[0].ids != alone[0].ids
    assert text.answers(speaker, []) == []


def test_an_answer_ends_before_a_stop_string(speaker):
    first = int(speaker.tokenizer.encode("a")[0]) - ord("a")
    letters = Sampler(logit_bias={id: -np.inf for id in range(384) if not 97 <= id - first < 123})
    free = text.answers(speaker, ["one"], letters, length=24)[0]
    word = free.text[5:8]
    cut = text.answers(speaker, ["one"], letters, length=24, stop=[word])[0]
    assert cut.text == free.text[:free.text.index(word)] and cut.ended == "stop"
    assert cut.ids == free.ids[:len(cut.ids)]
    assert text.answers(speaker, ["one"], letters, length=24, stop=word)[0] == cut, "a text is one stop, no letters"
    assert text.answers(speaker, ["one"], letters, length=24, stop=word, seed=np.int64(0))[0] == cut


def test_a_prompt_beyond_what_a_rotary_model_was_made_for_is_said(speaker):
    said, longest = [], speaker.model.cfg.max_length
    text.prompted(speaker, [[1] * (longest - 4)], length=5, say=said.append)
    assert not said
    text.prompted(speaker, ["x", [1] * (longest - 4)], length=6, say=said.append)
    assert said == [f"1 of 2 prompts, such as number 1 of {longest - 4} tokens with up to 6 new ones, pass the "
                    f"{longest} that this model was made for: it goes on, and may write badly there"]


@pytest.mark.parametrize("rope, most", [
    (RopeConfig(), 64), (RopeConfig(scaling="yarn", factor=4.0, original=32), 128),
    (RopeConfig(scaling="llama3", factor=8.0, original=8), 64), (RopeConfig(scaling="dynamic", factor=4.0), 64),
    (RopeConfig(scaling="linear", factor=8.0), 64)], ids=lambda value: getattr(value, "scaling", value))
def test_what_a_scaled_rope_was_made_for_is_known(speaker, rope, most):
    said, cfg = [], dataclasses.replace(speaker.model.cfg, rope=rope, max_length=64)
    scaled = dataclasses.replace(speaker, model=types.SimpleNamespace(cfg=cfg))
    for length in (1, 2):
        assert not said
        text.prompted(scaled, [[1] * most], length=length, say=said.append)
    assert f"pass the {most} that this model was made for" in said[0]


def test_a_prompt_that_cannot_be_is_named(speaker):
    with pytest.raises(ConfigError, match="token 999 is none of this model's 384: is the tokenizer another model's"):
        text.answers(speaker, [[1, 999]])
    with pytest.raises(ConfigError, match="prompt \\[\\] is empty"):
        text.answers(speaker, [[]])
    begun = f"; ids [{speaker.before[0]}] in its place go on from nothing"
    for before, cure in ((speaker.before, begun), ((), "")):  # a token that begins texts makes no prompt of nothing
        with pytest.raises(ConfigError) as told:
            text.answers(dataclasses.replace(speaker, before=before), [""])
        assert str(told.value) == "prompt '' is empty: write a word" + cure
    with pytest.raises(ConfigError, match="2 seeds for 1 prompts"):
        text.answers(speaker, ["x"], seed=[1, 2])


@pytest.mark.parametrize("flags, said", [
    ("--beams=2 --top_p=0.5", "--top_p with --beams: a search"), ("--beams=2 --draft=x", "--draft with --beams"),
    ("--beams=2 --seed=1", "--seed with --beams"), ("--beams=2 --logit_bias=1:2", "--logit_bias with --beams"),
    ("--chat --beams=2", "--beams with --chat: a conv"),
    ("--chat --draft=x", "--draft with --chat"), ("--chat --json", "--json with --chat"),
    ("--chat --prompt=x", "--prompt with --chat"), ("--chat --prompts=x", "--prompts with --chat")])
def test_a_flag_without_a_use_is_refused(flags, said):
    with pytest.raises(ConfigError, match=said):
        program.parse(["generate", "--model=m", *flags.split()])
    assert program.parse(["generate", "--model=m", flags.split()[0]]).model == "m"


@pytest.mark.parametrize("flag, needed", [("--system=hello", "--chat"), ("--length_penalty=0.5", "--beams=2"),
                                          ("--ahead=3", "--draft=x")])
def test_a_flag_that_waits_for_another_is_refused_alone(flag, needed):
    with pytest.raises(ConfigError, match=f"{flag.split('=')[0]} without {needed.split('=')[0]}: it would do nothing"):
        program.parse(["generate", "--model=m", flag])
    assert program.parse(["generate", "--model=m", flag, needed]).model == "m"


def test_standard_output_of_json_holds_nothing_else(speaker, monkeypatch, capsys):
    monkeypatch.setattr(parallel, "use", lambda mesh: None)
    monkeypatch.setattr(session, "load", lambda path, say=print: (say(f"reads {path}"), speaker)[1])
    long = "x" * (speaker.model.cfg.max_length + 1)
    assert program.main(["", "--model=large", "--draft=small", "--json", f"--prompt={long}", "--length=2"]) == 0
    out, err = capsys.readouterr()
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == [long]
    assert "reads large" in err and "reads small" in err and "that this model was made for" in err


def test_where_flags_are_silent_the_folder_says_how_to_draw(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(parallel, "use", lambda mesh: None)
    place = speakers.published(tmp_path / "folder")
    told = {"eos_token_id": [257], "temperature": 0.5, "top_k": 9, "no_repeat_ngram_size": 2}

    def shown(do_sample, *flags):
        (place / "generation_config.json").write_text(json.dumps(told | {"do_sample": do_sample}))
        assert program.main(["", f"--model={place}", "--prompt=x", "--json", "--length=8", *flags]) == 0
        found = capsys.readouterr()
        return json.loads(found.out)["ids"], [line for line in found.err.splitlines() if " says: " in line]

    own = load(place)
    for do_sample, flags, sampler, said in (
            (True, [], Sampler(0.5, top_k=9, no_repeat_ngram_size=2),
             "--temperature=0.5 --top_k=9 --no_repeat_ngram_size=2"),
            (True, ["--top_k=0", "--no_repeat_ngram_size=0"], Sampler(0.5), "--temperature=0.5"),
            (False, [], Sampler(no_repeat_ngram_size=2), "--no_repeat_ngram_size=2")):
        ids, lines = shown(do_sample, *flags)
        assert ids == text.answers(own, ["x"], sampler, length=8)[0].ids and lines == [f"as {place} says: {said}"]
    assert shown(True, "--beams=2")[1] == [f"as {place} says: --no_repeat_ngram_size=2"]


def test_a_conversation_takes_few_widths(speaker):
    widths = {text.prompted(speaker, [[1] * n], length=1, say=len)["tokens"].shape[1] for n in range(1, 4097, 31)}
    assert widths == {*range(32, 257, 32), 512, 1024, 2048, 4096}


def test_a_message_without_room_is_dropped_and_the_talk_goes_on(tmp_path, monkeypatch, capsys):
    c = speakers.settings(positions="learned", max_length=512)
    own = load(speakers.run(tmp_path / "run", c, {10: {"params": speakers.parameters(c)}}))
    monkeypatch.setattr(parallel, "use", lambda mesh: None)
    monkeypatch.setattr(session, "load", lambda path, say=print: own)

    def talk(*lines):
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
        assert program.main(["", "--model=run", "--chat", "--length=4"]) == 0
        return capsys.readouterr()

    short, long = talk("hi", "there"), talk("hi", "x" * 599, "there")
    assert long.out == short.out and "dropped" not in short.err
    assert long.err.count("positions: cut it. Your last message is dropped") == 1
    with pytest.raises(ConfigError, match="positions"):
        talk("x" * 599)  # nothing was said before that could stand


@pytest.mark.parametrize("last, code, said", [
    ("[print(i, flush=True) for i in range(10**6)]", 141, ""), ("print(sys.stdin.readline())", 141, ""),
    ("os.write(os.pipe()[1], bytes(1)); raise BrokenPipeError('another pipe')", 1, "another pipe"),
    ("raise KeyboardInterrupt", 130, "error: my own words\n")], ids=["much", "little", "another", "interrupted"])
def test_a_program_whose_reader_has_gone_ends_in_silence(last, code, said):
    source = f"""
import os, sys
from lm_jax import errors
def main(argv):
    print("first", flush=True)
    {last}
errors.run(main, again="my own words")
"""
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", source], stdin=pipe, stdout=pipe, stderr=pipe, text=True,
                               cwd=pathlib.Path(__file__).parent.parent)
    if code == 141:
        assert process.stdout.readline() == "first\n"
        process.stdout.close()
        process.stdout = None
    err = process.communicate("\n", timeout=60)[1]
    assert process.returncode == code and (err == said or code == 1 and said in err and "Traceback" in err), err
