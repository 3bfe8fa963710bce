"""muP by the coordinate check: in training, no activation grows or shrinks with the width, nor with the depth.

Yang et al. 2022, appendix D; depth as in CompleteP (Dey et al. 2025). Slopes are of log root-mean-square over log size.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import tiny
from lm_jax import losses, optim
from lm_jax.config import MoEConfig, OptimConfig
from lm_jax.models import positions
from lm_jax.models.layouts import Layout
from lm_jax.models.layers import kinds
from lm_jax.models.transformer import Transformer

WIDTHS, DEPTHS = (64, 256, 1024), (2, 4, 8)


def test_in_mup_no_activation_depends_on_the_width():
    for name, slope in slopes(WIDTHS, lambda width: trained(width, 2, base_width=64)).items():
        assert abs(slope) < 0.1, f"{name}: {slope:.3f}"


def test_in_the_standard_parametrisation_every_activation_grows_with_the_width():
    found = slopes((64, 1024), lambda width: trained(width, 2))
    for name in ("query 0", "attention 0", "mlp 0", "attention 1", "mlp 1", "stream", "logits"):
        assert found[name] > 0.3, f"{name}: {found[name]:.3f}"


def test_in_mup_tables_are_scaled_as_the_base_model_scales_them():
    x_BTD = jnp.ones((1, 2, 256))
    for width in (64, 256):
        plain, into, out = (tiny.model(width=width, heads=width // 8, head_size=8, base_width=64, table_scale=scale,
                                       init_std=0.1)
                            for scale in ("none", "in", "out"))
        ids = {"tokens": jnp.arange(4)[None], "positions": jnp.arange(4)[None]}
        np.testing.assert_allclose(into.embedded(ids), 8 * plain.embedded(ids), rtol=1e-5)
        np.testing.assert_allclose(8 * out.logits(x_BTD[..., :width]), plain.logits(x_BTD[..., :width]), rtol=1e-5)


def test_in_mup_the_stream_does_not_depend_on_the_depth_and_otherwise_it_does():
    brief = dict(lr=0.01, steps=5)  # what the layers start with adds up to 1/sqrt(L), what they learn to a constant
    found = slopes(DEPTHS, lambda depth: trained(64, depth, **brief, base_width=64, base_depth=2))
    assert abs(found["stream"]) < 0.15 and abs(found["logits"]) < 0.15, found
    assert slopes((2, 8), lambda depth: trained(64, depth, **brief))["stream"] > 0.5


def test_initial_scales_follow_the_width_as_the_table_says():
    """CompleteP, table 1: matrices fall with the root of the width, tables and the head stay; experts are matrices."""
    def stds(width):
        moe = MoEConfig(experts=2, top_k=1)
        cfg = tiny.settings(width=width, hidden=2 * width, base_width=64, init_std=0.1, tied=False, vocab=512, depth=1,
                            moe=moe)
        model = jax.jit(lambda: Transformer(cfg, rngs=nnx.Rngs(0)), compiler_options=tiny.QUICK)()
        block = model.decoder.blocks
        return {"table": model.embed.table[...].std(), "head": model.unembed.w[...].std(),
                "query": block.attention.query.w[...].std(), "expert up": block.mlp.up[...].std(),
                "expert down": block.mlp.down[...].std()}

    small, large = stds(64), stds(256)
    ratio = {name: float(large[name] / small[name]) for name in small}
    assert ratio == pytest.approx({"table": 1, "head": 1, "query": 0.5, "expert up": 0.5, "expert down": 0.5}, rel=0.05)


def slopes(sizes, record) -> dict[str, float]:
    """Of each recorded activation: the slope of log scale over log size, by least squares."""
    scales = [record(size) for size in sizes]
    fit = lambda values: float(np.polyfit(np.log(sizes), np.log(values), 1)[0])
    return {name: fit([scale[name] for scale in scales]) for name in scales[0]}


@functools.cache
def trained(width: int, depth: int, *, lr: float = 0.007, steps: int = 7, **parametrisation) -> dict[str, float]:
    """The scale of every activation after some steps of AdamW."""
    cfg = tiny.settings(width=width, depth=depth, heads=width // 16, head_size=16, hidden=2 * width, **parametrisation)
    model = jax.jit(lambda: Transformer(cfg, rngs=nnx.Rngs(0)), compiler_options=tiny.QUICK)()
    state, batch = nnx.state(model), tiny.rows(batch=2)
    params = nnx.to_pure_dict(state)
    tx = optim.make(OptimConfig(lr=lr, schedule="constant", warmup=0), 100, kinds(model))

    def built(params):
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(nnx.graphdef(model), state)

    @functools.partial(jax.jit, donate_argnums=(0, 1), compiler_options=tiny.QUICK)
    def step(params, opt):
        objective = lambda params: losses.next_token(built(params), batch)["objective"].value
        loss, grads = jax.value_and_grad(objective)(params)
        updates, opt = tx.update(grads, opt, params, loss=loss)
        return optax.apply_updates(params, updates), opt

    opt = jax.jit(tx.init, compiler_options=tiny.QUICK)(params)
    for _ in range(steps):
        params, opt = step(params, opt)
    scales, mine, own = jax.jit(lambda params: recorded(built(params), batch), compiler_options=tiny.QUICK)(params)
    np.testing.assert_allclose(mine, own, rtol=1e-3, atol=1e-4)
    return {name: float(scale) for name, scale in scales.items()}


def recorded(model, batch):
    """Scales of activations, layer by layer with the model's own parts; the outcome, and the model's own to compare."""
    rms = lambda x: jnp.sqrt(jnp.square(x).mean())
    layout = Layout.of(batch)
    angles = positions.rotary(model.cfg, layout.positions_BT)
    x = model.embedded(batch)
    scales = {"embedded": rms(x)}
    for i in range(model.cfg.depth):
        block = jax.tree.map(lambda a: a[i], model.decoder.blocks)
        normed = block.attention_residual.before(x)
        scales[f"query {i}"] = rms(block.attention.query(normed))
        y, _ = block.attention(normed, layout, layout, angles=angles, causal=True)
        x = x + y * block.attention_residual.scale
        z = block.mlp(block.mlp_residual.before(x))
        x = x + z * block.mlp_residual.scale
        scales |= {f"attention {i}": rms(y), f"mlp {i}": rms(z)}
    hidden = model.decoder.norm(x)
    scales |= {"stream": rms(x), "hidden": rms(hidden), "logits": rms(model.logits(hidden))}
    return scales, hidden, model.hidden(batch)[0]
