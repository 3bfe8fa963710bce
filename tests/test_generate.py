"""Decoding with a cache is the full pass, for every architecture; rows are their own; nothing is copied on the way."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lm_jax import config, hosts, parallel
from lm_jax.config import ConfigError, MoEConfig, RopeConfig
from lm_jax.inference import generate as generation
from lm_jax.inference.generate import generate
from lm_jax.inference.sampler import Sampler
from lm_jax.models import zoo
from lm_jax.models.transformer import Transformer, apart

V, T, SOURCE = 32, 10, 5
TINY = dict(vocab=V, width=16, depth=2, heads=4, hidden=32, max_length=24, dtype="float32")
OF_THE_ZOO = ("gpt2-small", "llama-7b", "llama-3.2-1b", "qwen3-0.6b", "gemma-2-2b", "mixtral-8x7b", "t5-small",
              "t5-v1.1-small")
ROPES = {scaling: dict(rope=RopeConfig(scaling=scaling, factor=2.0), max_length=8, head_size=8, depth=1)
         for scaling in ("linear", "ntk", "yarn", "llama3")}
VARIANTS = {name: {} for name in OF_THE_ZOO} | ROPES | {
    "dynamic, partly, interleaved": dict(depth=1, head_size=16, rope=RopeConfig(scaling="dynamic", factor=2.0,
                                                                                fraction=0.5, interleaved=True)),
    "plain": {},
    "encoder": dict(causal=False),
    "labels": dict(head="classes", tied=False),
    "rope, grouped queries": dict(kv_heads=2, qk_norm=True),
    "learned, post-norm, biases": dict(positions="learned", norm="layer", norm_place="post", bias="all", gated=False),
    "sinusoidal, multi-query": dict(positions="sinusoidal", kv_heads=1, depth=1),
    "alibi": dict(positions="alibi", depth=1),
    "none, soft-caps": dict(positions="none", attention_softcap=20.0, logit_softcap=10.0, tied=False, depth=1),
    "two thetas, windows, sinks": dict(window=3, window_pattern="SSF", depth=3, sinks=True,
                                       rope=RopeConfig(theta=1e3, local_theta=10.0)),
    "latents, dense and experts": dict(latent=8, query_latent=8, head_size=8, rope=RopeConfig(fraction=0.5), depth=3,
                                       moe=MoEConfig(experts=4, top_k=2, shared=1, pattern="DEE")),
    "encoder-decoder": dict(encoder_depth=1, positions="relative", attention_scale=1.0, table_scale="out"),
}
GREEDY, DRAWN = Sampler(temperature=0), Sampler(temperature=0.7, top_k=9, top_p=0.95, repetition_penalty=1.2)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in ("plain", "encoder", "labels")])
def test_decoding_with_a_cache_is_the_full_pass(name, rng):
    model = make(name)
    batch = prompts(rng, [T, T], model=model)
    full_BTV, cached_BTV = full_and_cached(model, batch)
    spread = np.std(full_BTV)
    np.testing.assert_allclose(cached_BTV, full_BTV, atol=1e-5 * max(spread, 1))
    assert np.std(full_BTV, axis=1).mean() > 0.1  # or the comparison would show nothing


@pytest.mark.parametrize("name", ["two thetas, windows, sinks", "latents, dense and experts", "encoder-decoder"])
def test_layers_taken_apart_give_the_same_numbers(name, rng):
    model = make(name)
    batch = prompts(rng, [T, T], model=model)
    stacked, alone = full_and_cached(model, batch)[1], full_and_cached(apart(model), batch)[1]
    np.testing.assert_allclose(alone, stacked, atol=1e-5 * max(np.std(stacked), 1))


def test_a_greedy_continuation_is_what_the_full_pass_finds_likeliest(rng):
    """And its log-probabilities are the full pass's, over the whole vocabulary, whatever the sampler."""
    model = make("encoder-decoder")
    batch = prompts(rng, [4, 4], model=model)
    biased = dataclasses.replace(GREEDY, logit_bias={5: 3.0}, frequency_penalty=0.1)
    for sampler in (GREEDY, biased):
        tokens_BT, lengths_B, logprobs_BT = generate(model, batch, sampler, length=7, key=jax.random.key(0))
        whole = prompts(rng, [10, 10], model=model) | {k: v for k, v in batch.items() if k == "source"}
        whole["tokens"] = jnp.concatenate([batch["tokens"], tokens_BT[:, :-1]], 1)
        logprobs_BTV = jax.nn.log_softmax(full_and_cached(model, whole)[0][:, 3:])
        assert sampler is biased or (logprobs_BTV.argmax(-1) == tokens_BT).all()
        found_BT = jnp.take_along_axis(logprobs_BTV, tokens_BT[..., None], 2)[..., 0]
        np.testing.assert_allclose(logprobs_BT, found_BT, atol=1e-4)
        assert (lengths_B == 7).all()


def test_log_probabilities_are_over_all_ids_also_where_few_may_be_drawn(rng):
    model = make("plain")
    batch = prompts(rng, [4], model=model)
    tokens_BT, _, logprobs_BT = generate(model, batch, GREEDY, length=1, key=jax.random.key(0), vocab=3)
    of_all_V = jax.nn.log_softmax(model(batch)[0, -1].astype(jnp.float32))
    assert tokens_BT[0, 0] == of_all_V[:3].argmax()
    np.testing.assert_allclose(logprobs_BT[0, 0], of_all_V[:3].max(), atol=1e-4)


@pytest.mark.parametrize("name", ["rope, grouped queries", "encoder-decoder"])
def test_a_batch_gives_what_its_rows_give_alone(name, rng):
    """Prompts of unequal length, padded to one width, one that is all padding, and a sampler each."""
    model, keys_B = make(name), jax.random.split(jax.random.key(3), 4)
    batch = prompts(rng, [4, 2, 0, 3], model=model)
    together_BT, lengths_B, _ = generate(model, batch, [GREEDY, DRAWN, GREEDY, Sampler()], length=6, key=keys_B)
    assert list(lengths_B) == [6, 6, 0, 6] and not together_BT[2].any()
    alone = {k: v[1:2, :2] for k, v in batch.items() if k != "source"}
    if "source" in batch:
        alone["source"] = {k: v[1:2, :SOURCE + 1] for k, v in batch["source"].items()}
    alone_BT, _, _ = generate(model, alone, DRAWN, length=6, key=keys_B[1:2])
    assert (alone_BT[0] == together_BT[1]).all()


def test_a_row_ends_at_the_first_of_its_stop_tokens(rng):
    model, key = make("plain"), jax.random.key(5)
    batch = prompts(rng, [3, 3, 3], model=model)
    free_BT, _, _ = generate(model, batch, Sampler(), length=9, key=key, stop=(V, V))  # which never comes
    stop = (int(free_BT[0, 4]), int(free_BT[1, 6]))
    tokens_BT, lengths_B, logprobs_BT = generate(model, batch, Sampler(), length=9, key=key, stop=stop)
    for free_T, tokens_T, logprobs_T, length in zip(*map(np.asarray, (free_BT, tokens_BT, logprobs_BT, lengths_B))):
        hits = np.flatnonzero(np.isin(free_T, stop))
        end = hits[0] + 1 if len(hits) else 9
        assert length == end and (tokens_T[:end] == free_T[:end]).all()
        assert not tokens_T[end:].any() and not logprobs_T[end:].any() and logprobs_T[:end].all()
    assert lengths_B[0] <= 5


def test_rows_draw_apart_and_again_the_same(rng):
    model = make("plain")
    batch = jax.tree.map(lambda x: jnp.repeat(x, 3, 0), prompts(rng, [3], model=model))
    draw = lambda seed: np.asarray(generate(model, batch, Sampler(), length=9, key=jax.random.key(seed))[0])
    assert (draw(0) == draw(0)).all() and (draw(0) != draw(1)).any()
    assert len({tuple(row) for row in draw(0)}) == 3


@pytest.mark.parametrize("name", ["encoder-decoder"])
def test_a_mesh_generates_the_same_tokens(name, rng):
    model, keys_B = make(name), jax.random.split(jax.random.key(4), 4)
    batch = prompts(rng, [4, 2, 0, 3], model=model)
    expected = generate(model, batch, DRAWN, length=6, key=keys_B)
    with jax.set_mesh(parallel.make_mesh(config.MeshConfig(fsdp=2, sequence=2, model=2))):
        made = generate(tiny.on_mesh(model), hosts.put_batch(batch), DRAWN, length=6, key=keys_B)
    jax.tree.map(np.testing.assert_array_equal, made[:2], expected[:2])
    np.testing.assert_allclose(made.logprobs_BT, expected.logprobs_BT, atol=1e-4)


@pytest.mark.parametrize("name", ["rope, grouped queries", "encoder-decoder"])
def test_no_step_copies_the_cache_or_a_layers_weights(name, rng):
    """In the loop of the compiled program nothing as large as a layer's keys is copied, sliced or joined."""
    model, slots = make(name), 64
    batch = prompts(rng, [32] * 8, model=model)
    rules, stops = generation.asked(model, batch, GREEDY, length=slots - 31, stop=(), vocab=0)
    keys_B = jax.random.split(jax.random.key(0), 8)
    program = generation._generate.lower(model, batch, rules, keys_B, stops, length=slots - 31, vocab=0).compile()
    body = loop(program.as_text())
    large = [line for line in body if moved(line) >= 8 * slots * model.cfg.sizes["K"] * model.cfg.sizes["H"]]
    assert any("dynamic-update-slice" in line for line in large)  # in place: the result is the operand's memory
    assert not [line for line in large if re.search(r" (copy|slice|dynamic-slice|concatenate|transpose)\(", line)]
    assert not [line for line in large if re.search(r"%\w*(copy|concatenate|transpose)\w*fusion", line)]
    cut = [line for line in body if moved(line) >= 16 * 32]  # an MLP's weights, sliced out of what is stacked
    assert not [line for line in cut if re.search(r"%(slice|wrapped_slice)\w* = | slice\(", line)]


def test_numbers_of_a_sampler_and_stops_need_no_new_program(rng):
    model = make("plain")
    batch, before = prompts(rng, [3, 3], model=model), generation._generate._cache_size()
    for temperature, stop in ((0.5, (3,)), (0.9, (4,))):
        generate(model, batch, Sampler(temperature), length=4, key=jax.random.key(0), stop=stop)
    assert generation._generate._cache_size() == before + 1


@pytest.mark.parametrize("name, knobs, message", [
    ("learned, post-norm, biases", dict(length=22), "at most 25 in all"), ("plain", dict(length=0), "length=0"),
    ("encoder", dict(length=3), "sees both ways"), ("labels", dict(length=3), "model.head='classes'"),
    ("plain", dict(length=3, vocab=33), "vocab=33 and the model has 32"),
    ("plain", dict(length=3, sampler=[GREEDY]), "1 samplers for 2 rows")], ids=str)
def test_what_cannot_be_generated_says_why(name, knobs, message, rng):
    model = make(name)
    with pytest.raises(ConfigError, match=message):
        generate(model, prompts(rng, [4, 4], model=model), **dict(sampler=GREEDY) | knobs, key=jax.random.key(0))


def test_a_source_longer_than_learned_positions_is_refused(rng):
    model = tiny.model(**TINY | dict(encoder_depth=1, positions="learned", max_length=7))
    sources = lambda longest: prompts(rng, [1], model=model) | {"source": prompts(rng, [longest], model=model)}
    with pytest.raises(ConfigError, match="a source of 8 tokens passes model.max_length=7 learned positions"):
        generate(model, sources(8), GREEDY, length=3, key=jax.random.key(0))
    assert generation.asked(model, sources(7), GREEDY, length=3, stop=(), vocab=0)


def test_a_prompt_without_tokens_is_refused(rng):
    model = make("plain")
    empty = jax.tree.map(lambda x: x[:, :0], prompts(rng, [4], model=model))
    with pytest.raises(ConfigError, match="at least one of one token"):
        generate(model, empty, GREEDY, length=3, key=jax.random.key(0))


@functools.cache
def make(name: str) -> Transformer:
    """A tiny model with weights so large that tokens matter."""
    return tiny.model(**TINY | (shrunk(name) if name in OF_THE_ZOO else VARIANTS[name]))


def shrunk(name: str) -> dict:
    """A published model's settings in small: what it switches stays."""
    had = zoo.get(name)
    rope = RopeConfig(**had.pop("rope", {}))
    moe = MoEConfig(**had.pop("moe", {}))
    small = dict(window=3, head_size=8, encoder_depth=1, init_std=0.0, dropout=0.0)
    return {key: value for key, value in had.items() if key not in ("vocab", "depth", "width", "heads", "hidden")} | {
        key: value for key, value in small.items() if had.get(key)} | {
        "rope": rope, "moe": dataclasses.replace(moe, experts=min(moe.experts, 4)), "max_length": 24,
        "kv_heads": 2 if had.get("kv_heads", had["heads"]) < had["heads"] else 0}


def prompts(rng, sizes, *, model):
    """Right-padded random prompts; for an encoder also sources of different lengths."""

    def rows(sizes):
        real_BT = np.arange(max(sizes)) < np.array(sizes)[:, None]
        ints = lambda x: jnp.asarray(np.where(real_BT, x, 0), jnp.int32)
        tokens_BT = rng.integers(1, V, real_BT.shape)
        return {"tokens": ints(tokens_BT), "positions": ints(np.arange(max(sizes))), "segments": ints(1)}

    batch = rows(sizes)
    if model.cfg.encoder_depth:
        batch["source"] = rows([SOURCE + row for row in range(len(sizes))])
    return batch


def full_and_cached(model, batch):
    """Logits of one pass over the whole row, and of one token at a time through the cache."""
    return jax.jit(_full_and_cached, compiler_options=tiny.QUICK)(model, batch)


def _full_and_cached(model, batch):
    prefix = 3
    own = {name: x for name, x in batch.items() if name != "source"}

    def step(cache, token):
        x_B1D, cache, _ = model.hidden(jax.tree.map(lambda x_B: x_B[:, None], token), cache=cache)
        return cache, model.logits(x_B1D)[:, 0]

    x_BTD, cache, _ = model.hidden({k: x[:, :prefix] for k, x in own.items()}, cache=model.cache(batch, T + 2))
    _, rest_TBV = jax.lax.scan(step, cache, {k: x[:, prefix:].swapaxes(0, 1) for k, x in own.items()})
    return model(batch), jnp.concatenate([model.logits(x_BTD), rest_TBV.swapaxes(0, 1)], 1)


def loop(program: str) -> list[str]:
    """The lines of the longest loop's body in a compiled program."""
    bodies = [program.split(f"\n%{name} (", 1)[1].split("\n}", 1)[0].split("\n")
              for name in re.findall(r"body=%([\w.]+)", program)]
    return max(bodies, key=len)


def moved(line: str) -> int:
    """How many numbers the result of an instruction has."""
    shape = re.search(r"= \w+\[([\d,]+)\]", line)
    return int(np.prod([int(n) for n in shape[1].split(",")])) if shape else 0
