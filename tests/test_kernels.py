"""Every kernel of attention shows what the one mask shows, on every mesh; the table says who can do what."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo as fused

import tiny
from lm_jax import hosts, losses, optim, parallel, update
from lm_jax.config import ConfigError, MeshConfig, OptimConfig
from lm_jax.devices import TABLE
from lm_jax.models import blocked, cudnn, kernels, ring, splash
from lm_jax.models.layers import kinds
from lm_jax.models.layouts import Layout
from lm_jax.models.transformer import Transformer, make

RULES = {
    "causal": dict(causal=True),
    "both ways": dict(causal=False),
    "window": dict(causal=True, window=5),
    "all at once": dict(causal=True, window=7, sliding=True, softcap=2.0, sinks=True),
    "window both ways": dict(causal=False, window=5),
    "full layer among sliding ones": dict(causal=True, window=5, sliding=False, sinks=True),
}
LENGTHS = {"packed": (0.35, 0.2, 0.3), "one document": (1.0,)}  # shares of a row; the rest is padding


def parts(T: int, *, B=2, N=4, K=2, H=8, packing="packed", prefix=0):
    """Queries, keys, values, sinks and what their output is weighed by; and the layout of packed rows."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    lengths = [int(share * T) for share in LENGTHS[packing]]
    batch = tiny.rows(batch=B, lengths=lengths, padding=T - sum(lengths))
    if prefix:
        batch["order"] = np.maximum(batch["positions"], prefix)
    layout = jax.tree.map(jnp.asarray, Layout.of(batch))
    real = (batch["segments"] > 0)[..., None, None]
    return (draw(B, T, N, H), draw(B, T, K, H), draw(B, T, K, H), draw(N)), layout, draw(B, T, N, H) * real


def graded(kernel, arrays, layout, weights, *, sinks=False, sliding=None, **rule):
    """y and the gradients of a weighed sum of it, where sliding is given as data."""
    @jax.jit
    def run(arrays, layout, weights, sliding):
        def total(arrays):
            more = {} if sliding is None else dict(sliding=sliding)
            more |= dict(sinks_N=arrays[3]) if sinks else {}
            y = kernel(*arrays[:3], layout, layout, scale=0.3, **rule, **more)
            return (y * weights).sum(), y * (layout.segments_BT > 0)[..., None, None]

        return jax.grad(total, has_aux=True)(arrays)

    return jax.device_get(run(arrays, layout, weights, None if sliding is None else jnp.asarray(sliding)))


def on_mesh(kernel, mesh: dict, arrays, layout, weights, **rule):
    """The same on a mesh, arrays laid out as a layer has them."""
    devices = jax.devices()[:int(np.prod(list(mesh.values())))]
    with jax.sharding.set_mesh(parallel.make_mesh(MeshConfig(**dict(fsdp=1) | mesh), devices)):
        arrays = tuple(parallel.constrain(x, letters) for x, letters in zip(arrays, ("BTNH", "BTKH", "BTKH", "N")))
        layout = jax.tree.map(lambda x: parallel.constrain(x, "BT"), layout)
        return graded(kernel, arrays, layout, parallel.constrain(weights, "BTNH"), **rule)


def same(got, expected):
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * max(np.abs(b).max(), 1e-3))
    jax.tree.map(close, got, expected)


MESHES = {"ring of 2": dict(sequence=2), "ring of 4, heads on 2": dict(sequence=4, model=2),
          "ring of 2, rows on 2, heads on 2": dict(sequence=2, fsdp=2, model=2)}
RINGS = [("ring of 4, heads on 2", rule, "packed", 0) for rule in RULES] + [
    ("ring of 4, heads on 2", "causal", "one document", 0), ("ring of 4, heads on 2", "causal", "packed", 3),
    ("ring of 2", "all at once", "packed", 0), ("ring of 2, rows on 2, heads on 2", "all at once", "packed", 4)]


@pytest.mark.parametrize("mesh, rule, packing, prefix", RINGS)
def test_a_ring_gives_what_one_device_gives(mesh, rule, packing, prefix):
    given = parts(32, packing=packing, prefix=prefix)
    same(on_mesh(ring.ring, MESHES[mesh], *given, **RULES[rule]), graded(kernels.xla, *given, **RULES[rule]))


@pytest.fixture
def small_blocks(monkeypatch):
    """So that rows of a few tokens have some."""
    monkeypatch.setattr(blocked, "LEAST", 6)


BLOCKS = [(rule, "packed", 0, 22) for rule in RULES] + [  # the last of these rows' blocks is shorter
    ("causal", "one document", 0, 24), ("window both ways", "one document", 0, 24), ("causal", "packed", 9, 22),
    ("all at once", "one document", 9, 24), ("causal", "packed", 0, 9)]


@pytest.mark.parametrize("rule, packing, prefix, T", BLOCKS)
def test_blocks_show_what_the_mask_shows(rule, packing, prefix, T, small_blocks):
    given = parts(T, packing=packing, prefix=prefix)
    same(graded(blocked.blocked, *given, **RULES[rule]), graded(kernels.xla, *given, **RULES[rule]))


@pytest.mark.parametrize("mesh", [dict(fsdp=2, model=4), dict(data=2, fsdp=1, model=2)], ids=str)
@pytest.mark.parametrize("rule", ["all at once", "full layer among sliding ones"])
def test_blocks_give_on_a_mesh_what_one_device_gives(mesh, rule, small_blocks):
    given = parts(22, B=4)
    same(on_mesh(blocked.blocked, mesh, *given, **RULES[rule]), graded(kernels.xla, *given, **RULES[rule]))


@pytest.mark.parametrize("kernel, T, mesh", [
    (kernels.xla, 16, dict(model=4)), (blocked.blocked, 16, dict(model=4)), (ring.ring, 16, dict(sequence=2, model=4)),
    (splash.splash, 128, dict(model=4, fsdp=2))], ids=["xla", "blocked", "ring", "splash"])
@pytest.mark.parametrize("K", [1, 2])
def test_each_shard_of_heads_reads_its_own_key_heads(kernel, T, mesh, K):
    """Also where the mesh has more shards of heads than there are key heads."""
    given = parts(T, N=8, K=K)
    same(on_mesh(kernel, mesh, *given, causal=True), graded(kernels.xla, *given, causal=True))


@pytest.mark.parametrize("rule", RULES)
def test_splash_shows_what_the_mask_shows(rule):
    given = parts(256)
    same(graded(splash.splash, *given, **RULES[rule]), graded(kernels.xla, *given, **RULES[rule]))


@pytest.mark.parametrize("mesh, rule", [
    (dict(model=2), "all at once"), (dict(sequence=2), "causal"), (dict(sequence=2), "both ways"),
    (dict(sequence=2), "window both ways"),
    (dict(sequence=4, model=2), "all at once")], ids=str)
def test_splash_gives_on_a_mesh_what_one_device_gives(mesh, rule):
    given = parts(256 * mesh.get("sequence", 1))
    same(on_mesh(splash.splash, mesh, *given, **RULES[rule]), graded(kernels.xla, *given, **RULES[rule]))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
def test_a_causal_ring_has_the_same_work_everywhere(n):
    """Pairs of halves with anything to see, device by device; a row as it stands gives the last one n times more."""
    assert [sum(other <= mine for mine in pair for other in range(2 * n)) for pair in ring.halves(n)] == [2 * n + 1] * n
    with jax.sharding.set_mesh(parallel.make_mesh(MeshConfig(sequence=n, fsdp=1), jax.devices()[:n])):
        row_BT = parallel.constrain(jnp.asarray(np.arange(2 * n).repeat(3)[None], jnp.int32), "BT")
        dealt = parallel.per_shard(ring.deal, row_BT, letters=("BT",)) if n > 1 else row_BT
        back = parallel.per_shard(functools.partial(ring.deal, back=True), dealt, letters=("BT",)) if n > 1 else dealt
        held = np.asarray(dealt).reshape(n, 6)[:, ::3]
    np.testing.assert_array_equal(held, ring.halves(n))
    np.testing.assert_array_equal(back, row_BT)


def test_what_a_ring_sends():
    """Keys, values and layouts n - 1 times, their gradients n times, and what is dealt out twice in two halves."""
    n, given = 4, parts(32)
    layouts, sent = 2, []
    with jax.sharding.set_mesh(parallel.make_mesh(MeshConfig(sequence=n, fsdp=1), jax.devices()[:n])):
        arrays, layout, weights = jax.tree.map(lambda x: parallel.constrain(x, "BT.."[:x.ndim]), given)
        total = lambda arrays: (ring.ring(*arrays[:3], layout, layout, causal=True, scale=1.0) * weights).sum()
        moves(jax.make_jaxpr(jax.grad(total))(arrays).jaxpr, 1, sent)
    parts_once = 2 + layouts
    dealt, round_trip, back = 2 * (3 + layouts) + 2, 2 * (n - 1) * parts_once + 2 * n, 2 * 3 + 2
    assert sum(sent) == dealt + round_trip + back
    assert set(sent) == {1}, "each hop is an op of its own: on CPUs, two passages of one op mix up what they send"


def test_runs_of_segments_are_starts_and_lengths(rng):
    segments = np.sort(rng.integers(0, 9, (6, 40)), axis=1)[:, ::-1].astype(np.int32)
    starts, lengths, most = jax.jit(cudnn.runs)(segments)
    for row, start, length in zip(segments, starts, lengths):
        cuts = np.flatnonzero(np.diff(row)) + 1
        begins, pad = np.r_[0, cuts], cudnn.SEGMENTS - len(cuts) - 1
        np.testing.assert_array_equal(start, np.r_[begins, [-1] * (pad + 1)])
        np.testing.assert_array_equal(length, np.r_[np.diff(np.r_[begins, len(row)]), [-1] * pad])
    assert most == max(len(np.unique(row)) for row in segments)


def pretend_hopper(monkeypatch):
    """JAX asks the GPU whether it has the kernel."""
    answers = dict(check_cudnn_version=lambda: 91000, check_compute_capability=lambda least: True,
                   is_cuda_compute_capability_equal=lambda this: False)
    for name, answer in answers.items():
        monkeypatch.setattr(fused, name, answer)
    monkeypatch.setattr(cudnn, "is_here", lambda: True)


@pytest.mark.parametrize("mesh", [{}, dict(fsdp=2, model=4)], ids=str)
def test_cudnn_is_lowered_for_a_gpu_that_is_not_here(mesh, monkeypatch):
    """With windows of some layers, forward and backward: what is sent to cuDNN, not what it answers."""
    pretend_hopper(monkeypatch)
    (q, k, v, _), layout, _ = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.ndim > 2 else x, parts(128, B=4, H=64))
    total = lambda q, slides: cudnn.cudnn(q, k, v, layout, layout, causal=True, scale=0.25, window=16,
                                          sliding=slides).astype(jnp.float32).sum()
    with jax.sharding.set_mesh(parallel.make_mesh(MeshConfig(**mesh), jax.devices()[:8 if mesh else 1])):
        program = jax.jit(jax.grad(total)).trace(q, jnp.asarray(True)).lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in program.splitlines() if "custom_call @__cudnn$fmhaSoftmax" in line]
    assert sorted("Backward" in call for call in calls) == [False, False, True, True]
    rows, heads = (2, 1) if mesh else (4, 4)
    for call in calls:
        assert "PADDING_CAUSAL" in call and f"max_seg_per_batch\\22: {cudnn.SEGMENTS}," in call
        assert f"tensor<{rows}x128x{heads}x64xbf16>" in call and f"tensor<{rows}x{cudnn.SEGMENTS + 1}xi32>" in call
    windows = [call.split("sliding_window_length\\22: ")[1].split(",")[0] for call in calls]
    assert sorted(windows) == ["0", "0", "16", "16"]


@pytest.mark.parametrize("window", [0, 16])
def test_where_there_is_no_gpu_the_types_are_cudnns(window, monkeypatch):
    """What is kept for the backward pass too, so that a plan counts its bytes."""
    def types():
        def attended(q, k, v):  # not under the cond, which keeps what either branch does
            monkeypatch.setattr(jax.lax, "cond", lambda _, packed, plain: packed())
            return cudnn.cudnn(q, k, v, layout, layout, causal=True, scale=0.25, window=window)
        kept = jax.eval_shape(lambda *qkv: jax.vjp(attended, *qkv), q, k, v)
        return sorted(str((x.shape, x.dtype)) for x in jax.tree.leaves(kept) if x.size)

    (q, k, v, _), layout, _ = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.ndim > 2 else x, parts(128, H=64))
    elsewhere = types()
    pretend_hopper(monkeypatch)
    assert elsewhere == types()


def test_rows_with_more_documents_than_cudnn_has_room_for(monkeypatch):
    """They go through plain attention, some queries at a time."""
    given, rule = parts(24), dict(causal=True, window=5)
    monkeypatch.setattr(cudnn, "CHUNK", 8)

    def plain(q, k, v, query, key, **rule):
        return cudnn._chunked(q, k, v, query, **rule)

    same(graded(plain, *given, **rule), graded(kernels.xla, *given, **rule))


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN wants a GPU, and JAX_PLATFORMS=cuda")
@pytest.mark.parametrize("rule", ["causal", "both ways", "window"])
@pytest.mark.parametrize("packing", LENGTHS)
def test_cudnn_shows_what_the_mask_shows(rule, packing):
    half = lambda x: x.astype(jnp.bfloat16) if x.ndim > 2 else x
    given = jax.tree.map(half, parts(256, H=64, packing=packing))
    got, expected = (graded(kernel, *given, **RULES[rule]) for kernel in (cudnn.cudnn, kernels.xla))
    close = lambda a, b: np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), rtol=0.05,
                                                    atol=0.02 * np.abs(b).max().astype(np.float32))
    jax.tree.map(close, got, expected)


KINDS = {"cpu": "cpu", "tpu": "TPU v5p", "gpu": "NVIDIA H100 80GB HBM3"}


def mesh_of(platform: str, *, kind="", **sizes):
    """An abstract mesh of devices that are not here."""
    devices = int(np.prod(list(sizes.values()) or [1]))
    kind = kind or KINDS[platform]
    return parallel.abstract_mesh(MeshConfig(**dict(fsdp=1) | sizes), devices, platform=platform, kind=kind)


CROWDED = "rows of more than 32 documents: xla"
CHOICES = [  # platform, mesh, model, what is chosen for rows of 256 tokens
    ("cpu", {}, {}, "blocked; cache: xla"),
    ("cpu", dict(fsdp=2, model=2), dict(sinks=True, window=8, attention_softcap=3.0), "blocked; cache: xla"),
    ("cpu", {}, dict(dropout=0.1), "xla"),
    ("cpu", dict(sequence=2), {}, "xla"),
    ("tpu", {}, {}, "splash; cache: xla"),
    ("tpu", dict(model=2, fsdp=2), dict(sinks=True, window=8, attention_softcap=3.0), "splash; cache: xla"),
    ("tpu", dict(sequence=1), {}, "splash; cache: xla"),
    ("tpu", dict(sequence=2), {}, "ring; cache: xla"),  # no multiple of 512
    ("tpu", {}, dict(positions="alibi"), "xla"),
    ("tpu", {}, dict(dropout=0.1), "xla"),
    ("tpu", {}, dict(encoder_depth=1), "splash; cross: xla; cache: xla"),
    ("gpu", {}, dict(dtype="bfloat16"), f"cudnn; cache: xla; {CROWDED}"),
    ("gpu", {}, {}, "xla"),
    ("gpu", {}, dict(dtype="bfloat16", attention_softcap=3.0), "xla"),
    ("gpu", dict(sequence=2), dict(dtype="bfloat16", sinks=True), "ring; cache: xla"),
    ("cpu", dict(sequence=2), dict(attention="ring"), "ring; cache: xla"),
]


@pytest.mark.parametrize("platform, mesh, changes, expected", CHOICES, ids=str)
def test_the_choice_follows_platform_mesh_and_model(platform, mesh, changes, expected):
    cfg = tiny.settings(**changes)
    with jax.sharding.use_abstract_mesh(mesh_of(platform, **mesh)):
        assert kernels.chosen(cfg, 256, 256) == expected


@pytest.mark.parametrize("device", [d for d in TABLE if d.platform == "gpu"], ids=lambda d: d.name)
def test_a_plan_chooses_for_each_gpu_what_it_will_choose_itself(device):
    """cuDNN's packed rows want Hopper, or Blackwell of data centres: not Ampere, Ada or AMD, nor what nobody knows."""
    new = device.name in ("h100", "h100-pcie", "h100-nvl", "h200", "h200-nvl", "gh200", "b200", "gb200")
    with jax.sharding.use_abstract_mesh(mesh_of("gpu", kind=device.kinds[0])):
        assert (kernels.choose(tiny.settings(dtype="bfloat16"), 256) == "cudnn") == new


def test_a_gpu_that_nobody_knows_has_no_cudnn():
    cfg = tiny.settings(dtype="bfloat16", attention="cudnn")
    with jax.sharding.use_abstract_mesh(mesh_of("gpu", kind="NVIDIA B1")):
        with pytest.raises(ConfigError, match="NVIDIA B1, compute capability not known: xla can"):
            kernels.choose(cfg, 256)


WHOLE = [  # platform, mesh, family, model, what is chosen for rows of 256 tokens
    ("tpu", {}, "decoder", {}, "splash"),
    ("tpu", dict(fsdp=2, model=2), "decoder", dict(window=8, sinks=True, attention_softcap=3.0), "splash"),
    ("tpu", dict(sequence=2), "decoder", dict(sinks=True, attention_softcap=3.0), "ring"),
    ("tpu", {}, "encoder", {}, "splash"),
    ("tpu", {}, "encoder_decoder", {}, "xla"),
    ("gpu", {}, "decoder", {}, "cudnn"),
    ("gpu", dict(fsdp=2, model=2), "decoder", dict(window=8, window_pattern="SF"), "cudnn"),
    ("gpu", {}, "experts", dict(remat="full"), "cudnn"),
    ("gpu", {}, "encoder", {}, "cudnn"),
    ("gpu", {}, "encoder_decoder", dict(positions="rope"), "cudnn"),
    ("gpu", dict(sequence=2), "decoder", dict(window=8), "ring"),
    ("gpu", {}, "decoder", dict(attention_softcap=3.0), "xla"),
]


@pytest.mark.parametrize("platform, mesh, family, changes, name", WHOLE, ids=str)
def test_whole_models_are_traced_for_every_kernel_that_auto_chooses(platform, mesh, family, changes, name):
    """The loss and its gradient in bfloat16, by types: a kernel is never asked for what it has no argument for."""
    cfg = tiny.settings(family, dtype="bfloat16", max_length=256, **changes)
    batch = (tiny.pairs if cfg.encoder_depth else tiny.rows)(batch=4, lengths=(100, 150), padding=6)
    if cfg.encoder_depth:
        batch["source"] = tiny.rows(batch=4, lengths=(100, 150), padding=6)
    with jax.sharding.use_abstract_mesh(mesh_of(platform, **mesh)):
        assert kernels.choose(cfg, 256) == name
        lay = lambda x: jax.eval_shape(lambda: parallel.constrain(jnp.zeros(x.shape, x.dtype), "BT"))
        laid = jax.tree.map(lay, batch)
        model = jax.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0)))
        value, _, grads = jax.eval_shape(tiny.score, model, laid)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert value.dtype == jnp.float32 and jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, params)


def test_many_steps_on_a_ring_are_those_without_one():
    """What devices send each other arrives where it should, time after time."""
    def losses_of(attention):
        cfg, o = tiny.settings(depth=1, attention=attention), OptimConfig(warmup=1, eps=1e-3)
        mesh = parallel.make_mesh(MeshConfig(fsdp=2, sequence=4))
        with jax.sharding.set_mesh(mesh):
            model = make(cfg, seed=0)
            tx = optim.make(o, 30, kinds(model))
            step = update.make_step(losses.next_token, tx, optim.schedule(o, 30), microbatches=1)
            step = jax.jit(step, compiler_options=tiny.QUICK)
            state, found = update.begin(model, tx), []
            for seed in range(30):
                state, metrics = step(state, hosts.put_batch(tiny.rows(seed)), jax.random.key(0))
                found.append(metrics["loss"])
            return np.asarray(jax.device_get(found))

    np.testing.assert_allclose(losses_of("ring"), losses_of("xla"), rtol=1e-5)


def test_lengths_and_prefixes_have_their_say():
    with jax.sharding.use_abstract_mesh(mesh_of("tpu")):
        assert kernels.chosen(tiny.settings(), 200) == "xla", "no multiple of 128"
        assert kernels.chosen(tiny.settings(), 256, prefix=True) == "xla"
    with jax.sharding.use_abstract_mesh(mesh_of("tpu", sequence=4)):
        assert kernels.chosen(tiny.settings(), 256, prefix=True) == "ring; cache: xla"
        assert kernels.chosen(tiny.settings(), 252) == "xla", "no multiple of 8"
        assert kernels.chosen(tiny.settings(), 2048) == "splash; cache: xla"


@pytest.mark.parametrize("platform, changes, prefix, message", [
    ("cpu", dict(attention="splash"), False, "'splash' cannot do platform cpu: xla, blocked can"),
    ("tpu", dict(attention="splash", positions="alibi"), False, "model.positions='alibi': xla can"),
    ("tpu", dict(attention="splash", dropout=0.1), False, "model.dropout=0.1"),
    ("tpu", dict(attention="splash"), True, "data.objective='prefix'"),
    ("tpu", dict(attention="ring"), False, "mesh.sequence=1: xla, splash can"),
    ("gpu", dict(attention="cudnn", attention_softcap=2.0), False, "softcap=2.0 nor model.dtype='float32': xla can"),
], ids=str)
def test_a_named_kernel_that_cannot_is_an_error_that_names_who_can(platform, changes, prefix, message):
    with jax.sharding.use_abstract_mesh(mesh_of(platform)), pytest.raises(ConfigError, match=message):
        kernels.chosen(tiny.settings(**changes), 256, prefix=prefix)


def moves(jaxpr, times: int, found: list):
    """How often each ppermute of a program runs."""
    for equation in jaxpr.eqns:
        found += [times] * (equation.primitive.name == "ppermute")
        inner = times * equation.params.get("length", 1)
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            value = getattr(value, "jaxpr", value)
            if hasattr(value, "eqns"):
                moves(value, inner, found)


def test_bfloat16_trains_in_a_loop_of_microbatches_as_in_one_piece():
    """XLA's CPU backend lacks some products of bfloat16 inside loops."""
    model, rows = tiny.model(dtype="bfloat16", max_length=256), tiny.rows(batch=4, lengths=(120, 130), padding=6)
    assert kernels.choose(model.cfg, 256) == "blocked"
    tx, found = optim.make(OptimConfig(), 9, kinds(model)), []
    for parts in (1, 2):
        step = update.make_step(losses.next_token, tx, lambda step: 0.0, microbatches=parts)
        state = update.begin(model, tx)
        found.append(jax.jit(step)(state, rows, jax.random.key(0))[1])
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(found[1][name], found[0][name], rtol=0.02)
