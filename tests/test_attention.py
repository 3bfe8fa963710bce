"""Attention with each of its switches against loops in float64, and the one mask against what it promises."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tiny
from lm_jax.models import attention, kernels, positions
from lm_jax.models.attention import Attention, RelativeBias
from lm_jax.models.layouts import Layout, visible

B, T, S, H = 2, 5, 7, 8
PLAIN = dict(heads=4, kv_heads=4, scale=0.35)
SWITCHES = {
    "plain": {},
    "grouped": dict(kv_heads=2),
    "one key head": dict(kv_heads=1),
    "soft cap": dict(softcap=0.5),
    "bias": dict(bias=True),
    "sinks": dict(sinks=True),
    "no scale": dict(scale=1.0),
    "all at once": dict(kv_heads=2, softcap=0.5, bias=True, sinks=True),
}


def reference(q, k, v, mask, *, scale, softcap=0.0, bias=None, sinks=None) -> np.ndarray:
    """Softmax attention, one query of one head at a time; head n reads key head n // (N / K)."""
    y = np.zeros(q.shape)
    group = q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(q.shape[:3]):
        logits = k[b, :, n // group] @ q[b, t, n] * scale
        logits = softcap * np.tanh(logits / softcap) if softcap else logits
        logits = logits if bias is None else logits + bias[b, n, t]
        weights = np.where(mask[b, t], np.exp(logits), 0)
        total = weights.sum() + (0 if sinks is None else math.exp(sinks[n]))
        y[b, t, n] = weights / total @ v[b, :, n // group]
    return y


@pytest.mark.parametrize("name", SWITCHES)
def test_attention_is_its_formula(name, rng):
    switch = PLAIN | SWITCHES[name]
    N, K = switch["heads"], switch["kv_heads"]
    draw = lambda *shape: rng.standard_normal(shape)
    q, k, v = draw(B, T, N, H), draw(B, S, K, H), draw(B, S, K, H)
    whole = lambda n: jnp.broadcast_to(jnp.arange(n), (B, n))
    query, key = (Layout(whole(n), jnp.asarray(rng.integers(1, 3, (B, n))).at[:, 0].set(1)) for n in (T, S))
    key = dataclasses.replace(key, segments_BT=key.segments_BT.at[:, 1].set(2))  # each query sees some key
    query = dataclasses.replace(query, positions_BT=whole(T) + 1)
    mask = np.asarray(visible(query, key, causal=True, window=6))
    assert mask.any(-1).all() and not mask.all()
    more = dict(bias=draw(B, N, T, S) if switch.get("bias") else None, sinks=draw(N) if switch.get("sinks") else None)
    knobs = dict(scale=switch["scale"], softcap=switch.get("softcap", 0.0))
    half = lambda a: None if a is None else jnp.asarray(a, jnp.float32)
    y = kernels.xla(half(q), half(k), half(v), query, key, causal=True, window=6, **knobs,
                    bias_BNTS=half(more["bias"]), sinks_N=half(more["sinks"]))
    np.testing.assert_allclose(y, reference(q, k, v, mask, **knobs, **more), rtol=1e-5, atol=1e-5)


def test_attention_survives_large_logits_and_rows_that_see_nothing(rng):
    q = jnp.asarray(rng.standard_normal((1, T, 2, H)) * 1e3, jnp.float32)
    row = Layout.of(tiny.rows(batch=1, lengths=(T,), padding=0))
    other = dataclasses.replace(row, segments_BT=row.segments_BT + 1)
    total = lambda q, key: kernels.xla(q, q, q, row, key, causal=True, scale=1.0).sum()
    for key in (row, other):
        assert np.isfinite(total(q, key)) and np.isfinite(jax.grad(total)(q, key)).all()


@pytest.mark.parametrize("changes", [
    dict(kv_heads=2, bias="all"), dict(qk_norm=True, head_size=16),
    dict(kv_heads=1, sinks=True, attention_softcap=2.0)], ids=str)
def test_the_layer_is_projections_norms_rotations_attention_and_output(changes, rng):
    cfg = tiny.settings(**changes)
    layer = Attention(cfg, rngs=nnx.Rngs(0))
    layer = jax.tree.map(lambda w: w + 0.3 * rng.standard_normal(w.shape).astype(np.float32), layer)  # no bias is 0
    x = rng.standard_normal((B, T, 32))
    layout = Layout.of(tiny.rows(batch=B, lengths=(T,), padding=0))
    mask = visible(layout, layout, causal=True)
    angles = positions.rotary(cfg, layout.positions_BT)
    y, _ = layer(jnp.asarray(x, jnp.float32), layout, layout, causal=True, angles=angles)
    wide = lambda a: None if a is None else np.asarray(a[...], np.float64)

    def project(einsum, norm, *, turn):
        heads = np.einsum("BTD,DNH->BTNH", x, wide(einsum.w)) + (0 if einsum.b is None else wide(einsum.b))
        if norm is not None:
            heads = heads / np.sqrt((heads**2).mean(-1, keepdims=True) + cfg.norm_eps) * wide(norm.scale)
        return rotated(heads) if turn else heads

    def rotated(heads):
        half = heads.shape[-1] // 2
        angle = np.arange(T)[:, None, None] * 10_000.0 ** -(np.arange(half) / half)
        turned = (heads[..., :half] + 1j * heads[..., half:]) * np.exp(1j * angle)
        return np.concatenate([turned.real, turned.imag], -1)

    q, k = project(layer.query, layer.query_norm, turn=True), project(layer.key, layer.key_norm, turn=True)
    v = project(layer.value, None, turn=False)
    heads = reference(q, k, v, np.asarray(mask), scale=cfg.sizes["H"] ** -0.5, softcap=cfg.attention_softcap,
                      sinks=wide(layer.sinks))
    expected = np.einsum("BTNH,NHD->BTD", heads, wide(layer.out.w)) + (0 if layer.out.b is None else wide(layer.out.b))
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_the_scale_is_the_roots_unless_set():
    assert attention.attention_scale(tiny.settings(head_size=16)) == 0.25
    assert attention.attention_scale(tiny.settings(attention_scale=1.0)) == 1.0
    wide = tiny.settings(width=128, base_width=32, heads=8, head_size=16)
    assert attention.attention_scale(wide) == 0.25, "in muP the number of heads grows"


def test_the_mask_is_segment_order_and_window():
    batch = tiny.rows(batch=1, lengths=(4, 5), padding=2)
    order = np.maximum(batch["positions"], 2)  # a prefix of three tokens in each document
    layout = Layout(batch["positions"], batch["segments"], order)
    for causal in (True, False):
        for window in (0, 2):
            got = visible(layout, layout, causal=causal, window=jnp.asarray(window))
            for t, s in np.ndindex(11, 11):
                together = batch["segments"][0, t] == batch["segments"][0, s]
                before = not causal or order[0, s] <= order[0, t]
                near = not window or abs(int(batch["positions"][0, t]) - int(batch["positions"][0, s])) < window
                assert got[0, t, s] == (together and before and near), (causal, window, t, s)


def test_a_relative_bias_reads_one_table_by_bucket_and_head():
    batch = tiny.rows(batch=1, lengths=(6,), padding=0)
    layout = Layout.of(batch)
    for causal in (True, False):
        bias = RelativeBias(tiny.settings("encoder_decoder"), causal=causal, rngs=nnx.Rngs(0))
        got, table = bias(layout, layout), np.asarray(bias.table[...])
        for t, s in np.ndindex(6, 6):
            bucket = max(t - s, 0) if causal else abs(t - s) + 16 * (s > t)  # these near ones are exact
            np.testing.assert_allclose(got[0, :, t, s], table[bucket], rtol=1e-6)
