"""What clusters call the hardware of a topology: machines and labels of GKE, accelerators of SkyPilot, hosts of all.

Names as in cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus and /gpus, and in SkyPilot's catalogue, of 2026.
"""

import math
from dataclasses import dataclass

from lm_jax.errors import ConfigError
from lm_jax.preflight.topology import Topology, parse


@dataclass(frozen=True)
class Pool:
    """The GKE node pool of one slice: so many `hosts` of so many `chips`."""

    accelerator: str  # value of the label gke-tpu-accelerator or gke-accelerator
    machine: str
    topology: str  # value of gke-tpu-topology; "" of GPUs
    hosts: int
    chips: int

    def __str__(self):
        shape = f", --tpu-topology={self.topology}" if self.topology else ""
        return f"{self.hosts} x {self.machine} ({self.accelerator}, {self.chips} chips each{shape})"


def _machines(pattern: str, *counts: int) -> dict[int, str]:
    return {count: pattern.format(count) for count in counts}


# Device -> the label's value, and machine types by chips.
GKE = {
    "v4": ("tpu-v4-podslice", _machines("ct4p-hightpu-{}t", 4)),
    "v5e": ("tpu-v5-lite-podslice", _machines("ct5lp-hightpu-{}t", 1, 4, 8)),
    "v5p": ("tpu-v5p-slice", _machines("ct5p-hightpu-{}t", 4)),
    "v6e": ("tpu-v6e-slice", _machines("ct6e-standard-{}t", 1, 4, 8)),
    "v7x": ("tpu7x", _machines("tpu7x-standard-{}t", 1, 4)),
    "l4": ("nvidia-l4", {1: "g2-standard-12", 2: "g2-standard-24", 4: "g2-standard-48", 8: "g2-standard-96"}),
    "a100-40": ("nvidia-tesla-a100", _machines("a2-highgpu-{}g", 1, 2, 4, 8)),
    "a100": ("nvidia-a100-80gb", _machines("a2-ultragpu-{}g", 1, 2, 4, 8)),
    "h100": ("nvidia-h100-80gb", _machines("a3-highgpu-{}g", 1, 2, 4, 8)),
    "h200": ("nvidia-h200-141gb", _machines("a3-ultragpu-{}g", 8)),
    "b200": ("nvidia-b200", _machines("a4-highgpu-{}g", 8)),
    "gb200": ("nvidia-gb200", _machines("a4x-highgpu-{}g", 4)),
}
SQUARES = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
BLOCKS = ((1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))  # above, each side is a multiple of four

SKY = {
    "v2": "tpu-v2", "v3": "tpu-v3", "v4": "tpu-v4", "v5e": "tpu-v5litepod", "v5p": "tpu-v5p", "v6e": "tpu-v6e",
    "l4": "L4", "l40s": "L40S", "a100-40": "A100", "a100": "A100-80GB", "h100": "H100", "h100-nvl": "H100-NVL",
    "h200": "H200", "gh200": "GH200", "b200": "B200", "gb200": "GB200", "mi300x": "MI300X",
}


def hosts(topology: Topology, each: int = 0) -> tuple[int, int]:
    """Hosts of a slice and chips of a host; `each` where a host has other chips than usual."""
    chips = math.prod(topology.shape)
    each = min(chips, each or topology.device.host)
    if chips % each:
        raise ConfigError(f"{topology.name}: hosts of {topology.device.name} have {each} chips each, use a multiple")
    return chips // each, each


def gke(topology: Topology, each: int = 0) -> Pool:
    """The node pool of a slice; ConfigError where GKE has none."""
    device = topology.device
    if device.name not in GKE:
        raise ConfigError(f"{topology.name}: GKE has no {device.name}; it has {', '.join(GKE)}")
    accelerator, machines = GKE[device.name]
    count, chips = hosts(topology, each)
    shape, fitting = "", [n for n in machines if n >= chips]  # a pod may have some of a machine's GPUs
    if device.platform == "tpu":
        shape = "x".join(map(str, _gke_shape(topology)))
        fitting = [n for n in machines if n == chips and (count == 1 or n == 4)]
    if not fitting:
        raise ConfigError(f"{topology.name}: GKE has no {count} x {chips} chips of {device.name}; its machines are "
                          f"{', '.join(machines.values())}; TPU slices of several hosts have 4 chips a host")
    return Pool(accelerator, machines[min(fitting)], shape, count, chips)


def sky(topology: Topology) -> str:
    """SkyPilot's name of an accelerator: of a slice for TPUs, counted as Cloud sells it, of a chip for GPUs."""
    device = topology.device
    if device.name not in SKY:
        raise ConfigError(f"{topology.name}: SkyPilot has no {device.name}; it has {', '.join(SKY)}")
    if device.platform == "gpu":
        return SKY[device.name]
    if topology.slices > 1:
        raise ConfigError(f"{topology.name}: SkyPilot joins no slices: take one slice, or --launcher=jobset")
    count = math.prod(topology.shape) * device.cores
    usual = parse(f"{device.name}-{count}")
    if usual.shape != topology.shape:
        raise ConfigError(f"{topology.name}: SkyPilot has {usual.name} as {'x'.join(map(str, usual.shape))} only; take "
                          "that, or --launcher=jobset")
    return f"{SKY[device.name]}-{count}"


def _gke_shape(topology: Topology) -> tuple[int, ...]:
    """As GKE writes it: short sides first, but 2x2x1."""
    shape = tuple(sorted(topology.shape))
    shape = (2, 2, 1) if shape == (1, 2, 2) else shape
    if shape not in SQUARES + BLOCKS and (len(shape) == 2 or any(side % 4 for side in shape)):
        raise ConfigError(f"{topology.name}: GKE has no topology {'x'.join(map(str, shape))}; it has " + (
            ", ".join("x".join(map(str, known)) for known in (SQUARES if len(shape) == 2 else BLOCKS)))
            + ("" if len(shape) == 2 else " and sides that are multiples of 4"))
    return shape
