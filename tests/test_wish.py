"""What a model's folder says of how it writes is followed, checked, or said to be in vain."""

import json

import pytest
import tasks

import lm_jax
from lm_jax.errors import DataError
from lm_jax.pipelines.wish import IGNORED


@pytest.fixture
def write(tmp_path):
    """What its generation_config.json says -> the pipeline of a folder; `write.said` is what is told of it."""
    folder = tasks.make("gpt2", tmp_path)

    def get(**told):
        (folder / "generation_config.json").write_text(json.dumps(told))
        return lm_jax.pipeline("text-generation", model=folder, say=get.said.append, return_full_text=False)

    get.said = []
    return get


def test_a_folders_stop_strings_end_what_is_written(write):
    prompt, text = tasks.TWO[0], lambda made: made[0]["generated_text"]
    free = text(write(max_new_tokens=12)(prompt))
    word = free[len(free) // 2:][:3]
    go_on = write(max_new_tokens=12, stop_strings=[word])
    assert text(go_on(prompt)) == free[:free.index(word)] != free == text(go_on(prompt, stop_strings=[]))


@pytest.mark.parametrize("told, message", [
    ({"num_beams": "4"}, "num_beams='4': pass a whole number"), ({"early_stopping": 7}, "early_stopping=7: pass True"),
    ({"temperature": "warm"}, "temperature='warm': pass a number"), ({"do_sample": "no"}, "do_sample='no': pass True"),
    ({"stop_strings": 3}, "stop_strings=3: pass a string")], ids=str)
def test_what_a_folder_cannot_ask_for_is_named(write, told, message):
    with pytest.raises(DataError, match=f"generation_config.json, or config.json for text-generation, has {message}"):
        write(**told)


def test_what_is_asked_for_in_vain_is_said(write):
    write(num_beams=None, **dict.fromkeys(IGNORED)), write(**IGNORED)
    assert not [line for line in write.said if "asks for" in line]
    write(penalty_alpha=0.6, exponential_decay_length_penalty=[5, 1.1], guidance_scale=2, sequence_bias=[[[3], 1.0]])
    assert write.said[-1].endswith("sequence_bias=[[[3], 1.0]]: not followed") and write.said[-1].count("=") == 4
