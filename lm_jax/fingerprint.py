"""Fingerprints of arrays: 64 bits, the same however an array lies on its devices, and others with any bit of it.

Each word of an array is mixed with its place in the whole array, and the sum of all, modulo 2**32, is taken twice with
two mixes. A sum knows no order: one, four and eight devices get the same, and two that should hold the same part of an
array can be compared, which finds a device that keeps or computes something wrong in silence. They find faults, not
forgeries.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from lm_jax.errors import Failure


class CopiesError(Failure):
    """Devices that should hold the same hold different bits."""

    code = 77


def of(tree) -> dict[str, str]:
    """Name of each array of a pytree -> its fingerprint, 16 hexadecimal digits; CopiesError where copies differ.

    All processes of a run ask together, and get the same.
    """
    leaves = named(tree)
    arrays = tuple(leaves.values())
    if all(isinstance(array.sharding, NamedSharding) for array in arrays):
        mesh = arrays[0].sharding.mesh
        devices, sums_ML2 = list(mesh.devices.flat), _program(mesh, tuple(a.sharding.spec for a in arrays))(arrays)
    else:
        devices, sums_ML2 = list(arrays[0].devices()), _program(None, None)(arrays)
    sums_ML = [[int(first) << 32 | int(second) for first, second in row] for row in np.asarray(sums_ML2).tolist()]
    return {name: f"{_whole(name, array, dict(zip(devices, sums))):016x}"
            for (name, array), sums in zip(leaves.items(), zip(*sums_ML))}


def named(tree) -> dict:
    """"/"-joined path -> leaf, in the tree's order, whatever the tree is made of."""
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}
    if len(leaves) != len(pairs):
        raise ValueError("two leaves of the tree have one name: keep '/' out of its keys")
    return leaves


def nested(leaves) -> dict:
    """What `named` gave as nested plain dicts."""
    tree = {}
    for name, leaf in leaves.items():
        *folders, last = name.split("/")
        inner = tree
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[last] = leaf
    return tree


def _whole(name: str, array, sums: dict) -> int:
    """The fingerprint of an array from those of what each device holds of it: of each part once."""
    parts = {}
    for device, index in array.sharding.devices_indices_map(array.shape).items():
        parts.setdefault(str(index), {})[device] = sums[device]
    for copies in parts.values():
        if len(set(copies.values())) > 1:
            raise CopiesError(_told(name, copies))
    firsts = [next(iter(copies.values())) for copies in parts.values()]
    return sum(f >> 32 for f in firsts) % 2**32 << 32 | sum(f % 2**32 for f in firsts) % 2**32


def _told(name: str, copies: dict) -> str:
    """Which devices are in the minority."""
    groups = {}
    for device, found in copies.items():
        groups.setdefault(found, []).append(f"{device} of process {device.process_index}")
    *few, most = sorted(groups.values(), key=len)
    wrong = ", ".join(device for group in few for device in group)
    doubt = " (or they do not: there is no majority)" if len(few[-1]) == len(most) else ""
    return (f"{wrong} does not hold the bits of {name} that {', '.join(most)} do{doubt}: something was kept or "
            "computed wrong in silence. Nothing of it is saved; the same command goes on from the last checkpoint, "
            "best without that device")


@functools.lru_cache(maxsize=8)
def _program(mesh, specs):
    """Jitted: arrays -> [M, L, 2] words, for each device and array the sums of what that device holds of it."""
    if mesh is None:
        return jax.jit(lambda arrays: jnp.stack([_sums(a, a.shape, [0] * a.ndim) for a in arrays])[None])

    def local(arrays, shapes):
        places = [_start(mesh, spec, a.shape) for a, spec in zip(arrays, specs)]
        sums_L2 = jnp.stack([_sums(a, shape, at) for a, shape, at in zip(arrays, shapes, places)])
        return jax.lax.all_gather(sums_L2, mesh.axis_names)

    def program(arrays):
        shapes = [a.shape for a in arrays]
        each = jax.shard_map(lambda *a: local(a, shapes), mesh=mesh, in_specs=specs, out_specs=jax.P(), check_vma=False)
        return each(*arrays)

    return jax.jit(program)


def _start(mesh, spec, shape) -> list:
    """Where in the whole array the part of this device begins."""
    names = [() if axis is None else axis if isinstance(axis, tuple) else (axis,) for axis in spec]
    names += [()] * (len(shape) - len(names))
    return [jax.lax.axis_index(axes).astype(jnp.uint32) * size if axes else 0 for axes, size in zip(names, shape)]


def _sums(x, shape, start):
    """Two sums over the words of a part that begins at `start` of an array of `shape`."""
    words = _words(x)
    place = jnp.zeros(words.shape, jnp.uint32)
    for d, (size, at) in enumerate(zip((*shape, *words.shape[x.ndim:]), (*start, 0))):
        place = place * np.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, d) + jnp.uint32(at)
    mixes, zero = (_mixed(words ^ _mixed(place)), _mixed(words + _mixed(~place))), np.uint32(0)
    add = lambda a, b: (a[0] + b[0], a[1] + b[1])
    return jnp.stack(jax.lax.reduce(mixes, (zero, zero), add, range(words.ndim)))  # in one pass


def _words(x):
    """An array's bits as 32-bit words; numbers of 64 bits get a last axis of two."""
    if x.dtype == jnp.bool:
        return x.astype(jnp.uint32)
    bits = min(32, 8 * x.dtype.itemsize)
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{bits}")).astype(jnp.uint32)


def _mixed(h):
    """A one-to-one mix of 32 bits, after which each depends on all (the finalizer of MurmurHash3, Appleby 2008)."""
    h = (h ^ h >> 16) * np.uint32(0x85EBCA6B)
    h = (h ^ h >> 13) * np.uint32(0xC2B2AE35)
    return h ^ h >> 16
