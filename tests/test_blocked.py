"""Blocked attention is softmax attention, reckoned in float64, and its gradients run along what a query sees alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from lm_jax.models import blocked
from lm_jax.models.layouts import Layout

T, N, K, H, SCALE = 14, 4, 2, 4, 0.4
SEGMENTS = np.array([[1] * 9 + [2] * 4 + [0], [1] * 3 + [2] * 11])
POSITIONS = np.array([[*range(9), *range(4), 0], [*range(3), *range(11)]])
RULES = {
    "causal": dict(causal=True),
    "both ways": dict(causal=False),
    "window": dict(causal=True, window=4),
    "softcap and sinks": dict(causal=True, softcap=1.5, sinks=True),
    "all at once": dict(causal=True, window=4, softcap=1.5, sinks=True),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that these rows have four, the last of them shorter."""
    monkeypatch.setattr(blocked, "LEAST", 3)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("rows", [1, 2])
def test_values_and_gradients_are_those_of_float64(rule, rows):
    """A gradient along a direction is a difference of the reference's values."""
    rng = np.random.default_rng(rows)
    arrays, direction = draw(rng, rows), draw(rng, rows)
    weights = rng.standard_normal((rows, T, N, H)) * (SEGMENTS[:rows, :, None, None] > 0)
    graded = jax.value_and_grad(lambda arrays: total(arrays, weights, **RULES[rule]), has_aux=True)
    (_, y), grads = jax.jit(graded, compiler_options=tiny.QUICK)(narrow(arrays))
    np.testing.assert_allclose(y * (weights != 0), reference(*arrays, **RULES[rule]) * (weights != 0), atol=3e-6)
    ahead, behind = ((reference(*(x + step * dx for x, dx in zip(arrays, direction)), **RULES[rule]) * weights).sum()
                     for step in (1e-5, -1e-5))
    np.testing.assert_allclose(sum((g * dx).sum() for g, dx in zip(grads, direction)), (ahead - behind) / 2e-5,
                               rtol=1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_gradients_reach_what_a_query_sees_and_nothing_else(rule):
    arrays = narrow(np.random.default_rng(0).standard_normal((2, T, n, H)) for n in (N, K, K))
    sinks = jnp.zeros(N, jnp.float32)
    slopes = jax.jacrev(lambda q, k, v: total((q, k, v, sinks), 1.0, **RULES[rule])[1].sum((0, 2, 3)), (0, 1, 2))
    found = jax.jit(slopes, compiler_options=tiny.QUICK)(*arrays)
    of_q, of_k, of_v = (np.abs(slope).sum((3, 4)).swapaxes(0, 1) for slope in found)  # [rows, T, S]
    seen, real = mask(2, **RULES[rule]), SEGMENTS[:, :, None] > 0
    np.testing.assert_array_equal(of_v * real > 0, seen & real)
    assert not (of_q * real)[:, ~np.eye(T, dtype=bool)].any() and not (of_k * real)[~seen].any()
    several = seen.sum(2) > 1  # of a single key, the weight is 1 whatever it says
    assert ((of_k * real > 0).any(2) >= several & real[..., 0]).all()


def test_gradients_in_bfloat16_are_those_of_float32_rounded():
    """Their products are others."""
    given = jax.tree.map(lambda x: x.astype(jnp.bfloat16), narrow(draw(np.random.default_rng(0), 2)))
    value = lambda arrays: total(arrays, 1.0, **RULES["all at once"])[0]
    graded = jax.jit(jax.grad(value), compiler_options=tiny.QUICK)
    for got, exact in zip(graded(given), graded(jax.tree.map(lambda x: x.astype(jnp.float32), given))):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(got.astype(jnp.float32), exact, atol=0.02 * np.abs(exact).max())


def draw(rng, rows: int):
    return [rng.standard_normal(shape) for shape in ((rows, T, N, H), (rows, T, K, H), (rows, T, K, H), (N,))]


def total(arrays, weights, *, sinks=False, **rule):
    """A weighed sum of the kernel's output, and the output."""
    q, k, v, sinks_N = arrays
    layout = Layout(*(jnp.asarray(x[:len(q)], jnp.int32) for x in (POSITIONS, SEGMENTS)))
    y = blocked.blocked(q, k, v, layout, layout, scale=SCALE, sinks_N=sinks_N if sinks else None, **rule)
    return (y * weights).sum(), y


def reference(q_BTNH, k_BSKH, v_BSKH, sinks_N, *, softcap=0.0, sinks=False, **rule):
    """The definition, a head's whole rows at once."""
    k_BSNH, v_BSNH = (np.repeat(x, N // K, axis=2) for x in (k_BSKH, v_BSKH))
    logits = np.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH) * SCALE
    logits = softcap * np.tanh(logits / softcap) if softcap else logits
    weights = np.exp(logits) * mask(len(q_BTNH), **rule)[:, None]
    total = weights.sum(-1) + (np.exp(sinks_N)[:, None] if sinks else 0)
    return np.einsum("BNTS,BSNH->BTNH", weights / total[..., None], v_BSNH)


def mask(rows: int, *, causal, window=0, **rest):
    """Which keys each query sees: of its segment, not later, nearer than the window."""
    steps = np.arange(T)[:, None] - np.arange(T)
    seen = (SEGMENTS[:, :, None] == SEGMENTS[:, None, :])[:rows]
    return seen & (steps >= 0 if causal else True) & (np.abs(steps) < window if window else True)


def narrow(arrays):
    return tuple(jnp.asarray(x, jnp.float32) for x in arrays)
