"""What a user calls hardware -> the chips, how they are wired, and how fast a group of them talks.

    v5e-256  v6e-64        TPUs that are counted in chips
    v5p-128  v4-32  v3-32  TPUs that are counted in TensorCores, two a chip: v5p-128 is 64 chips, 4x4x4
    v7x-64   tpu7x-64      chips, two JAX devices each
    v5p:4x4x8              a torus by its shape, in chips
    4xv5e-256              four slices, joined by the data-centre network
    h100-64  b200-8        GPUs; NVLink joins those of a host (or a GB200 rack), InfiniBand the rest
    8xh100                 as clouds write it: one host of eight
"""

import difflib
import math
import re
from dataclasses import dataclass, replace

from lm_jax.devices import DEVICES, Device
from lm_jax.errors import ConfigError

# Cloud's shapes by number of chips; a square or cube serves the most axes. Beyond, the most even multiples of 4.
FLAT = {1: (1, 1), 2: (1, 2), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16),
        512: (16, 32), 1024: (32, 32)}
CUBE = {1: (1, 1, 1), 4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4)}
FORMS = "v5e-256, v5p-128 (cores), v7x-64, v5p:4x4x8 (torus), 4xv5e-256 (slices), h100-64 or 8xh100"
OTHER_NAMES = {"tpu7x": "v7x", "7x": "v7x", "v5litepod": "v5e", "v5lite": "v5e", "a100-80": "a100", "h100-sxm": "h100"}


@dataclass(frozen=True)
class Topology:
    """`slices` of chips wired as `shape`; each axis of a mesh lies on some of the wires (`Wires`)."""

    name: str
    device: Device
    shape: tuple[int, ...]  # of chips, in one slice
    slices: int = 1

    @property
    def chips(self) -> int:
        return self.slices * math.prod(self.shape)

    @property
    def devices(self) -> int:
        """As JAX counts them."""
        return self.chips * self.device.per_chip

    @property
    def domain(self) -> int:
        """Devices that fast links join: a slice, or the GPUs of a host or rack."""
        return min(math.prod(self.shape), self.device.domain) * self.device.per_chip

    @property
    def jax_name(self) -> str:
        """Of one slice, as the TPU compiler calls it: `v5p:4x4x4`."""
        return f"{self.device.tpu_name}:{'x'.join(map(str, self.shape))}"

    def __str__(self):
        shape = "" if self.device.torus == 0 else f" {'x'.join(map(str, self.shape))}"
        slices = f" in {self.slices} slices of" if self.slices > 1 else ""
        devices = f", {self.devices} devices" if self.device.per_chip > 1 else ""
        return f"{self.name}: {self.chips} chips{slices}{shape}{devices}"


def parse(name: str) -> Topology:
    """The topology of a user's name; ConfigError with the forms there are, and the nearest device, if there is none."""
    text = name.strip().lower()
    for other, ours in OTHER_NAMES.items():
        text = re.sub(rf"(?<![a-z0-9]){other}(?![a-z0-9])|(?<=\dx){other}", ours, text)
    match = re.fullmatch(r"(?:(\d+)x)?([a-z][a-z0-9-]*?)(?:-(\d+)|:(\d+(?:x\d+)*))?", text)
    if match is None:
        raise ConfigError(f"--topology={name!r} is not a topology: write it as {FORMS}")
    times, kind, count, shape = match.groups()
    if f"{kind}-{count}" in DEVICES:  # a100-40 is a device, not forty of them
        kind, count = f"{kind}-{count}", None
    if kind not in DEVICES:
        near = difflib.get_close_matches(kind, DEVICES, n=1, cutoff=0)[0]
        raise ConfigError(f"--topology={name!r}: no device {kind!r}, did you mean {near!r}? There are "
                          f"{', '.join(DEVICES)}; write {FORMS}")
    device, times = DEVICES[kind], int(times or 1)
    if not count and not shape and (device.platform == "tpu" or not match[1]):
        raise ConfigError(f"--topology={name!r} says no number of chips: write {FORMS}")
    if device.platform == "gpu":
        return _gpus(name, device, int(count or 1) * times)
    return replace(_torus(name, device, count, shape), slices=_at_least_1(name, times))


def _at_least_1(name: str, count: int) -> int:
    if count < 1:
        raise ConfigError(f"--topology={name!r}: at least one chip")
    return count


def _gpus(name: str, device: Device, count: int) -> Topology:
    _at_least_1(name, count)
    if count > device.domain and count % device.domain:
        raise ConfigError(f"--topology={name!r}: {device.name} comes {device.domain} together, use a multiple of that")
    return Topology(name, device, (count,))


def _torus(name: str, device: Device, count: str | None, shape: str | None) -> Topology:
    if shape:
        dims = tuple(int(n) for n in shape.split("x"))
        if len(dims) != device.torus or math.prod(dims) < 1:
            raise ConfigError(f"--topology={name!r}: the torus of {device.name} has {device.torus} dimensions")
        chips = math.prod(dims)
    else:
        chips, rest = divmod(int(count), device.cores)
        if rest or chips < 1:
            raise ConfigError(f"--topology={name!r}: {device.name} is counted in TensorCores, {device.cores} a chip: "
                              f"use a multiple of {device.cores}")
        dims = _shape(name, device, chips)
    if chips > device.domain:
        raise ConfigError(f"--topology={name!r}: a pod of {device.name} has {device.domain} chips: use slices, as in "
                          f"2x{device.name}-{device.domain * device.cores}")
    return Topology(name, device, dims)


def _shape(name: str, device: Device, chips: int) -> tuple[int, ...]:
    """Cloud's shape for a number of chips."""
    known = CUBE if device.torus == 3 else FLAT
    if chips in known:
        return known[chips]
    if device.torus == 3 and chips % 64 == 0:
        cubes = chips // 64
        a = max(n for n in range(1, round(cubes ** (1 / 3)) + 1) if cubes % n == 0)
        b = max(n for n in range(1, math.isqrt(cubes // a) + 1) if cubes // a % n == 0)
        return 4 * a, 4 * b, 4 * (cubes // a // b)
    there = [n * device.cores for n in known if n <= device.domain] + ([128, 256, 512] if device.torus == 3 else [])
    near = min(there, key=lambda n: abs(n - chips * device.cores))
    raise ConfigError(f"--topology={name!r}: no slice of {chips} chips, the nearest is {device.name}-{near}; or give "
                      f"a torus, as in {device.name}:{'x'.join(map(str, known[8]))}")
