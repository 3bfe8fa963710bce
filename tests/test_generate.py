"""Decoding with a cache is the full pass, for every architecture; rows are their own; draws follow the law."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from scipy import stats

from lm_jax import config, hosts, parallel
from lm_jax.config import ConfigError
from lm_jax.inference.generate import generate
from lm_jax.inference.sample import Sampler, sample
from lm_jax.models.transformer import Transformer

V, T, SOURCE = 32, 10, 5
TINY = config.TransformerConfig(vocab=V, width=16, depth=2, heads=4, hidden=32, max_length=24, dtype="float32")
VARIANTS = {
    "plain": {},
    "encoder": dict(causal=False),
    "rope, grouped queries": dict(kv_heads=2, qk_norm=True),
    "learned, post-norm, biases": dict(positions="learned", norm="layer", norm_place="post", bias="all", gated=False),
    "sinusoidal, multi-query": dict(positions="sinusoidal", kv_heads=1),
    "relative": dict(positions="relative", attention_scale=1.0),
    "alibi": dict(positions="alibi"),
    "none, soft-caps": dict(positions="none", attention_softcap=20.0, logit_softcap=10.0, tied=False),
    "windows, sinks": dict(window=3, window_pattern="SF", sinks=True),
    "experts": dict(moe=config.MoEConfig(experts=4, top_k=2, shared=1)),
    "encoder-decoder": dict(encoder_depth=1, positions="relative", attention_scale=1.0, table_scale="out"),
}
GREEDY, DRAWN = Sampler(temperature=0), Sampler(temperature=0.7, top_k=9, top_p=0.95)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in ("plain", "encoder")])
def test_decoding_with_a_cache_is_the_full_pass(name, rng):
    model = make(name)
    batch = prompts(rng, [T, T], model=model)
    full_BTV, cached_BTV = full_and_cached(model, batch)
    spread = np.std(full_BTV)
    np.testing.assert_allclose(cached_BTV, full_BTV, atol=1e-5 * max(spread, 1))
    assert np.std(full_BTV, axis=1).mean() > 0.1  # or the comparison would show nothing


@pytest.mark.parametrize("name", ["rope, grouped queries", "windows, sinks", "encoder-decoder"])
def test_a_greedy_continuation_is_what_the_full_pass_finds_likeliest(name, rng):
    model = make(name)
    batch = prompts(rng, [4, 4], model=model)
    tokens_BT, lengths_B, _ = generate(model, batch, GREEDY, length=7, key=jax.random.key(0))
    whole = prompts(rng, [10, 10], model=model) | {k: v for k, v in batch.items() if k == "source"}
    whole["tokens"] = jnp.concatenate([batch["tokens"], tokens_BT[:, :-1]], 1)
    assert (full_and_cached(model, whole)[0][:, 3:].argmax(-1) == tokens_BT).all()
    assert (lengths_B == 7).all()


@pytest.mark.parametrize("name", ["rope, grouped queries", "learned, post-norm, biases", "encoder-decoder"])
def test_a_batch_gives_what_its_rows_give_alone(name, rng):
    """Prompts of unequal length, padded to one width, and one that is all padding."""
    model, keys_B = make(name), jax.random.split(jax.random.key(3), 4)
    batch = prompts(rng, [4, 2, 0, 3], model=model)
    together_BT, lengths_B, _ = generate(model, batch, DRAWN, length=6, key=keys_B)
    assert list(lengths_B) == [6, 6, 0, 6] and not together_BT[2].any()
    alone = {k: v[1:2, :2] for k, v in batch.items() if k != "source"}
    if "source" in batch:
        alone["source"] = {k: v[1:2, :SOURCE + 1] for k, v in batch["source"].items()}
    alone_BT, _, _ = generate(model, alone, DRAWN, length=6, key=keys_B[1:2])
    assert (alone_BT[0] == together_BT[1]).all()


def test_a_row_ends_at_its_stop_token(rng):
    model, key = make("plain"), jax.random.key(5)
    batch = prompts(rng, [3, 3, 3], model=model)
    free_BT, _, _ = generate(model, batch, Sampler(), length=9, key=key, stop=V)  # which never comes
    stop = int(free_BT[0, 4])
    tokens_BT, lengths_B, _ = generate(model, batch, Sampler(), length=9, key=key, stop=stop)
    for free_T, tokens_T, length in zip(np.asarray(free_BT), np.asarray(tokens_BT), lengths_B):
        hits = np.flatnonzero(free_T == stop)
        end = hits[0] + 1 if len(hits) else 9
        assert length == end and (tokens_T[:end] == free_T[:end]).all() and not tokens_T[end:].any()
    assert lengths_B[0] <= 5


def test_rows_draw_apart_and_again_the_same(rng):
    model = make("plain")
    batch = jax.tree.map(lambda x: jnp.repeat(x, 3, 0), prompts(rng, [3], model=model))
    draw = lambda seed: np.asarray(generate(model, batch, Sampler(), length=9, key=jax.random.key(seed), stop=V)[0])
    assert (draw(0) == draw(0)).all() and (draw(0) != draw(1)).any()
    assert len({tuple(row) for row in draw(0)}) == 3


def test_a_mesh_generates_the_same_tokens(rng):
    model, keys_B = make("encoder-decoder"), jax.random.split(jax.random.key(4), 4)
    batch = prompts(rng, [4, 2, 0, 3], model=model)
    expected = generate(model, batch, DRAWN, length=6, key=keys_B)
    with jax.set_mesh(parallel.make_mesh(config.MeshConfig(fsdp=2, sequence=2, model=2))):
        made = generate(on_mesh(model), hosts.put_batch(batch), DRAWN, length=6, key=keys_B)
    jax.tree.map(np.testing.assert_array_equal, made[:2], expected[:2])
    np.testing.assert_allclose(made.logprobs_BT, expected.logprobs_BT, atol=1e-5)


LOGITS = np.array([1.0, 0.5, 0.0, 2.0, -1.0, 0.5, 1.5, 3.0])


@pytest.mark.parametrize("sampler, kept", [
    (Sampler(), range(8)), (Sampler(temperature=2.0), range(8)), (Sampler(top_k=3), [7, 3, 6]),
    (Sampler(top_p=0.65), [7, 3]),  # 0.51, 0.19, then 0.11
    (Sampler(temperature=2.0, top_k=6, top_p=0.9), [7, 3, 6, 0, 1]),  # of two equals the first is kept
], ids=str)
def test_draws_follow_the_law(sampler, kept):
    draws_B = sample(jnp.broadcast_to(jnp.asarray(LOGITS, jnp.bfloat16), (20_000, 8)), sampler, jax.random.key(0))
    probs = np.exp(LOGITS[list(kept)] / sampler.temperature)
    counts = np.bincount(draws_B, minlength=8)
    assert counts[list(kept)].sum() == 20_000
    assert stats.chisquare(counts[list(kept)], 20_000 * probs / probs.sum()).pvalue > 1e-3


def test_padding_of_the_table_is_never_drawn():
    logits_BV = jnp.broadcast_to(jnp.asarray(LOGITS), (500, 8))
    for sampler in (GREEDY, Sampler(), Sampler(top_k=8), Sampler(top_p=0.99)):
        assert sample(logits_BV, sampler, jax.random.key(0), vocab=7).max() < 7


def test_what_cannot_be_generated_says_why(rng):
    for bad, message in ((dict(temperature=-1.0), "temperature=-1.0"), (dict(top_k=-2), "top_k=-2"),
                         (dict(top_p=0.0), "top_p=0.0")):
        with pytest.raises(ConfigError, match=message):
            Sampler(**bad)
    for name, length, message in (("learned, post-norm, biases", 22, "at most 25 in all"), ("plain", 0, "length=0"),
                                  ("encoder", 3, "sees both ways")):
        model = make(name)
        with pytest.raises(ConfigError, match=message):
            generate(model, prompts(rng, [4], model=model), GREEDY, length=length, key=jax.random.key(0))


@functools.cache
def make(name: str):
    """A tiny model with weights so large that tokens matter; not the library's, which takes long to compile."""
    rng = np.random.default_rng(1)
    model = jax.eval_shape(lambda: Transformer(dataclasses.replace(TINY, **VARIANTS[name]), rngs=nnx.Rngs(0)))
    centre = lambda path: 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
    return jax.tree_util.tree_map_with_path(
        lambda path, w: jnp.asarray(centre(path) + 0.4 * rng.normal(size=w.shape), w.dtype), model)


def on_mesh(model):
    """The model's numbers laid out as a model that is made on the mesh."""
    made = jax.eval_shape(lambda: Transformer(model.cfg, rngs=nnx.Rngs(0)))
    mesh = jax.sharding.get_mesh()
    return jax.tree.map(lambda w, like: jax.device_put(w, NamedSharding(mesh, like.sharding.spec)), model, made)


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


@jax.jit
def full_and_cached(model, batch):
    """Logits of one pass over the whole row, and of one token at a time through the cache."""
    prefix = 3
    own = {name: x for name, x in batch.items() if name != "source"}

    def step(cache, token):
        x_B1D, cache, _ = model.hidden(jax.tree.map(lambda x_B: x_B[:, None], token), cache=cache)
        return cache, model.logits(x_B1D)[:, 0]

    x_BTD, cache, _ = model.hidden({k: x[:, :prefix] for k, x in own.items()}, cache=model.cache(batch, T + 2))
    _, rest_TBV = jax.lax.scan(step, cache, {k: x[:, prefix:].swapaxes(0, 1) for k, x in own.items()})
    return model(batch), jnp.concatenate([model.logits(x_BTD), rest_TBV.swapaxes(0, 1)], 1)
