"""Greedy text of every family that writes is what `transformers` wrote (tests/golden), windows and scaled positions
included."""

import jax
import pytest
from checkpoints import GOLDEN, PROMPT, TOKENS

from lm_jax import hub
from lm_jax.inference.generate import generate
from lm_jax.inference.sampler import Sampler

WRITERS = [name for name, golden in GOLDEN.items() if "greedy" in golden]


@pytest.mark.parametrize("name", WRITERS)
def test_greedy_text_is_what_transformers_wrote(name, folder):
    model, prompt = hub.load(folder(name), dtype="float32"), [TOKENS[:PROMPT]]
    batch = hub.batch(model.cfg, prompt)
    if model.cfg.encoder_depth:
        batch = hub.batch(model.cfg, [[0]]) | {"source": batch}
    made = generate(model, batch, Sampler(0), length=10, key=jax.random.key(0))
    assert made.tokens_BT[0].tolist() == GOLDEN[name]["greedy"]


def test_what_writes_is_of_every_kind():
    kinds = {GOLDEN[name]["config"]["model_type"] for name in WRITERS}
    assert kinds == {"gpt2", "t5", "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma2",
                     "gemma3_text", "deepseek_v3"}
