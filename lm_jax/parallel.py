"""Where every array lives: the mesh, and two letter tables that are the whole sharding policy.

The alphabet: B batch, T tokens, S keys, D width, F hidden, N query heads, K key/value heads, H head size, V vocabulary,
L layers, E experts, P position rows, G token types, U relative buckets. Axes are explicit: a sharding is part of an
array's type, and a wrong layout is an error at trace time on the line that caused it. Without a mesh all is silent.
"""

import math
from functools import partial

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

from lm_jax.config import ConfigError, MeshConfig

AXES = ("replica", "data", "fsdp", "expert", "sequence", "model")  # slowest network first
# Letters not listed are whole on every device. An axis divides one dimension of an array, the first that asks for it:
# D takes what fsdp, experts and the sequence leave, so that only `replica` and `data` hold copies of a weight.
WEIGHTS = dict(D=("fsdp", "expert", "sequence"), V="model", F="model", N="model", K="model", E="expert")
# Rows are split over the expert axis too: no device does another's work; tables of experts are gathered for their use.
ACTIVATIONS = dict(B=("replica", "data", "fsdp", "expert"), T="sequence", V="model", F="model", N="model", K="model")
TOKENS = (*ACTIVATIONS["B"], ACTIVATIONS["T"])  # what a weight is gathered over, where products meet other tokens


def use(config: MeshConfig):
    """Make the mesh of `config` the one in use; a single device needs none."""
    if jax.device_count() == 1:
        return mesh_sizes(config, 1)
    mesh = make_mesh(config)
    jax.set_mesh(mesh)
    return dict(mesh.shape)


def make_mesh(config: MeshConfig, devices=None) -> jax.sharding.Mesh:
    """The mesh of `config` over `devices` (default: all), -1 taking what is left; ConfigError if it cannot be.

    TPU slices, which a slower network joins, lie along `replica`, and a slice's devices as its torus has them; GPUs in
    the order of their nodes, whose own are neighbours along the last axes.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(config, len(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    _check_slices(sizes, slices)
    laid = partial(_laid, tuple(sizes.values()), slices, devices)
    try:
        grid = laid(split=False)
    except NotImplementedError:  # the torus has no axis, or product of axes, of some size
        grid = laid(split=True)
    return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def abstract_mesh(config: MeshConfig, devices: int, *, platform: str, kind: str = "", slices: int = 1) -> AbstractMesh:
    """The mesh of `config` over so many devices that need not exist: enough to check and measure every layout."""
    sizes = mesh_sizes(config, devices)
    _check_slices(sizes, slices)
    device = AbstractDevice(device_kind=kind or platform, num_cores=1, platform=platform)
    return AbstractMesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Explicit,) * len(AXES),
                        abstract_device=device)


def on_mesh(types, mesh):
    """Types of arrays, laid out by the mesh they were made under, on `mesh`, which may have real devices."""
    def place(a):
        spec = PartitionSpec() if a.sharding is None else a.sharding.spec
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec))
    return jax.tree.map(place, types)


def mesh_sizes(config: MeshConfig, devices: int) -> dict[str, int]:
    """Axis -> size for a number of devices."""
    sizes = {axis: getattr(config, axis) for axis in AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size > 0)
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ConfigError(f"mesh {sizes}: sizes of at least 1, and -1 for at most one axis")
    if free and devices % fixed:
        asked = " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1)
        divisors = ", ".join(str(n) for n in range(1, devices + 1) if devices % n == 0)
        raise ConfigError(f"mesh {sizes}: {asked} does not divide {devices} devices: use {divisors}")
    if not free and devices != fixed:
        raise ConfigError(f"mesh {sizes} wants {fixed} devices and there are {devices}: "
                          f"set one axis to -1, or sizes whose product is {devices}")
    return sizes | {axis: devices // fixed for axis in free}


def weight(letters: str, shape: tuple[int, ...]) -> PartitionSpec | None:
    """Layout of a weight with these letters, e.g. "LDF"; None without a mesh."""
    return _spec(WEIGHTS, letters, shape)


def activation(letters: str, shape: tuple[int, ...]) -> PartitionSpec | None:
    """Layout of an activation with these letters, e.g. "BTD"; None without a mesh."""
    return _spec(ACTIVATIONS, letters, shape)


def gather(w, letters: str):
    """A weight with its shards over the tokens' axes brought together, for a matmul; its gradient is scattered."""
    spec = weight(letters, w.shape)
    if spec is None:
        return w
    kept = (_one(a for a in _names((axis,)) if a not in TOKENS) for axis in spec)
    return jax.sharding.reshard(w, PartitionSpec(*kept))


def constrain(x, letters: str):
    """`x` laid out as activations with these letters are."""
    spec = activation(letters, x.shape)
    return x if spec is None else jax.sharding.reshard(x, spec)


def like(x, rows: int = 0) -> PartitionSpec | None:
    """The layout of `x`, to be given to a new array of its shape, or of so many `rows`; None without a mesh."""
    spec = jax.typeof(x).sharding.spec if _axis_sizes() else None
    return PartitionSpec(*activation("B", (rows,)), *spec[1:]) if rows and spec is not None else spec


def per_rows(f, x_BTD, *per_token, tables):
    """`f(x_BTD, *per_token, *tables)` on each device's own rows and its shard of F, summed over F's axis.

    For work that must not cross rows (sorting tokens by expert). `tables` have letters EDF or EFD; every device sees
    all experts, gathered as the rows' axes are.
    """
    spec = activation("BTD", x_BTD.shape)
    if spec is None:
        return f(x_BTD, *per_token, *tables)
    into = weight("EDF", tables[0].shape)[2]
    layouts = [PartitionSpec(None, None, into)] * (len(tables) - 1) + [PartitionSpec(None, into, None)]
    tables = [jax.sharding.reshard(w, layout) for w, layout in zip(tables, layouts)]

    def local(*args):
        if not into:
            return f(*args)
        rows, tables = args[:1 + len(per_token)], args[1 + len(per_token):]
        rows = jax.lax.pcast(rows, into, to="varying")  # so that their gradients are summed here, not for each table
        return jax.lax.psum(f(*rows, *tables), into)

    rows = PartitionSpec(spec[0], spec[1], None)
    return jax.shard_map(local, in_specs=(rows,) * (1 + len(per_token)) + tuple(layouts), out_specs=rows)(
        x_BTD, *per_token, *tables)


def per_shard(f, *arrays, letters: tuple[str, ...], out: tuple[str, ...] = ()):
    """`f(*arrays)` on each device's own shards, arrays laid out as activations with these letters, the result as the
    first of them or, with `out`, results as these. For what compilers cannot split. An array may be None."""
    if not _axis_sizes():
        return f(*arrays)
    pairs = list(zip(letters, arrays, strict=True))
    specs = tuple(PartitionSpec() if x is None else activation(each, x.shape) for each, x in pairs)
    size = {a: n for each, x in pairs if x is not None for a, n in zip(each, x.shape)}
    outs = tuple(activation(each, tuple(size[a] for a in each)) for each in out) or specs[0]
    arrays = [x if x is None else jax.sharding.reshard(x, spec) for x, spec in zip(arrays, specs)]
    return jax.shard_map(f, in_specs=specs, out_specs=outs, check_vma=False)(*arrays)  # kernels say no vma


def sum_of_tokens(shares, letters: str):
    """A weight's gradient, laid out as the weight is, of what each device's tokens add to it: [1, 1, *letters] on each,
    the first two laid out as BT are. Scattered as it is summed, whatever the compiler would do."""
    spec, layout = weight(letters, shares.shape[2:]), like(shares)
    if layout is None:
        return shares[0, 0]
    tokens = _names(layout[:2])
    cuts = [tuple(a for a in _names((axis,)) if a in tokens) for axis in spec]

    def local(shares):
        for i, cut in enumerate(cuts):
            shares = jax.lax.psum_scatter(shares, cut, scatter_dimension=2 + i, tiled=True) if cut else shares
        return jax.lax.psum(shares[0, 0], [a for a in tokens if a not in sum(cuts, ())])

    laid = PartitionSpec(*(_one(cut + _names((kept,))) for cut, kept in zip(cuts, layout[2:])))
    return jax.sharding.reshard(jax.shard_map(local, in_specs=layout, out_specs=laid, check_vma=False)(shares), spec)


def key_heads(x, letters: str, N: int):
    """Keys or values laid out as these letters ("BSKH", "BTKH"), each head repeated until their number divides as that
    of the N query heads does: every shard of the model then holds the ones that its queries read, in their order."""
    K, shards = x.shape[2], axis_size("N")
    if N % shards == 0 and K % shards:
        x = jax.numpy.repeat(x, math.lcm(K, shards) // K, axis=2)
    return constrain(x, letters)


def axis_size(letter: str) -> int:
    """Among how many devices activations are divided along a letter whose size allows it."""
    axes = ACTIVATIONS[letter]
    return math.prod(_axis_sizes().get(axis, 1) for axis in ((axes,) if isinstance(axes, str) else axes))


def weight_axes(letters: str, shape: tuple[int, ...], *, of: str = "") -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The mesh axes that divide a weight, or its dimensions `of` some letters: those it is gathered over for its use,
    and those it stays divided over."""
    spec = weight(letters, shape) or ()
    axes = _names(axis for letter, axis in zip(letters, spec) if letter in (of or letters))
    return tuple(a for a in axes if a in TOKENS), tuple(a for a in axes if a not in TOKENS)


def devices_along(axes: tuple[str, ...]) -> int:
    """How many devices lie along some axes of the mesh in use."""
    return math.prod(_axis_sizes()[axis] for axis in axes)


def activation_axes(letter: str, size: int) -> tuple[str, ...]:
    """The mesh axes that divide an activation along a letter of this size."""
    return _names(activation(letter, (size,)) or ())


def rows_divide(batch: int, microbatches: int) -> None:
    """Raise ConfigError unless each microbatch's rows divide over the devices that hold rows."""
    shards = math.prod(_axis_sizes().get(axis, 1) for axis in ACTIVATIONS["B"])
    if batch % (shards * microbatches):
        raise ConfigError(f"train.batch={batch} over {shards} row shards and {microbatches} microbatches: "
                          f"use a multiple of {shards * microbatches}")


def undivided(letters: str, shape: tuple[int, ...]) -> list[tuple[str, int, str]]:
    """(letter, size, axis) where a size of a weight, or of a row's tokens, does not divide an axis that nothing else of
    it is divided over: devices along the axis hold, or do, the same."""
    table = WEIGHTS | {"T": ACTIVATIONS["T"]}
    taken, sizes = _names(_spec(table, letters, shape) or ()), _axis_sizes()
    return [(a, n, axis) for a, n in zip(letters, shape) for axis in _names((table.get(a),))
            if sizes.get(axis, 1) > 1 and axis not in taken]


def platform() -> str:
    """What programs are traced for ("cpu", "gpu", "tpu"): the devices of the mesh in use, which need not be here."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return {"cuda": "gpu", "rocm": "gpu"}.get(device.platform, device.platform) if device else jax.default_backend()


def device_kind() -> str:
    """What JAX calls the devices of the mesh in use, which need not be here."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return device.device_kind


def on_cpu() -> bool:
    """Whether programs run on CPUs: scans better unrolled, bfloat16 products summed in float32, small runs apart."""
    return platform() == "cpu"


def local_size(letters: str, shape: tuple[int, ...]) -> int:
    """Elements that one device holds of an activation with these letters."""
    sizes = _axis_sizes()
    return math.prod(shape) // math.prod(sizes[axis] for axis in _names(activation(letters, shape) or ()))


def split(x, parts: int, *, axis: int):
    """`x` cut along `axis` into `parts` leading slices, interleaved so that no element leaves its device."""
    before, after, layout = x.shape[:axis], x.shape[axis + 1:], like(x)
    inner = layout and PartitionSpec(*layout[:axis + 1], None, *layout[axis + 1:])
    x = jax.numpy.reshape(x, (*before, x.shape[axis] // parts, parts, *after), out_sharding=inner)
    return jax.numpy.moveaxis(x, axis + 1, 0)


def _laid(shape, slices, devices, *, split):
    """Devices in an array of this shape; `split` allows an axis of the torus to be cut into two of the mesh."""
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=split)
    within = (shape[0] // slices, *shape[1:])
    across = (slices,) + (1,) * len(within[1:])
    return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=split)


def _check_slices(sizes: dict[str, int], slices: int):
    if sizes["replica"] % slices:
        raise ConfigError(f"mesh.replica={sizes['replica']} over {slices} TPU slices: set mesh.replica={slices}, or a "
                          "multiple, since only whole copies of a run are joined by the network between slices")


def _spec(table, letters, shape):
    sizes = _axis_sizes()
    if not sizes:
        return None
    if len(letters) != len(shape):
        raise ValueError(f"letters {letters!r} for an array of shape {shape}")
    left, spec = dict(sizes), []
    for letter, size in zip(letters, shape):
        taken = []
        for axis in _names((table.get(letter),)):
            if left.get(axis, 1) > 1 and size % left[axis] == 0:
                size //= left.pop(axis)
                taken.append(axis)
        spec.append(_one(taken))
    return PartitionSpec(*spec)


def _one(axes):
    """Mesh axes as a PartitionSpec has them: None, a name, or several."""
    axes = tuple(axes)
    return axes if len(axes) > 1 else axes[0] if axes else None


def _names(spec) -> tuple[str, ...]:
    return tuple(a for axis in spec for a in ((axis,) if isinstance(axis, str) else axis or ()))


def _axis_sizes() -> dict[str, int]:
    """Of the mesh in use; within a shard_map, where each device is on its own, there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    return {axis: mesh.shape[axis] for axis in mesh.explicit_axes}
