"""Meshes: weights that do not depend on them, layouts by the letters, and every config traced on its own mesh."""

import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import tiny
from lm_jax import config, parallel, update
from lm_jax.config import ConfigError, MeshConfig
from lm_jax.models.transformer import make
from lm_jax.preflight import program
from lm_jax.recipes import pretrain


@pytest.mark.parametrize("family, axes, shape", [
    ("decoder", dict(fsdp=2, sequence=2, model=2), (1, 8, 32)),
    ("encoder", dict(fsdp=8), (1, 4, 64)),
    ("encoder_decoder", dict(data=2, fsdp=1, model=4), (1, 32, 16)),
    ("experts", dict(expert=4, fsdp=2), (1, 1, 16, 64)),
    ("experts", dict(expert=2, fsdp=2, model=2), (1, 2, 16, 32)),
])
def test_initial_weights_do_not_depend_on_the_mesh(family, axes, shape):
    """But for the last bit, which a compiler may round as it likes; each lives in the table's pieces."""
    cfg = tiny.settings(family, depth=1, tied=False)
    single = make(cfg, seed=3)
    with jax.sharding.set_mesh(parallel.make_mesh(MeshConfig(**axes))):
        model = make(cfg, seed=3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-7), single, model)
    up = model.decoder.blocks.mlp.up
    assert getattr(up, "w", up)[...].addressable_shards[0].data.shape == shape


CONFIGS = sorted((pathlib.Path(__file__).parent.parent / "configs").glob("*.py"))
LARGE = {"1b": 256, "8b": 256, "moe": 256, "70b": 512}  # devices


KINDS = {"tpu": "TPU v5p", "gpu": "NVIDIA H100 80GB HBM3"}


@pytest.mark.parametrize("platform", KINDS)
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_traces_on_its_mesh(path, platform):
    """The whole step by types alone, with the platform's kernels: nothing is allocated, and a wrong layout is an error
    here."""
    c = pretrain.planned(config.resolve(runpy.run_path(str(path))["get_config"]()))
    mesh = parallel.abstract_mesh(c.mesh, LARGE.get(path.stem, 8), platform=platform, kind=KINDS[platform])
    traced = program.abstract(c, mesh)
    with jax.sharding.use_abstract_mesh(mesh):
        state, _ = jax.eval_shape(traced.step, traced.state, traced.batch, traced.key)
    same = lambda old, new: (old.shape, old.dtype, old.sharding.spec) == (new.shape, new.dtype, new.sharding.spec)
    jax.tree.map(lambda old, new: same(old, new) or pytest.fail(f"{new} after a step on {old}"), traced.state, state)
    if path.stem in LARGE:
        sizes, params = dict(mesh.shape), jax.tree.leaves(update.parameters(state.model))
        held = sum(w.size // held_by(w.sharding.spec, sizes) for w in params)
        assert held < 1.05 * sum(w.size for w in params) / (sizes["fsdp"] * sizes["model"])


def held_by(spec: PartitionSpec, sizes: dict) -> int:
    """Among how many devices a weight is divided."""
    axes = [a for axis in spec if axis for a in ((axis,) if isinstance(axis, str) else axis)]
    return int(np.prod([sizes[a] for a in axes]))


def test_what_does_not_divide_is_replicated_and_said():
    sizes = MeshConfig(model=4, fsdp=2)
    with jax.sharding.set_mesh(parallel.make_mesh(sizes)):
        assert parallel.weight("DKH", (32, 2, 8)) == PartitionSpec("fsdp", None, None)
        assert parallel.undivided("DKH", (32, 2, 8)) == [("K", 2, "model")]
        assert parallel.undivided("DNH", (32, 4, 8)) == []
        assert parallel.activation("BTV", (8, 16, 64)) == PartitionSpec("fsdp", None, "model")
        assert parallel.local_size("BTV", (8, 16, 64)) == 8 * 16 * 64 // 8
    assert parallel.weight("DKH", (32, 2, 8)) is None, "without a mesh all of this is silent"


def test_weights_are_copied_over_replica_and_data_alone():
    """Every other axis divides them: D takes what experts leave, and an axis that D does not divide by is said."""
    with jax.sharding.set_mesh(parallel.make_mesh(MeshConfig(fsdp=2, sequence=2, expert=2))):
        assert parallel.weight("DF", (32, 64)) == PartitionSpec(("fsdp", "expert", "sequence"), None)
        assert parallel.weight("LEDF", (2, 4, 32, 64)) == PartitionSpec(None, "expert", ("fsdp", "sequence"), None)
        assert parallel.weight("DF", (12, 64)) == PartitionSpec(("fsdp", "expert"), None)
        assert parallel.undivided("DF", (12, 64)) == [("D", 12, "sequence")]
        assert parallel.undivided("EDF", (4, 32, 64)) == parallel.undivided("DE", (32, 4)) == []


def test_a_mesh_that_cannot_be_is_an_error_that_says_what_could():
    assert parallel.mesh_sizes(MeshConfig(model=2, sequence=2), 8)["fsdp"] == 2
    for wrong in (dict(model=3), dict(fsdp=4), dict(fsdp=-1, data=-1), dict(model=0)):
        with pytest.raises(ConfigError, match="mesh .*(devices|sizes)"):
            parallel.mesh_sizes(MeshConfig(**wrong), 8)
    with jax.sharding.set_mesh(parallel.make_mesh(MeshConfig())):
        parallel.rows_divide(16, 2)
        with pytest.raises(ConfigError, match="multiple of 16"):
            parallel.rows_divide(24, 2)


def test_a_size_that_does_not_divide_the_devices_is_named_with_those_that_do():
    with pytest.raises(ConfigError, match=r"model=3 does not divide 64 devices: use 1, 2, 4, 8, 16, 32, 64$"):
        parallel.mesh_sizes(MeshConfig(model=3), 64)
    with pytest.raises(ConfigError, match=r"sequence=2 x model=3 does not divide 8 devices"):
        parallel.mesh_sizes(MeshConfig(model=3, sequence=2), 8)


def test_parts_are_interleaved(rng):
    x = rng.standard_normal((2, 12, 3)).astype(np.float32)
    np.testing.assert_array_equal(parallel.split(jnp.asarray(x), 4, axis=1)[1], x[:, 1::4])
