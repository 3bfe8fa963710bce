"""The zoo makes the published models, the ladder's one dial moves everything one way, and every config can run."""

import dataclasses
import pathlib
import runpy

import jax
import numpy as np
import pytest
from flax import nnx

from lm_jax import config
from lm_jax.config import ConfigError
from lm_jax.models import zoo
from lm_jax.models.transformer import Transformer

# Parameters as the papers, model cards or published checkpoints have them (with the pretraining heads for BERT).
PUBLISHED = {
    "gpt2-small": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama-1b": 1_100_048_384,
    "llama-7b": 6_738_415_616,
    "llama-8b": 8_030_261_248,
    "llama-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-8b": 8_190_735_360,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "mixtral-8x7b": 46_702_792_704,
    "bert-base": 110_106_428,
    "bert-large": 336_226_108,
    "distilbert": 66_985_530,
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "t5-large": 737_668_096,
    "t5-xl": 2_851_598_336,
    "t5-xxl": 11_307_321_344,
    "t5-v1.1-small": 76_961_152,
    "t5-v1.1-base": 247_577_856,
    "t5-v1.1-large": 783_150_080,
    "t5-v1.1-xl": 2_849_757_184,
    "t5-v1.1-xxl": 11_135_332_352,
}


@pytest.mark.parametrize("name", zoo.MODELS)
def test_every_named_model_has_its_published_size(name):
    assert count(settings(zoo.get(name))) == PUBLISHED[name]


def test_an_unknown_model_is_told_the_nearest():
    with pytest.raises(ConfigError, match="'llama-8b'"):
        zoo.get("llama8b")
    with pytest.raises(ConfigError, match="'bert-base'"):
        zoo.get("BERT_base")


def test_what_a_caller_changes_does_not_reach_the_next_one():
    zoo.get("mixtral-8x7b")["moe"]["experts"] = 2
    assert zoo.get("mixtral-8x7b")["moe"]["experts"] == 8


@pytest.mark.parametrize("params", [50e3, 1e6, 30e6, 125e6, 1e9, 10e9])
def test_the_ladder_by_parameters_lands_near_them(params):
    rung = zoo.ladder(params=params)
    assert rung["heads"] * rung["head_size"] == rung["width"]
    assert abs(np.log(zoo.non_embedding(rung) / params)) < (np.log(1.25) if params > 3e6 else np.log(1.7))


def test_the_ladder_never_shrinks_when_its_dial_is_turned_up():
    by_params = [zoo.ladder(params=p) for p in np.geomspace(50e3, 10e9, 200)]
    by_depth = [zoo.ladder(depth=L) for L in range(1, zoo.DEEPEST + 1)]
    for rungs in (by_params, by_depth):
        for key in ("depth", "width", "head_size", "hidden"):
            assert (np.diff([rung[key] for rung in rungs]) >= 0).all(), key
    assert (np.diff([zoo.non_embedding(rung) for rung in by_depth]) > 0).all()
    assert all(60 <= rung["width"] / rung["depth"] <= 80 for rung in by_depth)


def test_the_ladder_counts_what_the_model_holds():
    for rung in (zoo.ladder(depth=1), zoo.ladder(params=20e6), zoo.ladder(depth=40)):
        model = settings(rung | {"vocab": 1000})
        assert count(model) - model.vocab * model.width == zoo.non_embedding(rung)


CONFIGS = sorted((pathlib.Path(__file__).parent.parent / "configs").glob("*.py"))
SIZES = {"tiny": 2.1e6, "tiny_bert": 2.2e6, "tiny_t5": 3.9e6, "125m": 125e6, "1b": 1.1e9, "8b": 8e9, "bert_base": 110e6,
         "t5_base": 220e6, "ul2": 250e6, "moe": 6.9e9, "70b": 70.6e9}
IMPOSSIBLE = [{}, {"depth": 3, "params": 1e6}, {"depth": 61}, {"depth": -1}, {"params": 1e4}, {"params": 1e12}]


@pytest.mark.parametrize("dial", IMPOSSIBLE)
def test_a_dial_that_cannot_be_set_says_what_can(dial):
    with pytest.raises(ConfigError, match="exactly one|rungs go from"):
        zoo.ladder(**dial)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_can_run_and_is_as_large_as_it_says(path):
    c = config.resolve(runpy.run_path(str(path))["get_config"]())
    assert c.name == path.stem, "the run's default folder is named after the file"
    assert c.optim.warmup < c.train.steps
    assert path.read_text("utf-8").count("\n") <= 31, "a config says only what differs"
    params = count(dataclasses.replace(c.model, vocab=c.model.vocab or c.data.vocab))
    assert params == pytest.approx(SIZES[path.stem], rel=0.05)


def settings(values: dict) -> config.TransformerConfig:
    """`values` on top of the defaults, through the typed, locked dictionary that a config file has."""
    c = config.default()
    c.model.update(values)
    m = c.model.to_dict()
    return config.TransformerConfig(**m | dict(rope=config.RopeConfig(**m["rope"]), moe=config.MoEConfig(**m["moe"])))


def count(m: config.TransformerConfig) -> int:
    """Parameters of the model itself, made of shapes only."""
    model = jax.eval_shape(lambda: Transformer(m, rngs=nnx.Rngs(0)))
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
