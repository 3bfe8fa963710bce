"""What a token may depend on, by gradient and by perturbation, for every mask and placing; the cache; the heads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from lm_jax import losses
from lm_jax.config import CHOICES, MoEConfig, RopeConfig
from lm_jax.models.layouts import Layout
from lm_jax.models.transformer import Transformer

DOCUMENTS = (6, 7)  # and three tokens of padding
PATHS = {name: dict(positions=name) for name in CHOICES["model.positions"]} | {
    "dynamic rope": dict(rope=RopeConfig(scaling="dynamic", factor=2.0), max_length=4),
    "window": dict(window=2),
    "mixed windows": dict(window=2, window_pattern="SF"),
    "every switch": dict(kv_heads=2, qk_norm=True, attention_softcap=2.0, logit_softcap=3.0, sinks=True,
                         norm_place="sandwich"),
    "prefix": dict(),
    "prefix, relative": dict(positions="relative"),
    "both ways": dict(causal=False),
    "both ways, window": dict(causal=False, window=2),
}
OTHERS = {
    "encoder": dict(head="mlm"),  # the next-sentence head reads a row's first token, whatever document that is of
    "encoder_decoder": dict(),
    "experts": dict(moe=MoEConfig(experts=4, top_k=2, shared=1, balance=0.0, router_z=0.0)),  # whose losses are per row
}


def model_of(name: str) -> Transformer:
    return tiny.model(**PATHS[name]) if name in PATHS else tiny.model(name, **OTHERS[name])


def batch_of(name: str, batch: int = 1) -> dict:
    rows = tiny.pairs(batch=batch) if name == "encoder_decoder" else tiny.rows(batch=batch)
    return rows | {"order": np.maximum(rows["positions"], 3)} if "prefix" in name else rows


def may_reach(name: str, cfg, batch) -> np.ndarray:
    """Which of the token's inputs s can move which outputs t, through all layers."""
    segments, places = batch["segments"][0], batch["positions"][0]
    reach = segments[:, None] == segments[None]
    order = batch.get("order", batch["positions"])[0]
    if cfg.causal:
        reach &= order[None] <= order[:, None]
    if cfg.window and cfg.window_pattern == "S":
        reach &= np.abs(places[:, None] - places[None]) <= cfg.depth * (cfg.window - 1)
    return reach


@pytest.mark.parametrize("name", [*PATHS, "encoder"])
def test_a_token_depends_on_what_it_may_see_and_on_nothing_else(name):
    """d logits[t] / d embedding[s] is 0 exactly where s is ahead, in another document, or out of the window's reach."""
    model, batch = model_of(name), batch_of(name)
    x_BTD = model.embedded(batch)

    def outputs(x_BTD):
        logits_BTV = model.logits(model.decoder(x_BTD, Layout.of(batch))[0])
        return jnp.sin(jnp.arange(logits_BTV.shape[-1])) @ logits_BTV[0].T

    jacobian = jax.jit(jax.jacrev(outputs), compiler_options=tiny.QUICK)(x_BTD)[:, 0]
    moved = np.asarray(jnp.abs(jacobian).max(-1)) > 0
    np.testing.assert_array_equal(moved, may_reach(name, model.cfg, batch))


def test_a_decoder_sees_the_whole_of_its_own_source_and_nothing_of_another():
    model, batch = model_of("encoder_decoder"), batch_of("encoder_decoder")
    source = batch["source"]

    def outputs(x_BTD):
        encoded, _, _ = model.encoder(x_BTD, Layout.of(source))
        y_BTD, _, _ = model.decoder(model.embedded(batch), Layout.of(batch), memory=encoded, source=Layout.of(source))
        return jnp.sin(jnp.arange(y_BTD.shape[-1])) @ y_BTD[0].T

    jacobian = jax.jit(jax.jacrev(outputs), compiler_options=tiny.QUICK)(model.embedded(source))[:, 0]
    moved = np.asarray(jnp.abs(jacobian).max(-1)) > 0
    np.testing.assert_array_equal(moved, batch["segments"][0][:, None] == source["segments"][0][None])


@pytest.mark.parametrize("name", [*PATHS, *OTHERS])
def test_packed_rows_cannot_see_each_other_and_padding_moves_nothing(name):
    """Another document 1, other padding: logits of document 2, and what it teaches, stay as they were."""
    model, batch = model_of(name), batch_of(name, batch=2)
    second = batch["segments"] == 2
    batch["weights"] = second.astype(np.float32)
    other = dict(batch, tokens=np.where(second, batch["tokens"], 63 - batch["tokens"]))
    other["targets"] = np.where(second, batch["targets"], 63 - batch["targets"])
    if name == "encoder_decoder":
        source = batch["source"]
        changed = np.where(source["segments"] == 2, source["tokens"], 63 - source["tokens"])
        other["source"] = dict(source, tokens=changed)

    @functools.partial(jax.jit, compiler_options=tiny.QUICK)
    def lesson(model, batch):
        _, metrics, grads = tiny.score(model, batch)
        return model(batch), metrics["loss"].total, grads

    (logits, *taught), (others, *learned) = lesson(model, batch), lesson(model, other)
    assert float(jnp.abs(logits - others)[~second].max()) > 1e-3, "the perturbation does something"
    exact = dict(rtol=0, atol=0) if name != "experts" else dict(rtol=1e-4, atol=1e-5)  # experts sum in another order
    np.testing.assert_allclose(logits[second], others[second], **exact)
    jax.tree.map(functools.partial(np.testing.assert_allclose, **exact), taught, learned)


@pytest.mark.parametrize("name", ["rope", "mixed windows", "relative", "encoder_decoder", "learned"])
def test_decoding_with_a_cache_is_the_full_pass(name):
    model = model_of(name)
    batch = dict(batch_of(name, batch=2))
    only = tiny.rows(batch=2, lengths=(8,), padding=0)
    row = {key: only[key] for key in ("tokens", "positions", "segments")}
    whole = jax.jit(lambda model, batch: model(batch), compiler_options=tiny.QUICK)(model, batch | row)

    @functools.partial(jax.jit, compiler_options=tiny.QUICK)
    def step(model, cache, batch):
        x_BTD, cache, _ = model.hidden(batch, cache=cache)
        return model.logits(x_BTD), cache

    cache = jax.jit(lambda model, batch: model.cache(batch, 10), compiler_options=tiny.QUICK)(model, batch | row)
    steps = []
    for t in range(8):
        logits, cache = step(model, cache, {key: a[:, t:t + 1] for key, a in row.items()})
        steps.append(logits)
    np.testing.assert_allclose(jnp.concatenate(steps, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_computing_again_gives_the_same_gradients(remat):
    batch, score = tiny.rows(batch=2), jax.jit(tiny.score, compiler_options=tiny.QUICK)
    models = [tiny.model(remat=choice) for choice in ("none", remat)]
    (value, _, grads), (again, _, regrads) = (score(model, batch) for model in models)
    np.testing.assert_allclose(value, again, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, regrads)


def test_dropout_is_a_function_of_its_key_and_off_without_one():
    model = tiny.model(dropout=0.2)
    forward = jax.jit(lambda model, batch, key: model(batch, key=key), compiler_options=tiny.QUICK)
    batch = tiny.rows(batch=1)
    once, again, other = (forward(model, batch, jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(once, again)
    assert (once != other).any()
    never = tiny.model(attention="xla")  # the kernel that can drop
    np.testing.assert_array_equal(forward(model, batch, None), forward(never, batch, None))


def test_table_scales_and_soft_cap_are_their_formulas():
    batch = tiny.rows(batch=1)
    plain = model_of("none")
    table, hidden = plain.embed.table[...], np.sin(np.arange(16 * 32, dtype=np.float32)).reshape(1, 16, 32)
    with_ = lambda **changes: tiny.model(positions="none", **changes)  # the same draws
    np.testing.assert_allclose(with_(table_scale="in").embedded(batch), table[batch["tokens"]] * 32**0.5, rtol=1e-5)
    expected = hidden @ table.T
    np.testing.assert_allclose(plain.logits(hidden), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(with_(table_scale="out").logits(hidden), expected / 32**0.5, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(with_(logit_softcap=2.0).logits(hidden), 2 * np.tanh(expected / 2), rtol=1e-4, atol=1e-4)


def test_berts_heads_are_their_formulas():
    model, batch = tiny.model("encoder"), tiny.rows(batch=2)
    hidden, metrics = jax.jit(lambda model: (model.hidden(batch)[0], losses.next_token(model, batch)))(model)
    linear = lambda layer, x: np.asarray(x, np.float64) @ np.asarray(layer.w[...]) + np.asarray(layer.b[...])
    y = np.asarray(jax.nn.gelu(linear(model.transform.dense, hidden), approximate=False))
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + model.cfg.norm_eps)
    y = y * np.asarray(model.transform.norm.scale[...]) + np.asarray(model.transform.norm.bias[...])
    expected = y @ np.asarray(model.embed.table[...]).T + np.asarray(model.transform.bias[...])
    np.testing.assert_allclose(model.logits(hidden), expected, rtol=1e-3, atol=1e-3)
    pooled, next_ = model.pooler(hidden)
    expected = np.tanh(linear(model.pooler.dense, hidden[:, :1]))
    np.testing.assert_allclose(pooled, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(next_, linear(model.pooler.next, expected), rtol=1e-4, atol=1e-4)
    logp = np.log(np.exp(next_[:, 0]) / np.exp(next_[:, 0]).sum(-1, keepdims=True))
    weight, target = batch["weights"].sum(1), batch["pair_targets"][:, 0]
    np.testing.assert_allclose(metrics["pair_loss"].total, -(logp[np.arange(2), target] * weight).sum(), rtol=1e-4)
    total = metrics["loss"].total + metrics["pair_loss"].total
    np.testing.assert_allclose(metrics["objective"].total, total, rtol=1e-6)
