"""Fingerprints: the same on any mesh, another with any bit, and devices that differ are named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm_jax import fingerprint, parallel
from lm_jax.config import MeshConfig

MESHES = (MeshConfig(data=8, fsdp=1), MeshConfig(fsdp=8), MeshConfig(fsdp=2, model=4),
          MeshConfig(replica=2, data=2, fsdp=1, model=2), MeshConfig(fsdp=2, expert=2, sequence=2))
KINDS = ("float32", "bfloat16", "int32", "int8", "bool", "uint32", "float16")


def tree(seed=0):
    rng = np.random.default_rng(seed)
    leaves = {kind: np.asarray(jnp.asarray(rng.normal(size=(4, 8, 16)) * 50, kind)) for kind in KINDS}
    return leaves | {"inner": {"scalar": np.float32(3.5), "vector": rng.normal(size=24).astype("float32")}}


def laid(leaves, mesh):
    put = lambda a: jax.device_put(a, jax.NamedSharding(mesh, parallel.weight("LDF"[3 - a.ndim:], a.shape)))
    return jax.tree.map(put, leaves)


def here(leaves):
    return fingerprint.of(jax.tree.map(jnp.asarray, leaves))


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_every_mesh_gives_the_fingerprints_of_one_device(sizes):
    mesh = parallel.make_mesh(sizes)
    with jax.set_mesh(mesh):
        assert fingerprint.of(laid(tree(), mesh)) == here(tree())


def test_each_bit_and_each_place_counts():
    leaves, rng = tree(), np.random.default_rng(1)
    before = here(leaves)
    assert set(before) == {*KINDS, "inner/scalar", "inner/vector"}
    for kind in KINDS:
        for _ in range(5):
            changed = leaves[kind].copy()
            flat = changed.view("uint8").reshape(-1)
            flat[rng.integers(flat.size)] ^= 1 if kind == "bool" else 1 << rng.integers(8)
            after = here(leaves | {kind: changed})
            assert [name for name in before if before[name] != after[name]] == [kind]
    swapped = leaves["float32"][[1, 0, 2, 3]]
    assert here({"a": swapped}) != here({"a": leaves["float32"]})
    assert here({"a": np.zeros(3, "float32")}) != here({"a": np.zeros(4, "float32")})


def test_sums_are_those_of_the_definition():
    """Against whole numbers of Python."""
    def mixed(h):
        h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
        h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
        return h ^ h >> 16

    words = np.arange(6, dtype="float32").reshape(2, 3).view("uint32").ravel().tolist()
    one = sum(mixed(w ^ mixed(i)) for i, w in enumerate(words)) % 2**32
    two = sum(mixed((w + mixed(i ^ 0xFFFFFFFF)) % 2**32) for i, w in enumerate(words)) % 2**32
    assert here({"a": np.arange(6, dtype="float32").reshape(2, 3)}) == {"a": f"{one:08x}{two:08x}"}


@pytest.mark.parametrize("device", range(8))
def test_a_device_whose_copy_differs_by_one_bit_is_named(device):
    mesh = parallel.make_mesh(MeshConfig(data=4, fsdp=1, model=2))
    with jax.set_mesh(mesh):
        array = laid(tree(), mesh)["float32"]  # four copies of two halves
        copies = [np.array(shard.data) for shard in array.addressable_shards]
        copies[device].view("uint32")[0, 0, 0] ^= 1 << 20
        put = [jax.device_put(copy, shard.device) for copy, shard in zip(copies, array.addressable_shards)]
        struck = jax.make_array_from_single_device_arrays(array.shape, array.sharding, put)
        named = array.addressable_shards[device].device
        with pytest.raises(fingerprint.CopiesError, match=f"^{named} of process 0 does not hold the bits of w/q "):
            fingerprint.of({"w": {"q": struck}})


def test_two_that_differ_are_both_named():
    mesh = parallel.make_mesh(MeshConfig(data=2, fsdp=1, model=4))
    with jax.set_mesh(mesh):
        array = laid(tree(), mesh)["float32"]
        copies = [np.array(shard.data) for shard in array.addressable_shards]
        copies[0] += 1
        put = [jax.device_put(copy, shard.device) for copy, shard in zip(copies, array.addressable_shards)]
        struck = jax.make_array_from_single_device_arrays(array.shape, array.sharding, put)
        with pytest.raises(fingerprint.CopiesError, match="there is no majority"):
            fingerprint.of({"a": struck})
