"""FLOPs from the equations are those of the model's jaxpr, product by product; counts follow their conventions."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from lm_jax import config, losses, parallel
from lm_jax.models import flops, zoo
from lm_jax.models.layouts import Layout, visible
from lm_jax.models.transformer import Transformer

T, S = 12, 20
TINY = config.TransformerConfig(vocab=48, width=16, depth=2, heads=4, hidden=40, max_length=32, attention="xla")
VARIANTS = {
    "llama": dict(kv_heads=2, head_size=6, tied=False),
    "gpt2": dict(norm="layer", bias="all", gated=False, positions="learned"),
    "bert": dict(causal=False, norm="layer", bias="all", gated=False, positions="learned", types=2, head="mlm_pairs"),
    "t5": dict(encoder_depth=3, gated=False, head_size=8, positions="relative"),
    "moe": dict(moe=config.MoEConfig(experts=4, top_k=2, shared=1), kv_heads=1),
    "deepseek": dict(moe=config.MoEConfig(experts=8, top_k=2, shared=1, hidden=24, pattern="DE", score="sigmoid",
                                          bias=True, groups=4, top_groups=2, scale=2.5),
                     latent=12, query_latent=20, head_size=12, value_size=10, rope=config.RopeConfig(fraction=1 / 3)),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_equations_say_what_the_jaxpr_does(name):
    cfg = dataclasses.replace(TINY, **VARIANTS[name])
    row = flops.forward(cfg, T, source_of(cfg), causal=False)
    assert flops.count(objective, *abstract(cfg, rows=3)) == 3 * row
    assert flops.count(jax.grad(objective), *abstract(cfg, rows=3)) == 3 * flops.train(
        cfg, T, source_of(cfg), causal=False) == 9 * row


def test_attention_in_blocks_makes_its_logits_once_more_and_later_keys_not_at_all():
    cfg, tokens = dataclasses.replace(TINY, attention="blocked", max_length=256), 256
    pairs = tokens * tokens * 3 // 4  # of two blocks, the first one's queries meet half of the keys
    one = 2 * cfg.heads * cfg.sizes["H"] * pairs * cfg.depth
    model, batch = abstract(cfg)
    batch = {name: jax.ShapeDtypeStruct((1, tokens), batch[name].dtype)
             for name in ("tokens", "targets", "weights", "positions", "segments")}
    dense = flops.forward(cfg, tokens) - flops.scores(cfg, tokens)
    assert flops.count(objective, model, batch) == dense + 2 * one
    assert flops.count(jax.grad(objective), model, batch) == 3 * dense + 7 * one


def test_depth_multiplies_and_is_not_counted_once():
    counted = {depth: flops.count(objective, *abstract(dataclasses.replace(TINY, depth=depth))) for depth in (2, 4)}
    head = 2 * T * TINY.width * TINY.vocab
    assert counted[4] - head == 2 * (counted[2] - head)


def test_what_remat_computes_again_is_counted_in_the_jaxpr_and_not_in_the_model():
    cfg = dataclasses.replace(TINY, remat="full")
    again = flops.count(jax.grad(objective), *abstract(cfg)) - flops.train(cfg, T, causal=False)
    blocks = flops.forward(cfg, T, causal=False) - 2 * T * TINY.width * TINY.vocab
    assert 0.5 * blocks < again <= blocks  # the last product of a block is needed by nobody


@pytest.mark.parametrize("change", [{}, dict(window=5), dict(window=5, window_pattern="SF"), dict(window=99),
                                    dict(causal=False, window=3)], ids=str)
def test_attention_counts_the_pairs_that_the_mask_shows(change):
    cfg = dataclasses.replace(TINY, **change)
    row = Layout(jnp.arange(T)[None], jnp.ones((1, T), int), jnp.arange(T)[None])
    windows = [cfg.window * sliding for sliding in abstract(cfg)[0].decoder.sliding()]
    shown = sum(int(visible(row, row, causal=cfg.causal, window=window).sum()) for window in windows)
    left_out = cfg.depth * T * T - shown
    assert flops.forward(cfg, T, causal=False) - flops.forward(cfg, T) == 4 * cfg.width * left_out


def test_scans_branches_loops_and_devices_multiply():
    x = jnp.ones((4, 4))
    product = 2 * 4**3
    assert flops.count(lambda x: jax.lax.scan(lambda y, _: (y @ x, None), x, length=7)[0], x) == 7 * product
    assert flops.count(lambda x: jax.lax.cond(x[0, 0] > 0, lambda y: y @ y @ y, lambda y: y @ y, x), x) == 2 * product
    assert flops.count(jax.jit(jax.checkpoint(lambda x: jax.nn.relu(x @ x))), x) == product
    loop = lambda x: jax.lax.while_loop(lambda y: y[0, 0] < 9, lambda y: y @ x, x)
    assert flops.count(loop, x, trips=5) == 5 * product
    with pytest.raises(ValueError, match="trips="):
        flops.count(loop, x)
    image, kernel = jnp.ones((2, 3, 8, 8)), jnp.ones((5, 3, 3, 3))
    assert flops.count(lambda a, b: jax.lax.conv(a, b, (1, 1), "VALID"), image, kernel) == 2 * (2 * 5 * 6 * 6) * 3 * 9


def test_a_mesh_changes_no_count():
    cfg = dataclasses.replace(TINY, **VARIANTS["moe"])
    expected = flops.count(objective, *abstract(cfg, rows=8))
    with jax.set_mesh(parallel.make_mesh(config.MeshConfig(fsdp=4, model=2))):
        model = jax.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0)))
        batch = jax.eval_shape(lambda: jax.tree.map(lambda x: parallel.constrain(jnp.ones(x.shape, x.dtype), "BT"),
                                                    abstract(cfg, rows=8)[1]))
        assert flops.count(objective, model, batch) == expected


def test_parameters_follow_their_conventions():
    cfg = dataclasses.replace(TINY, **VARIANTS["llama"])
    n = flops.parameters(cfg)
    assert n["embedding"] == n["head"] == 48 * 16
    assert n["non_embedding"] == n["total"] - 2 * 48 * 16 and n["active"] == n["total"]
    rung = zoo.ladder(params=1e6)
    assert flops.parameters(settings(rung | {"vocab": 512}))["non_embedding"] == zoo.non_embedding(rung)
    bert = flops.parameters(settings(zoo.get("bert-base")))
    assert bert["embedding"] == (30522 + 512 + 2) * 768 and bert["head"] == 30522


def test_only_visited_experts_are_active():
    n = flops.parameters(settings(zoo.get("mixtral-8x7b")))
    assert n["total"] == 46_702_792_704
    assert n["active"] == 12_879_925_248  # "13B active" (Jiang et al. 2024)


def test_a_large_model_costs_about_six_flops_a_weight_and_token():
    cfg = settings(zoo.get("llama-8b"))
    n = flops.parameters(cfg)
    dense = 6 * (n["total"] - n["embedding"]) * 2048
    assert dense < flops.train(cfg, 2048) < 1.05 * dense  # the rest is attention


def test_source_tokens_are_wanted_by_an_encoder_and_by_nobody_else():
    with pytest.raises(ValueError, match="source=0 tokens for encoder_depth=3"):
        flops.forward(dataclasses.replace(TINY, encoder_depth=3), T)
    with pytest.raises(ValueError, match="source=4 tokens for encoder_depth=0"):
        flops.forward(TINY, T, 4)


def objective(model, batch):
    return losses.next_token(model, batch)["objective"].total


def abstract(cfg, *, rows=1):
    """Shapes of a model and a batch: enough for a jaxpr."""
    ints, floats = (jax.ShapeDtypeStruct((rows, T), dtype) for dtype in (jnp.int32, jnp.float32))
    batch = dict.fromkeys(("tokens", "targets", "positions", "segments", "types", "pair_targets"), ints)
    batch |= {"weights": floats, "pair_weights": floats}
    batch["source"] = dict.fromkeys(("tokens", "positions", "segments"), jax.ShapeDtypeStruct((rows, S), jnp.int32))
    return jax.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0))), batch


def source_of(cfg) -> int:
    return S if cfg.encoder_depth else 0


def settings(values: dict) -> config.TransformerConfig:
    rope, moe = config.RopeConfig(**values.get("rope", {})), config.MoEConfig(**values.get("moe", {}))
    return config.TransformerConfig(**values | dict(rope=rope, moe=moe))
