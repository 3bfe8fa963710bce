"""Parameters out of tensors on disk and back, a few megabytes at a time, each straight into its sharding."""

import math
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding

from lm_jax.errors import ConfigError
from lm_jax.hub.places import Place, joined

CHUNK = 2**24  # bytes that pass through the host at once: what keeps its peak near what the devices hold


def parameter(shape: jax.ShapeDtypeStruct, places: list[Place], tensors: dict, dtype=None) -> jax.Array:
    """A parameter of this shape and sharding, read from the tensors of its places; of their type if none is given.

    Each device's shard is filled where it lives. A tensor is read a piece at a time, and of it only the rows that this
    process's devices hold.
    """
    dtype = dtype or common_type([tensors[place.name] for place in places], places[0].name)
    shards, sharding = {}, _sharding(shape)
    for device, index in sharding.addressable_devices_indices_map(shape.shape).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shape.shape))
        same = next((array for held, array in shards.values() if held == bounds), None)
        filled = _filled(bounds, places, tensors, dtype, device) if same is None else jax.device_put(same, device)
        shards[device] = bounds, filled
    arrays = [array for _, array in shards.values()]
    return jax.make_array_from_single_device_arrays(shape.shape, sharding, arrays)


def common_type(tensors: list, name: str) -> np.dtype:
    """The type of a parameter that is so many tensors; they may differ from those of other parameters."""
    dtype = reduce(jnp.promote_types, {tensor.dtype for tensor in tensors})
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize not in (2, 4):
        raise ConfigError(f"{name!r} is of type {dtype.name}: float32, bfloat16 and float16 can be read, and "
                          "float8_e4m3fn with a scale for each block")
    return dtype


class Writer:
    """Tensors on disk of a model's parameters, made one at a time."""

    def __init__(self, params: dict[tuple, jax.Array], places: dict[tuple, list[Place]]):
        self._params, self._small, self._parts = params, {}, {}
        for path, each in places.items():
            for place in each:
                self._parts.setdefault(place.name, []).append((path, place))

    def entries(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Name -> type and shape."""
        return {name: (np.dtype(self._params[parts[0][0]].dtype), parts[0][1].shape)
                for name, parts in self._parts.items()}

    def tensor(self, name: str) -> np.ndarray:
        parts = sorted(self._parts[name], key=lambda item: item[1].part)
        return joined([(place, self._slice(path, place.at)) for path, place in parts])

    def _slice(self, path, at):
        array = self._params[path]
        if array.nbytes > CHUNK:
            return _brought(array, at)
        if path not in self._small:
            self._small[path] = np.asarray(array)
        return self._small[path][at]


def _brought(array, at) -> np.ndarray:
    """A slice of an array from the devices that hold parts of it."""
    whole = np.empty(array.shape[len(at):], array.dtype)
    for shard in array.addressable_shards:
        bounds = [part.indices(size)[:2] for part, size in zip(shard.index, array.shape)]
        held = all(start <= i < stop for i, (start, stop) in zip(at, bounds))
        if held and shard.replica_id == 0:
            with _alone(shard.device):
                part = np.asarray(shard.data[tuple(i - start for i, (start, _) in zip(at, bounds))])
            whole[tuple(slice(*bound) for bound in bounds[len(at):])] = part
    return whole


def _filled(bounds, places, tensors, dtype, device):
    """The part of a parameter between `bounds` of each dimension, on a device."""
    shape = tuple(stop - start for start, stop in bounds)
    if math.prod(shape) * dtype.itemsize <= CHUNK:
        whole = np.empty(shape, dtype)
        for start, piece in _pieces(bounds, places, tensors):
            whole[tuple(slice(i, i + n) for i, n in zip(start, piece.shape))] = piece
        return jax.device_put(whole, device)
    with _alone(device):
        whole = jnp.zeros(shape, dtype, device=device)
        for start, piece in _pieces(bounds, places, tensors):
            piece = jax.device_put(np.ascontiguousarray(piece, dtype), device)
            whole = _write(whole, piece, start).block_until_ready()  # so that no pieces queue up
    return whole


def _pieces(bounds, places, tensors):
    """(where it begins, numbers) of every piece of a file that lies between the bounds."""
    for place in places:
        outer, inner = bounds[:len(place.at)], bounds[len(place.at):]
        if not all(start <= i < stop for i, (start, stop) in zip(place.at, outer)):
            continue
        tensor, first = tensors[place.name], place.leads
        start, stop = inner[first]
        width = math.prod(place.shape) * tensor.dtype.itemsize // dict(zip(place.order, place.numbers))[
            place.letters[first]]
        step = max(CHUNK // max(width, 1), 1)
        rest = tuple(slice(None) if i == first else slice(*bound) for i, bound in enumerate(inner))
        at = [i - bound[0] for i, bound in zip(place.at, outer)]
        for row in range(start, stop, step):
            piece = place.read(tensor, row, min(row + step, stop))[rest]
            begin = [row - start if i == first else 0 for i in range(len(inner))]
            yield (*at, *begin), piece[(None,) * len(at)]


@partial(jax.jit, donate_argnums=0)
def _write(whole, piece, start):
    return jax.lax.dynamic_update_slice(whole, piece, start)


def _alone(device):
    """Where programs run on one device, whatever the mesh in use."""
    return jax.set_mesh(jax.make_mesh((), (), devices=[device]))


def _sharding(shape):
    """A sharding over real devices: that of the shape on the mesh in use, or JAX's first device."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return SingleDeviceSharding(jax.local_devices()[0])
    return NamedSharding(mesh, jax.P() if shape.sharding is None else shape.sharding.spec)
