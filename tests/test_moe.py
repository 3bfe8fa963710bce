"""Experts against a dense loop over tokens and experts in float64; the router's losses against their formulas."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

import tiny
from lm_jax import parallel
from lm_jax.config import MeshConfig, MoEConfig, RopeConfig
from lm_jax.models.moe import MoE
from lm_jax.models.transformer import Transformer


def layer_of(rng, *, gated=True, skew=0.0, **moe):
    """A layer with drawn weights; `skew` sends ever more tokens to expert 0."""
    cfg = tiny.settings(width=8, hidden=16, gated=gated, activation="silu", moe=MoEConfig(**dict(experts=4) | moe))
    layer = jax.tree.map(lambda w: jnp.asarray(0.5 * rng.standard_normal(w.shape), jnp.float32),
                         jax.eval_shape(lambda: MoE(cfg, rngs=nnx.Rngs(0))))
    layer.router.w[...] = layer.router.w[...].at[:, 0].add(skew)
    return layer


def wide(param) -> np.ndarray:
    return np.asarray(param[...], np.float64)


def routed(layer, x_BTD) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Router logits, probabilities and the experts chosen, [B, T, ...], in float64."""
    logits = x_BTD @ wide(layer.router.w)
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return logits, probs, np.argsort(-probs, -1)[..., : layer.cfg.moe.top_k]


def reference(layer, x_BTD) -> np.ndarray:
    """Every token through each of its experts, one at a time, and through the shared ones."""
    silu = lambda x: x / (1 + np.exp(-x))

    def through(x, up, gate, down):
        return (silu(x @ up) if gate is None else silu(x @ gate) * (x @ up)) @ down

    _, probs, chosen = routed(layer, x_BTD)
    y_BTD = np.zeros(x_BTD.shape)
    for b, t in np.ndindex(x_BTD.shape[:2]):
        gates = probs[b, t, chosen[b, t]] / probs[b, t, chosen[b, t]].sum()
        for gate, e in zip(gates, chosen[b, t]):
            tables = (wide(layer.up)[e], None if layer.gate is None else wide(layer.gate)[e], wide(layer.down)[e])
            y_BTD[b, t] += gate * through(x_BTD[b, t], *tables)
        if layer.shared is not None:
            one = layer.shared
            y_BTD[b, t] += through(x_BTD[b, t], wide(one.up.w), one.gate and wide(one.gate.w), wide(one.down.w))
    return y_BTD


@pytest.mark.parametrize("moe", [
    dict(top_k=2), dict(top_k=1), dict(top_k=4), dict(top_k=2, shared=2), dict(top_k=2, gated=False)], ids=str)
def test_experts_are_a_loop_over_tokens(moe, rng):
    layer, x = layer_of(rng, **moe), rng.standard_normal((2, 6, 8))
    y, _ = layer(jnp.asarray(x, jnp.float32), jnp.ones((2, 6), bool))
    np.testing.assert_allclose(y, reference(layer, x), rtol=1e-4, atol=1e-5)


def test_no_token_is_dropped_when_all_want_one_expert(rng):
    layer, x = layer_of(rng, top_k=1, skew=50.0), np.abs(rng.standard_normal((2, 32, 8)))
    assert (routed(layer, x)[2] == 0).all()
    y, _ = layer(jnp.asarray(x, jnp.float32), jnp.ones((2, 32), bool))
    np.testing.assert_allclose(y, reference(layer, x), rtol=1e-4, atol=1e-5)
    assert (np.abs(y).max(-1) > 1e-3).all()


def test_gradients_are_those_of_a_dense_sum_over_experts(rng):
    layer, x = layer_of(rng, top_k=2), jnp.asarray(rng.standard_normal((2, 6, 8)), jnp.float32)

    def dense(layer, x):
        probs = jax.nn.softmax(x @ layer.router.w[...])
        kept = probs * (probs >= jnp.sort(probs, -1)[..., -2:-1])
        gates = kept / kept.sum(-1, keepdims=True)
        h = jax.nn.silu(jnp.einsum("BTD,EDF->BTEF", x, layer.gate[...])) * jnp.einsum("BTD,EDF->BTEF", x, layer.up[...])
        return jnp.einsum("BTEF,EFD,BTE->BTD", h, layer.down[...], gates)

    score = lambda f: lambda layer, x: jnp.sin(f(layer, x)).sum()
    experts = jax.jit(jax.grad(score(lambda layer, x: layer(x, jnp.ones((2, 6), bool))[0]), (0, 1)))(layer, x)
    expected = jax.jit(jax.grad(score(dense), (0, 1)))(layer, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), experts, expected)


def test_the_routers_losses_are_their_formulas_and_pass_over_padding(rng):
    layer, x = layer_of(rng, top_k=2, balance=0.3, router_z=0.2), rng.standard_normal((3, 6, 8))
    real = np.arange(6)[None] < np.array([6, 4, 0])[:, None]
    _, got = layer(jnp.asarray(x, jnp.float32), jnp.asarray(real))
    logits, probs, chosen = routed(layer, x)
    for b, tokens in enumerate((6, 4, 0)):
        visits = [(chosen[b, :tokens] == e).sum() for e in range(4)]
        share = [4 / (2 * max(tokens, 1)) * n for n in visits]  # DeepSeek-V3, eq. 18
        mean = probs[b, :tokens].sum(0) / max(tokens, 1)
        np.testing.assert_allclose(got["balance"][b], 0.3 * np.dot(share, mean), rtol=1e-4)
        z = np.log(np.exp(logits[b, :tokens]).sum(-1)) ** 2
        np.testing.assert_allclose(got["router_z"][b], 0.2 * z.sum() / max(tokens, 1), rtol=1e-4, atol=1e-9)


def test_balance_is_one_when_even_and_grows_with_the_skew(rng):
    x, real = jnp.asarray(np.abs(rng.standard_normal((2, 64, 8))), jnp.float32), jnp.ones((2, 64), bool)
    even = layer_of(rng, top_k=4, balance=1.0)(x, real)[1]["balance"]
    np.testing.assert_allclose(even, 1.0, rtol=1e-5)
    least, most = (layer_of(rng, top_k=1, balance=1.0, skew=skew)(x, real)[1]["balance"].mean() for skew in (0.0, 50.0))
    assert least < most and most == pytest.approx(4.0, rel=1e-3)


def test_router_losses_are_reported_and_add_up_over_microbatches():
    model, batch = tiny.model("experts"), tiny.rows(batch=4)
    score = jax.jit(lambda model, batch: tiny.score(model, batch)[1], compiler_options=tiny.QUICK)
    half = lambda i: jax.tree.map(lambda a: a[2 * i:2 * i + 2], batch)
    whole, parts = score(model, batch), [score(model, half(i)) for i in range(2)]
    for name in ("objective", "loss", "balance", "router_z"):
        summed = parts[0][name] + parts[1][name]
        np.testing.assert_allclose(dataclasses.astuple(whole[name]), dataclasses.astuple(summed), rtol=1e-5)
    total = sum(whole[name].total for name in ("loss", "balance", "router_z"))
    np.testing.assert_allclose(whole["objective"].total, total, rtol=1e-6)


def test_latents_and_grouped_experts_do_on_a_mesh_what_one_device_does():
    """DeepSeek's block: dense layers, then experts chosen within groups by swayed scores; losses and gradients."""
    moe = MoEConfig(experts=8, top_k=2, shared=1, hidden=16, pattern="DE", score="sigmoid", bias=True, groups=4,
                    top_groups=2, scale=2.5)
    deep = dict(moe=moe, latent=8, query_latent=12, head_size=12, value_size=8, rope=RopeConfig(fraction=1 / 3))
    model, batch = tiny.model(**deep), tiny.rows()
    score = jax.jit(tiny.score, compiler_options=tiny.QUICK)
    value, _, grads = score(model, batch)
    assert not np.any(grads["decoder"]["blocks"]["mlp"]["sway"]), "it sways a choice, and no gate"
    with jax.set_mesh(parallel.make_mesh(MeshConfig(fsdp=2, model=2, expert=2))):
        shapes = jax.eval_shape(lambda: Transformer(model.cfg, rngs=nnx.Rngs(0)))
        place = lambda x, like: jax.device_put(x, NamedSharding(jax.sharding.get_mesh(), like.sharding.spec))
        laid = jax.tree.map(place, model, shapes)
        rows = {key: jax.device_put(x, NamedSharding(jax.sharding.get_mesh(), parallel.activation("BT", x.shape)))
                for key, x in batch.items()}
        there, _, their_grads = score(laid, rows)
    np.testing.assert_allclose(there, value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), their_grads, grads)
