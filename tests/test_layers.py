"""The one matmul and its gradient, norms, activations, dropout, initial weights: against float64 written out."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tiny
from lm_jax.config import CHOICES
from lm_jax.models.layers import ACTIVATIONS, MLP, Einsum, Embed, Kind, Norm, activated, dropout, kinds, matmul
from lm_jax.models.transformer import Stack, Transformer

EQUATIONS = ["BTD,DF->BTF", "BTD,DNH->BTNH", "BTNH,NHD->BTD", "BTD,VD->BTV"]


def arrays(equation: str, rng) -> list:
    sizes = dict(B=2, T=3, D=4, F=5, N=2, H=3, V=7)
    shapes = [[sizes[a] for a in letters] for letters in re.split(",|->", equation)]
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("equation", EQUATIONS)
def test_the_matmuls_own_gradient_is_that_of_a_plain_einsum(equation, rng):
    x, w, dy = arrays(equation, rng)
    y, backward = jax.vjp(lambda x, w: matmul(equation, jnp.float32, x, w), x, w)
    plain, plain_backward = jax.vjp(lambda x, w: jnp.einsum(equation, x, w), x, w)
    np.testing.assert_allclose(y, plain, rtol=1e-5, atol=1e-6)
    for got, expected in zip(backward(dy), plain_backward(dy)):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_bfloat16_products_leave_float32_weight_gradients(rng):
    x, w, dy = arrays("BTD,DF->BTF", rng)
    half = jnp.asarray(x, jnp.bfloat16)
    y, backward = jax.vjp(lambda x, w: matmul("BTD,DF->BTF", jnp.bfloat16, x, w), half, w)
    dx, dw = backward(jnp.asarray(dy, jnp.bfloat16))
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    exact = np.einsum("BTD,BTF->DF", *(np.asarray(a, np.float64) for a in (half, jnp.asarray(dy, jnp.bfloat16))))
    np.testing.assert_allclose(dw, exact, rtol=1e-5, atol=1e-6)  # no bfloat16 rounding on the way
    np.testing.assert_allclose(y.astype(np.float32), np.einsum("BTD,DF->BTF", x, w), rtol=0.05, atol=0.05)


def test_an_einsum_starts_at_one_over_the_root_of_its_fan_in_and_adds_its_bias():
    cfg = tiny.settings(width=128, heads=8)
    for equation, letters, fan_in, bias in (("BTD,DNH->BTNH", "DNH", "D", "NH"), ("BTNH,NHD->BTD", "NHD", "NH", "D")):
        layer = Einsum(equation, cfg, rngs=nnx.Rngs(0), bias=True, gain=0.5)
        assert layer.w.kind == Kind(letters, fan_in, "matrix")
        assert float(layer.w[...].std()) == pytest.approx(0.5 * 128**-0.5, rel=0.03)
        assert layer.b.kind == Kind(bias, "", "vector")
        layer.b[...] += 3.0
        assert float(layer(jnp.zeros((1, 1, *(cfg.sizes[a] for a in equation.split(",")[0][2:])))).mean()) == 3.0


@pytest.mark.parametrize("family", ["decoder", "encoder"])
def test_one_number_sets_every_tables_and_matrixs_initial_std(family):
    cfg = tiny.settings(family, init_std=0.3, width=64, vocab=512)
    params = nnx.to_pure_dict(nnx.state(Transformer(cfg, rngs=nnx.Rngs(0)), nnx.Param))
    block = params["decoder"]["blocks"]
    for w in (params["embed"]["table"], block["attention"]["query"]["w"], block["mlp"]["up"]["w"]):
        assert float(w.std()) == pytest.approx(0.3, rel=0.05)
    added = 0.3 if cfg.norm_place == "post" else 0.3 / math.sqrt(2 * cfg.depth)  # as in BERT; as in GPT-2
    for w in (block["attention"]["out"]["w"], block["mlp"]["down"]["w"]):
        assert float(w.std()) == pytest.approx(added, rel=0.05)


def test_layers_start_different_from_each_other():
    w_LDF = Stack(tiny.settings(), depth=2, causal=True, cross=False, rngs=nnx.Rngs(0)).blocks.mlp.up.w[...]
    assert float(jnp.abs(w_LDF[0] - w_LDF[1]).min()) > 0


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_parameter_says_what_it_is(family):
    cfg = tiny.settings(family)
    model = tiny.model(family)
    params, described = nnx.to_pure_dict(nnx.state(model, nnx.Param)), kinds(model)
    assert jax.tree.structure(params) == jax.tree.structure(described)
    sizes = cfg.sizes | dict(L=cfg.depth)

    def check(kind, w):
        assert w.dtype == jnp.float32
        if "F" not in kind.letters:  # shared experts are one wide MLP
            assert w.shape == tuple(sizes[a] for a in kind.letters)
        assert set(kind.fan_in) <= set(kind.letters) and (kind.role in ("matrix", "head")) == bool(kind.fan_in)

    jax.tree.map(check, described, params)


@pytest.mark.parametrize("bias", ["none", "norm"])
@pytest.mark.parametrize("norm", CHOICES["model.norm"])
def test_a_norm_is_its_formula(norm, bias, rng):
    layer = Norm("D", tiny.settings(norm=norm, bias=bias, norm_eps=1e-3))
    x = rng.standard_normal((2, 3, 32)) * 3 + 1
    scale, shift = 1.0, 0.0
    if norm == "none":
        assert not jax.tree.leaves(nnx.state(layer, nnx.Param)), "parameter-free"
    else:
        scale, shift = rng.standard_normal((2, 32))
        layer.scale[...] = jnp.asarray(scale, jnp.float32)
        assert (layer.bias is None) == (bias == "none")
        shift = 0.0 if layer.bias is None else shift
        if layer.bias is not None:
            layer.bias[...] = jnp.asarray(shift, jnp.float32)
    centred = x - x.mean(-1, keepdims=True) if norm == "layer" else x
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-3) * scale + shift
    np.testing.assert_allclose(layer(jnp.asarray(x, jnp.float32)), expected, rtol=1e-5, atol=1e-5)
    assert layer(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


FORMULAS = {
    "gelu": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: x * 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: max(x, 0.0),
    "relu2": lambda x: max(x, 0.0) ** 2,
    "silu": lambda x: x / (1 + math.exp(-x)),
}


@pytest.mark.parametrize("name", CHOICES["model.activation"])
def test_an_activation_is_its_formula(name):
    x = np.linspace(-4, 4, 33)
    got = ACTIVATIONS[name](jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got, [FORMULAS[name](a) for a in x], atol=2e-6)


@pytest.mark.parametrize("gated", [True, False])
def test_an_mlp_is_its_formula(gated, rng):
    mlp = MLP(tiny.settings(activation="gelu", gated=gated, bias="all"), rngs=nnx.Rngs(0))
    x = rng.standard_normal((2, 3, 32))
    through = lambda layer, x: x @ np.asarray(layer.w[...], np.float64) + np.asarray(layer.b[...], np.float64)
    act = np.vectorize(FORMULAS["gelu"])
    hidden = act(through(mlp.gate, x)) * through(mlp.up, x) if gated else act(through(mlp.up, x))
    np.testing.assert_allclose(mlp(jnp.asarray(x, jnp.float32)), through(mlp.down, hidden), rtol=1e-4, atol=1e-5)


def test_a_table_is_read_by_row(rng):
    table = Embed("VD", tiny.settings(), rngs=nnx.Rngs(0))
    ids = rng.integers(0, 64, (2, 5))
    np.testing.assert_array_equal(table(ids, jnp.float32), np.asarray(table.table[...])[ids])


def test_dropout_is_a_function_of_its_key_and_keeps_the_mean():
    x = jnp.ones((200, 500))
    once, again, other = (dropout(x, 0.3, jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(once, again)
    assert (once != other).any()
    assert float(once.mean()) == pytest.approx(1.0, abs=0.01)  # 5 standard errors of 0.002
    assert float((once == 0).mean()) == pytest.approx(0.3, abs=0.01)
    assert set(np.unique(once)) == {np.float32(0), np.float32(1) / np.float32(0.7)}
    assert dropout(x, 0.3, None) is x and dropout(x, 0.0, jax.random.key(0)) is x


def test_the_gradient_of_a_bias_adds_up_in_float32():
    """4,096 ones are 4,096; in bfloat16 a sum of ones ends at 256."""
    layer = Einsum("BTD,DF->BTF", tiny.model(dtype="bfloat16").cfg, rngs=nnx.Rngs(0), bias=True)
    x = jnp.zeros((16, 257, layer.w.shape[0]), jnp.bfloat16)
    graph, state = nnx.split(layer)
    grads = jax.grad(lambda state: nnx.merge(graph, state)(x).astype(jnp.float32).sum())(state)
    np.testing.assert_array_equal(grads["b"][...], 16 * 257)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
@pytest.mark.parametrize("inputs", (1, 2))
def test_an_activation_keeps_what_went_in_and_nothing_else_for_its_gradient(name, inputs, rng):
    act, xs = ACTIVATIONS[name], [jnp.asarray(rng.standard_normal(64), jnp.float32) for _ in range(inputs)]
    plain = lambda *xs: act(xs[0]) * (xs[1] if inputs == 2 else 1)
    (y, backward), (expected, plainly) = jax.vjp(partial(activated, act), *xs), jax.vjp(plain, *xs)
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, (y, backward(y)), (expected, plainly(y)))
    assert sum(a.size for a in jax.tree.leaves(backward) if a.size > 1) == 64 * inputs
