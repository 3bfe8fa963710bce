"""The one cross-entropy: values and gradients against float64, chunks that never hold all logits, sums that add."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tiny
from lm_jax import losses

V = 64


class Head:
    """As much of a model as the loss needs: hidden states given, a table for the logits."""

    pooler = None

    def __init__(self, x_BTD, w_DV, *, dtype=jnp.float32, router=None):
        self.cfg = dataclasses.replace(tiny.settings(), vocab=w_DV.shape[1])
        self.x_BTD, self.w_DV, self.dtype, self.router = x_BTD, w_DV, dtype, router or {}

    def hidden(self, batch, *, key=None):
        return self.x_BTD.astype(self.dtype), None, self.router

    output_letters = "DV"

    def outward(self, x_BTD):
        return x_BTD

    def output(self):
        return self.w_DV, None


def draw(rng, T=13):
    x, w = rng.standard_normal((3, T, 8)), rng.standard_normal((8, V))
    batch = dict(targets=rng.integers(0, V, (3, T)), weights=(rng.random((3, T)) < 0.7) * rng.uniform(0.5, 2, (3, T)))
    return x, w, batch | dict(weights=batch["weights"].astype(np.float32))


def reference(x, w, batch, *, smoothing=0.0, z_loss=0.0):
    """Sums and gradients of the weighted objective in float64."""
    targets, weights = batch["targets"], batch["weights"].astype(np.float64)
    logits = x @ w
    z = np.log(np.exp(logits).sum(-1))
    hit = np.eye(V)[targets]
    aim = (1 - smoothing) * hit + smoothing / V
    nll, smooth = z - (logits * hit).sum(-1), z - (logits * aim).sum(-1)
    dlogits = np.exp(logits - z[..., None]) * (1 + 2 * z_loss * z)[..., None] - aim
    dlogits *= weights[..., None] / weights.sum()
    right = logits.argmax(-1) == targets
    return dict(loss=(nll * weights).sum(), z_loss=(z_loss * z**2 * weights).sum(), weight=weights.sum(),
                objective=((smooth + z_loss * z**2) * weights).sum(), accuracy=(right * weights).sum(),
                gradients=(dlogits @ w.T, np.einsum("BTD,BTV->DV", x, dlogits)))


@functools.partial(jax.jit, static_argnames=("dtype", "smoothing", "z_loss", "chunk"))
def scored(x, w, batch, *, dtype=jnp.float32, chunk=0, **knobs):
    """The metrics and gradients of the real loss; `chunk` only keeps compiled programs apart."""
    def objective(x, w):
        metrics = losses.next_token(Head(x, w, dtype=dtype), batch, **knobs)
        return metrics["objective"].value, metrics
    return jax.grad(objective, (0, 1), has_aux=True)(x, w)


@pytest.mark.parametrize("chunk", [2**26, 3 * 4 * V, 3 * 7 * V, 1],
                         ids=["whole", "parts of four tokens", "parts of seven", "a token at a time"])
@pytest.mark.parametrize("knobs", [
    {}, dict(smoothing=0.1), dict(z_loss=0.05), dict(smoothing=0.1, z_loss=0.05)], ids=str)
def test_the_loss_is_its_formula_however_it_is_cut(knobs, chunk, rng, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", chunk)
    x, w, batch = draw(rng)
    gradients, metrics = scored(jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32), batch, chunk=chunk, **knobs)
    expected = reference(x, w, batch, **knobs)
    for name in ("loss", "objective", "accuracy") + (("z_loss",) if "z_loss" in knobs else ()):
        np.testing.assert_allclose(metrics[name].total, expected[name], rtol=1e-5)
        np.testing.assert_allclose(metrics[name].weight, expected["weight"], rtol=1e-5)
    assert ("z_loss" in metrics) == ("z_loss" in knobs)
    for got, want in zip(gradients, expected["gradients"]):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family, changes", [
    ("decoder", dict(logit_softcap=2.0)), ("decoder", dict(tied=False)), ("encoder", {})], ids=str)
def test_a_models_gradients_are_those_of_its_logits(family, changes, monkeypatch):
    """With a soft-cap, either table and a masked head's bias: JAX's own gradient of all logits at once."""
    monkeypatch.setattr(losses, "CHUNK", 2 * 5 * V)
    model, batch = tiny.model(family, **changes), tiny.rows(batch=2)
    graph, params = nnx.split(model)

    def plain(model, x_BTD):
        logits_BTV = model.logits(x_BTD)
        z_BT = jax.nn.logsumexp(logits_BTV, -1)
        target_BT = jnp.take_along_axis(logits_BTV, batch["targets"][..., None], -1)[..., 0]
        aim_BT = 0.9 * target_BT + 0.1 * logits_BTV.mean(-1)
        return ((z_BT - aim_BT + 0.05 * z_BT**2) * batch["weights"]).sum()

    made = lambda model, x_BTD: losses.token_scores(model, x_BTD, batch, z_loss=0.05, smoothing=0.1)[0]
    graded = lambda objective: jax.jit(jax.value_and_grad(
        lambda params: objective(model := nnx.merge(graph, params), model.hidden(batch)[0])))(params)
    got, expected = (jax.tree.leaves(graded(objective)) for objective in (made, plain))
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 + 1e-4 * np.abs(b).max())


def test_the_z_loss_stays_apart_from_the_loss(rng):
    x, w, batch = draw(rng)
    _, plain = scored(x, w, batch)
    _, both = scored(x, w, batch, z_loss=0.05)
    assert plain["loss"].total == both["loss"].total
    np.testing.assert_allclose(both["objective"].total, both["loss"].total + both["z_loss"].total, rtol=1e-6)


def test_tokens_of_no_weight_neither_count_nor_teach(rng):
    x, w, batch = draw(rng)
    off = batch["weights"] == 0
    (dx, _), metrics = scored(x, w, batch)
    other = dict(batch, targets=np.where(off, (batch["targets"] + 1) % V, batch["targets"]))
    (other_dx, _), other_metrics = scored(np.where(off[..., None], -x, x), w, other)
    assert off.any() and (np.asarray(dx)[off] == 0).all() and (np.asarray(other_dx)[off] == 0).all()
    assert metrics["loss"].total == other_metrics["loss"].total


def test_a_batch_of_no_weight_is_a_zero_and_not_a_nan(rng):
    x, w, batch = draw(rng)
    gradients, metrics = scored(x, w, dict(batch, weights=0 * batch["weights"]))
    assert metrics["objective"].value == 0 and all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("chunk", [2**26, 3 * 4 * V], ids=["whole", "parts"])
def test_bfloat16_is_close(chunk, rng, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", chunk)
    x, w, batch = draw(rng)
    (dx, dw), metrics = scored(jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32), batch, dtype=jnp.bfloat16,
                               chunk=chunk)
    expected = reference(x, w, batch)
    np.testing.assert_allclose(metrics["loss"].total, expected["loss"], rtol=1e-2)
    for got, want in zip((dx, dw), expected["gradients"]):
        assert np.abs(got - want).max() < 0.02 * np.abs(want).max() and got.dtype == jnp.float32


def test_extreme_logits_stay_finite(rng):
    x, w, batch = draw(rng)
    gradients, metrics = scored(x * 1e4, w, batch, z_loss=1e-4)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves((gradients, metrics)))


def test_a_large_vocabulary_never_has_all_its_logits_at_once(monkeypatch):
    """The largest array in the whole program, forward and backward, against the budget for logits."""
    B, T, D, wide = 2, 32, 8, 4096
    shapes = (jax.ShapeDtypeStruct(s, d) for s, d in (((B, T, D), jnp.float32), ((D, wide), jnp.float32)))
    batch = dict(targets=jnp.zeros((B, T), int), weights=jnp.ones((B, T)))

    def largest(chunk):
        monkeypatch.setattr(losses, "CHUNK", chunk)
        objective = lambda x, w: losses.next_token(Head(x, w), batch, z_loss=1e-4, smoothing=0.1)["objective"].value
        return max(sizes(jax.make_jaxpr(jax.grad(objective, (0, 1)))(*shapes_)))

    shapes_ = tuple(shapes)
    assert largest(2**26) == B * T * wide  # the counter sees them where they are
    assert largest(B * T * wide // 8) <= B * T * wide // 8


def sizes(jaxpr):
    """Elements of every value in a jaxpr and those inside it."""
    for equation in jaxpr.eqns:
        yield from (v.aval.size for v in equation.outvars)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            if hasattr(inner, "eqns"):
                yield from sizes(inner)


def test_router_losses_weigh_a_row_by_its_loss_weights(rng):
    x, w, batch = draw(rng)
    balance_B = np.array([0.3, 0.1, 0.7], np.float32)
    metrics = losses.next_token(Head(jnp.asarray(x), jnp.asarray(w), router={"balance": jnp.asarray(balance_B)}), batch)
    np.testing.assert_allclose(metrics["balance"].total, (balance_B * batch["weights"].sum(1)).sum(), rtol=1e-5)
    total = metrics["loss"].total + metrics["balance"].total
    np.testing.assert_allclose(metrics["objective"].total, total, rtol=1e-6)
    assert metrics["objective"].weight == metrics["loss"].weight


@pytest.mark.parametrize("family", ["decoder", "encoder", "experts"])
def test_parts_of_a_batch_add_up_to_it(family):
    """Every metric and the gradients: what gradient accumulation, evaluation and hosts rely on."""
    model, batch = tiny.model(family), tiny.rows(batch=4)
    knobs = dict(z_loss=0.01, smoothing=0.1)
    total = jax.jit(functools.partial(losses.next_token, **knobs), compiler_options=tiny.QUICK)
    halves = [total(model, jax.tree.map(lambda a: a[i:i + 2], batch)) for i in (0, 2)]
    whole = total(model, batch)
    summed = {name: halves[0][name] + halves[1][name] for name in whole}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), whole, summed)


def test_row_sums_give_the_mean_and_its_standard_error():
    model, batch = tiny.model(), tiny.rows(batch=6)
    batch["weights"][-1] = 0  # a row that only pads the last batch
    batch["bytes"] = np.full_like(batch["weights"], 3)
    sums = jax.jit(losses.row_sums, compiler_options=tiny.QUICK)(model, batch)
    logits = np.asarray(model(batch), np.float64)
    nll_BT = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
    nll_B, weight_B = (nll_BT * batch["weights"]).sum(1), batch["weights"].sum(1).astype(np.float64)
    right = ((logits.argmax(-1) == batch["targets"]) * batch["weights"]).sum()
    expected = dict(nll=nll_B.sum(), weight=weight_B.sum(), right=right, nll2=(nll_B**2).sum(), rows=5,
                    bytes=3 * weight_B.sum(), nll_weight=(nll_B * weight_B).sum(), weight2=(weight_B**2).sum())
    assert sums.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-5)
    np.testing.assert_allclose(sums["nll"], losses.next_token(model, batch)["loss"].total, rtol=1e-5)
