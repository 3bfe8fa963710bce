"""The same numbers on every mesh: loss, gradient, updated weights, isolation of packed rows, checkpoints."""

import contextlib
import functools

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

import tiny
from lm_jax import checkpoint, hosts, losses, optim, parallel, update
from lm_jax.config import MeshConfig, OptimConfig
from lm_jax.models.layers import kinds
from lm_jax.models.transformer import Transformer

MESHES = {
    "data 8": dict(data=8, fsdp=1),
    "fsdp 8": dict(fsdp=8),
    "model 4, data 2": dict(model=4, data=2, fsdp=1),
    "sequence 4, fsdp 2": dict(sequence=4, fsdp=2),
    "expert 4, data 2": dict(expert=4, data=2, fsdp=1),
    "replica 2, fsdp 2, model 2": dict(replica=2, fsdp=2, model=2),
    "fsdp 2, sequence 2, model 2": dict(fsdp=2, sequence=2, model=2),
    "expert 2, fsdp 2, model 2": dict(expert=2, fsdp=2, model=2),
    "ring: sequence 4, fsdp 2": dict(sequence=4, fsdp=2),
    "ring: sequence 2, fsdp 2, model 2": dict(sequence=2, fsdp=2, model=2),
}
FAMILIES = {
    "decoder": dict(depth=1, kv_heads=2, tied=False, sinks=True),  # fewer key heads than shards of the model
    "encoder": dict(depth=1),
    "encoder_decoder": dict(depth=1, encoder_depth=1),
    "experts": dict(depth=1),
}
ASKED = {mesh: dict(attention="ring") if mesh.startswith("ring") else {} for mesh in MESHES}
# An expert axis is one more fsdp axis for a model without experts; rings have no biases and no cross-attention.
CASES = [(family, mesh) for mesh in MESHES for family in FAMILIES
         if ("expert" not in mesh or family == "experts") and ("ring" not in mesh or family != "encoder_decoder")]


@pytest.fixture(scope="module")
def newest():
    """Family -> folder of the checkpoint that was saved last, on whatever mesh: the matrix goes on in a chain."""
    return {}


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("family, mesh", CASES)
def test_a_step_is_the_same_on_every_mesh_and_goes_on_on_any_other(family, mesh, parts, tmp_path, newest):
    """Step 1 here and saved; step 2 from what another mesh saved; and from what this one saved, on one device."""
    alone, (first, second) = single(family), (single(family).first, single(family).second)
    if family not in newest:
        newest[family] = tmp_path / "alone"
        saved(newest[family], first[0])
    with on(MESHES[mesh]):
        here = Run(family, parts=parts, **ASKED[mesh])
        np.testing.assert_allclose(here.first[1], first[1], rtol=1e-5)
        same(here.first[0], first[0])
        assert_optimizer_lies_as_the_weights_do(here.first[0])
        assert_packed_rows_are_isolated(here)
        assert_goes_on(here, newest[family], second)
        newest[family] = tmp_path / "mesh"
        saved(newest[family], here.first[0])
    assert_goes_on(alone, newest[family], second)


@pytest.mark.parametrize("family, mesh", [
    ("decoder", "sequence 4, fsdp 2"), ("encoder", "replica 2, fsdp 2, model 2")])
def test_a_loss_of_every_term_in_parts_is_the_same_on_every_mesh(family, mesh, monkeypatch):
    """Four parts of a token, and three of six where there are 16; gradients as well, a masked head's bias's too."""
    terms, model = dict(z_loss=0.01, smoothing=0.1), tiny.model(family, **FAMILIES[family])
    score = lambda *args: jax.jit(functools.partial(tiny.score, **terms), compiler_options=tiny.QUICK)(*args)
    value, metrics, gradients = score(model, batches(family)[0])
    monkeypatch.setattr(losses, "CHUNK", 3 * 2**9)
    with on(MESHES[mesh]):
        here = score(placed(model), hosts.put_batch(batches(family)[0]))
        np.testing.assert_allclose(here[0], value, rtol=1e-5)
        np.testing.assert_allclose(here[1]["loss"].total, metrics["loss"].total, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-6), here[2], gradients)


def test_on_one_mesh_a_run_gone_on_is_the_unbroken_one_bit_for_bit(tmp_path):
    with on(MESHES["fsdp 2, sequence 2, model 2"]):
        run = Run("decoder", parts=1)
        saved(tmp_path, run.first[0])
        state, metrics = run.step(restored(tmp_path, run.begun), batches("decoder")[1])
        assert numbers(metrics) == run.second[1]
        jax.tree.map(np.testing.assert_array_equal, *(update.parameters(s.model) for s in (state, run.second[0])))


class Run:
    """A tiny model and its jitted step on the mesh in use, with the states after its first and second step."""

    def __init__(self, family, *, parts, **asked):
        self.family, o = family, OptimConfig(warmup=1, eps=1e-3)  # else Adam takes the sign of zero gradients' noise
        model = placed(tiny.model(family, **FAMILIES[family] | asked))
        tx = optim.make(o, 3, kinds(model))
        step = update.make_step(losses.next_token, tx, optim.schedule(o, 3), microbatches=parts)
        self.compiled = jax.jit(step, compiler_options=tiny.QUICK)
        self.begun = update.begin(model, tx)
        state, metrics = self.step(self.begun, batches(family)[0])
        self.first = state, numbers(metrics)

    @functools.cached_property
    def second(self):
        state, metrics = self.step(self.first[0], batches(self.family)[1])
        return state, numbers(metrics)

    def step(self, state, batch):
        return self.compiled(state, hosts.put_batch(batch), jax.random.key(0))


@functools.cache
def single(family: str) -> Run:
    return Run(family, parts=1)


@functools.cache
def batches(family: str) -> list[dict]:
    make = tiny.pairs if family == "encoder_decoder" else tiny.rows
    return [make(seed, batch=32) for seed in (0, 7)]


@contextlib.contextmanager
def on(mesh: dict):
    with jax.sharding.set_mesh(parallel.make_mesh(MeshConfig(**mesh))):
        yield


def placed(model):
    """The model with each weight where the table of weights wants it."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return model
    types = jax.eval_shape(lambda: Transformer(model.cfg, rngs=nnx.Rngs(0)))
    return jax.device_put(model, jax.tree.map(lambda like: NamedSharding(mesh, like.sharding.spec), types))


def numbers(metrics) -> list[float]:
    names = ("objective", "loss", "accuracy", "grad_norm", "update_norm", "param_norm")
    return [float(metrics[name]) for name in names]


def same(state, other):
    """Weights equal to 1e-5 of the largest of each array."""
    def close(a, b):
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())
    jax.tree.map(close, update.parameters(state.model), update.parameters(other.model))


def assert_optimizer_lies_as_the_weights_do(state):
    name = jax.tree_util.keystr
    where = {name(path): a.sharding.spec for path, a in
             jax.tree_util.tree_leaves_with_path(update.parameters(state.model))}
    moments = [(name(path), a) for path, a in jax.tree_util.tree_leaves_with_path(state.opt.inner) if a.ndim]
    assert len(moments) == 2 * len(where)
    for path, a in moments:
        assert a.sharding.spec == next(spec for weight, spec in where.items() if path.endswith(weight)), path


def assert_packed_rows_are_isolated(run: Run):
    """The loss over a row's second document is the same, to the bit, whatever the first one says."""
    batch = batches(run.family)[0]
    second = batch | {"weights": batch["weights"] * (batch["segments"] == 2)}
    other = second | {"tokens": np.where(batch["segments"] == 1, 1 + batch["tokens"] % 62, batch["tokens"])}
    assert (other["tokens"] != second["tokens"]).sum() > 100
    one, two = (run.step(run.begun, b)[1]["loss"] for b in (second, other))
    assert one == two


def assert_goes_on(run: Run, folder, expected):
    """The second step from a checkpoint is that of the unbroken run."""
    state, metrics = run.step(restored(folder, run.begun), batches(run.family)[1])
    np.testing.assert_allclose(numbers(metrics), expected[1], rtol=1e-5)
    same(state, expected[0])


def saved(folder, state):
    with contextlib.closing(checkpoint.Checkpoints(folder, keep=1)) as files:
        files.save(1, update.saved(state), {})
        files.wait()


def restored(folder, like):
    with contextlib.closing(checkpoint.Checkpoints(folder, keep=1)) as files:
        _, tree, _ = files.restore(update.saved(like))
    return update.resumed(like, tree)

