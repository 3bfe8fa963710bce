"""Greedy text, penalties and beams are those of `transformers` on the same weights; needs the test-hf extra."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import hf  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

from lm_jax import hub  # noqa: E402
from lm_jax.inference import beam  # noqa: E402
from lm_jax.inference.generate import generate  # noqa: E402
from lm_jax.inference.sampler import Sampler  # noqa: E402

LENGTH, STOP = 10, 2
NAMES = ("gpt2", "gemma2", "t5", "deepseek")  # with penalties and beams
PLAIN = ("gemma3", "mixtral", "qwen3-moe-mixed", "qwen2-yarn", "mistral", "llama-3.1", "t5-v1.1")


@pytest.mark.parametrize("name", NAMES + PLAIN)
def test_greedy_text_and_beams_are_those_of_transformers(name, tmp_path):
    theirs, plain = hf.made(name), [{}]
    theirs.save_pretrained(tmp_path)
    settings = theirs.generation_config
    settings.eos_token_id, settings.pad_token_id, settings.decoder_start_token_id = STOP, 0, 0
    ours, prompts = hub.load(tmp_path, dtype="float32"), [[5, 9, 20, 33], [7, 8, 11]]
    start = ours.cfg.encoder_depth > 0
    batch = hub.batch(ours.cfg, [[0]] * 2 if start else prompts)
    batch |= {"source": hub.batch(ours.cfg, prompts)} if start else {}
    more = [{"repetition_penalty": 1.4}, {"no_repeat_ngram_size": 1}, {"no_repeat_ngram_size": 2}]
    for knobs in plain + more * (name in NAMES):
        made = generate(ours, batch, Sampler(0, **knobs), length=LENGTH, key=jax.random.key(0), stop=STOP)
        for row, prompt in enumerate(prompts):
            expected = written(theirs, prompt, start, **knobs).sequences[0]
            assert made.tokens_BT[row, :made.lengths_B[row]].tolist() == expected.tolist()[1 if start else len(prompt):]
    for knobs in plain + more[-1:] * (name in NAMES):
        found = beam.search(ours, batch, beams=3, length=LENGTH, stop=STOP, **knobs)
        for row, prompt in enumerate(prompts):
            expected = written(theirs, prompt, start, num_beams=3, length_penalty=1.0, early_stopping="never", **knobs)
            np.testing.assert_allclose(found.scores_BW[row, 0], expected.sequences_scores[0], atol=1e-3)
            best = found.tokens_BWT[row, 0, :found.lengths_BW[row, 0]].tolist()
            assert best == expected.sequences[0].tolist()[1 if start else len(prompt):]


def test_a_dynamic_rope_that_stretches_on_the_way_writes_what_it_does_in_transformers(tmp_path):
    theirs = hf.made("llama-dynamic")
    theirs.save_pretrained(tmp_path)
    theirs.generation_config.eos_token_id = None
    ours, prompt = hub.load(tmp_path, dtype="float32"), np.random.default_rng(3).integers(3, 99, 28).tolist()
    made = generate(ours, hub.batch(ours.cfg, [prompt]), Sampler(0), length=20, key=jax.random.key(0))
    expected = written(theirs, prompt, False, max_new_tokens=20)
    text = expected.sequences[0, len(prompt):].tolist()
    assert made.tokens_BT[0].tolist() == text
    logprobs_T = torch.log_softmax(torch.cat(expected.scores), -1)[range(20), text].numpy()
    np.testing.assert_allclose(made.logprobs_BT[0], logprobs_T, atol=1e-4)
    whole_TV = hub.logits(ours, [prompt + text[:-1]])[0, len(prompt) - 1:]
    whole_T = torch.log_softmax(torch.tensor(whole_TV), -1)[range(20), text].numpy()
    assert np.abs(whole_T - logprobs_T).max() > 1e-3, "it did not stretch: full passes say the same"


def written(model, prompt, start, **knobs):
    with torch.inference_mode():
        # its cache counts the layers of the encoder, where the decoder may have more
        knobs = {"max_new_tokens": LENGTH} | knobs
        return model.generate(torch.tensor([prompt]), do_sample=False, output_scores=True,
                              return_dict_in_generate=True, use_cache=not start, **knobs)
