"""Accelerators: what a chip computes, holds, moves and costs. One table, which the log's MFU and the preflight read.

A chip is what is counted and paid for; a JAX device is a chip, but half of one on TPU v2, v3 and 7x (`per_chip`).
Rates of links are one way, added up over the links of a chip. Prices change: `plan --prices=mine.json` overrides them.
"""

import contextlib
import glob
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

GIB = 2**30
STACKED = 2**24  # most parameters of runs trained side by side: beyond, one alone keeps a device busy


@dataclass(frozen=True)
class Device:
    """Facts of one chip, in FLOP/s, bytes, bytes/s and dollars an hour."""

    name: str  # as in --topology
    platform: str  # tpu | gpu
    kinds: tuple[str, ...]  # parts of the `device_kind` that JAX reports
    flops: float  # dense bfloat16 products
    flops32: float  # float32 products as JAX does them unasked: one bfloat16 pass on TPU, TF32 on GPU
    memory: float  # what a program may use, less than what is sold
    memory_rate: float
    link: float  # ICI, NVLink or PCIe
    torus: int  # dimensions of the ICI torus; 0 where a switch joins all
    domain: int  # most chips that `link` joins: a pod, or the GPUs of a host or rack
    network: float  # between domains: DCN or InfiniBand
    host: int  # chips
    dollars: float  # list price of a chip-hour on demand
    per_chip: int = 1  # JAX devices
    cores: int = 1  # TensorCores of a chip; v2 to v5p are sold by them
    tpu_name: str = ""  # of the topology that the TPU compiler knows
    compute: str = ""  # CUDA's compute capability, which says what cuDNN has: none on AMD

    @property
    def usable(self) -> float:
        """Bytes for programs: of a GPU JAX takes three quarters, or what XLA_PYTHON_CLIENT_MEM_FRACTION says."""
        share = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", 0.75)) if self.platform == "gpu" else 1.0
        return self.memory * share


def _tpu(name, kinds, flops, memory, memory_rate, link, torus, domain, network, dollars, *, host=4, **more):
    return Device(name, "tpu", kinds, flops * 1e12, flops * 1e12, memory * GIB, memory_rate * 1e9, link * 1e9, torus,
                  domain, network / 8 * 1e9, host, dollars, tpu_name=more.pop("tpu_name", name), **more)


def _gpu(name, kinds, compute, flops, memory, memory_rate, link, domain, network, dollars, *, host=8):
    return Device(name, "gpu", kinds, flops * 1e12, flops / 2 * 1e12, memory * GIB, memory_rate * 1e9, link * 1e9, 0,
                  domain, network / 8 * 1e9, host, dollars, compute=compute)


# TPU: cloud.google.com/tpu/docs, a page a generation, read 2026-11 (ICI is half of the bidirectional rate there; DCN in
# Gbit/s a chip; of v2 to v4 also Jouppi et al. 2020 and 2023). Memory is what the TPU compiler allows (libtpu 0.0.42).
# Dollars: cloud.google.com/tpu/pricing, on demand, us-central or where offered, as of 2025; TPU7x's is the least sure.
# GPU: Nvidia's and AMD's data sheets, dense; memory as nvidia-smi shows it; network a GPU of the usual cluster
# (InfiniBand HDR and NDR). Dollars: coreweave.com/pricing of 2025, one eighth of a node; L4 Google, A100-40 and H100
# PCIe Lambda, NVL Azure, MI300X Oracle.
TABLE = (
    #    name    device kinds             TFLOP/s  GiB   GB/s  ICI  dims  pod  Gb/s  $/h
    _tpu("v2", ("TPU v2",), 45, 15, 700, 248, 2, 256, 25, 1.13, per_chip=2, cores=2),
    _tpu("v3", ("TPU v3",), 123, 30.96, 900, 328, 2, 1024, 25, 2.00, per_chip=2, cores=2),
    _tpu("v4", ("TPU v4",), 275, 30.5, 1228, 300, 3, 4096, 50, 3.22, cores=2),
    _tpu("v5e", ("TPU v5 lite", "TPU v5e"), 197, 15.75, 819, 200, 2, 256, 25, 1.20),
    _tpu("v5p", ("TPU v5", "TPU v5p"), 459, 95.74, 2765, 600, 3, 8960, 50, 4.20, cores=2),
    _tpu("v6e", ("TPU v6 lite", "TPU v6e"), 918, 31.25, 1638, 400, 2, 256, 100, 2.70),
    _tpu("v7x", ("TPU7", "TPU7x"), 2307, 189.5, 7380, 600, 3, 9216, 100, 12.00, per_chip=2, tpu_name="tpu7x"),
    #    name     device kinds  CUDA  TFLOP/s  GiB  GB/s  NVLink  domain  Gb/s  $/h
    _gpu("a100-40", ("A100-SXM4-40GB", "A100-PCIE-40GB"), "8.0", 312, 39.4, 1555, 300, 8, 200, 1.29),
    _gpu("a100", ("A100",), "8.0", 312, 79.2, 2039, 300, 8, 200, 2.70),
    _gpu("l4", ("L4",), "8.9", 121, 22.0, 300, 32, 8, 12.5, 0.71),
    _gpu("l40s", ("L40S",), "8.9", 362, 44.4, 864, 32, 8, 50, 2.25),
    _gpu("h100", ("H100",), "9.0", 989, 79.1, 3350, 450, 8, 400, 6.16),
    _gpu("h100-pcie", ("H100 PCIe",), "9.0", 756, 79.1, 2039, 64, 8, 50, 2.49),
    _gpu("h100-nvl", ("H100 NVL",), "9.0", 835, 93.1, 3938, 300, 2, 50, 6.98, host=2),
    _gpu("h200", ("H200",), "9.0", 989, 139.8, 4800, 450, 8, 400, 6.31),
    _gpu("h200-nvl", ("H200 NVL",), "9.0", 835, 139.8, 4800, 450, 4, 50, 6.31, host=4),
    _gpu("gh200", ("GH200",), "9.0", 989, 95.0, 4000, 450, 1, 400, 6.50, host=1),
    _gpu("b200", ("B200",), "10.0", 2250, 178.4, 8000, 900, 8, 400, 8.60),
    _gpu("gb200", ("GB200",), "10.0", 2500, 184.3, 8000, 900, 72, 400, 10.50, host=4),
    _gpu("mi300x", ("MI300X",), "", 1307, 191.7, 5300, 448, 8, 400, 6.00),
)
DEVICES = {device.name: device for device in TABLE}
UNKNOWN = ("MIG", "TPU v4 lite")  # in a kind: a part of a device, and one that cannot be rented


def peak_flops(kind: str) -> float | None:
    """Peak in bfloat16 of one JAX device of this kind, FLOP/s; None if it is not in the table: no MFU beats a guess."""
    device = None if any(name in kind for name in UNKNOWN) else of_kind(kind)
    return device and device.flops / device.per_chip


def of_kind(kind: str) -> Device | None:
    """The row whose name is the longest part of JAX's `device_kind`."""
    found = [(len(part), device) for device in TABLE for part in device.kinds if re.search(rf"\b{part}\b", kind)]
    return max(found, key=lambda pair: pair[0])[1] if found else None


def cpu(kind: str, memory: float) -> Device:
    """A CPU device that may use so many bytes; nothing else of it is known."""
    return Device("cpu", "cpu", (kind,), 1e11, 1e11, memory, 1e10, 1e10, 0, 1, 1e9, 1, 0.0)


def host_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may use: of the machine, of its control group and of those around it, of its limits.

    `root` is where the system's files are. Swap is not counted.
    """
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_rlimits()]
    for folder in _groups(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with contextlib.suppress(OSError, ValueError):  # "max" is none
                found.append(int((folder / name).read_text()))
    return min(found)


def cores(root: Path = Path("/"), env: Mapping[str, str] = os.environ) -> int:
    """Those that this process may use: by its affinity, by its control group's quota and those around it, a part of a
    core being one, and by NPROC, which XLA's threads on a CPU obey too."""
    found = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    found += [int(env["NPROC"])] if env.get("NPROC", "").isdecimal() else []
    for folder in _groups(root, "cpu"):
        for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
            with contextlib.suppress(OSError, ValueError):  # "max" is none, and so is -1
                quota, period = map(int, " ".join((folder / name).read_text() for name in names).split())
                found.append(-(-quota // period))
    return min(count for count in found if count > 0)


def accelerators(env: Mapping[str, str] = os.environ) -> tuple[str, list[str]]:
    """("gpu" or "tpu" or "cpu", ids): this machine's, from the environment's choice or the device files, without JAX.
    """
    if env.get("JAX_PLATFORMS") == "cpu":
        return "cpu", []
    for kind, name, patterns in (("gpu", "CUDA_VISIBLE_DEVICES", ("/dev/nvidia[0-9]*",)),
                                 ("tpu", "TPU_VISIBLE_CHIPS", ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*"))):
        files = [file for pattern in patterns for file in glob.glob(pattern)]
        found = env[name].split(",") if name in env else sorted((re.sub(r"\D", "", file) for file in files), key=int)
        if found := [device.strip() for device in found if device.strip() not in ("", "-1")]:
            return kind, found
    return "cpu", []


def priced(device: Device, prices: dict[str, float]) -> Device:
    """The device at a price of the user's, if there is one for it."""
    return replace(device, dollars=prices.get(device.name, device.dollars))


def _groups(root: Path, controller: str) -> list[Path]:
    """Folders of this process's control group and of those around it, in version 2 and of a controller in version 1;
    where the system has none, there are no such folders."""
    group = "/"
    with contextlib.suppress(OSError):
        lines = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
        group = next((path for _, names, path in lines if not names or controller in names.split(",")), "/")
    inside = Path(group.lstrip("/"))  # of a container the group may be named as its host sees it
    tops = root / "sys/fs/cgroup", root / "sys/fs/cgroup" / controller
    return [top / folder for top in tops for folder in (inside, *inside.parents)]


def _rlimits() -> list[int]:
    """What the shell's `ulimit` allows of address space and data, where it does not allow all."""
    import resource

    kinds = (resource.RLIMIT_AS, resource.RLIMIT_DATA)
    return [soft for soft, _ in map(resource.getrlimit, kinds) if soft != resource.RLIM_INFINITY]
