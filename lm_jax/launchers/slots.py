"""This machine's accelerators, divided among processes before any of them starts; JAX is not asked, it would take all.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from lm_jax.devices import accelerators, cores
from lm_jax.errors import ConfigError

# Chips of one host that a process may have, as libtpu wants their bounds.
TPU_BOUNDS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1", 8: "2,4,1"}


@dataclass(frozen=True)
class Slot:
    """Devices that one process has at a time: their names, and the environment that shows it no others."""

    names: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)


def slots(jobs: int = 0, env: Mapping[str, str] = os.environ) -> list[Slot]:
    """Places for so many processes at once; 0 is one for each accelerator, and one where there is none.

    A CPU's cores are divided too, or each process would begin as many threads as there are cores. ConfigError where
    accelerators cannot be divided so.
    """
    kind, devices = accelerators(env)
    if not devices:
        share = {"NPROC": str(max(1, cores(env=env) // jobs))} if jobs > 1 else {}
        return [Slot((f"cpu{i}",), share) for i in range(max(jobs, 1))]
    jobs = jobs or len(devices)
    if len(devices) % jobs:
        raise ConfigError(f"--jobs={jobs} over {len(devices)} {kind}s: use a divisor, every process takes devices of "
                          "its own")
    each = len(devices) // jobs
    if kind == "tpu" and each not in TPU_BOUNDS:
        raise ConfigError(f"--jobs={jobs} over {len(devices)} TPU chips: a process may have "
                          f"{', '.join(map(str, TPU_BOUNDS))}")
    parts = [tuple(devices[i:i + each]) for i in range(0, len(devices), each)]
    shown = _gpus if kind == "gpu" else _chips
    return [Slot(tuple(f"{kind}{device}" for device in part), shown(part) if jobs > 1 else {}) for part in parts]


def _gpus(part) -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": ",".join(part)}


def _chips(part) -> dict[str, str]:
    return {"TPU_VISIBLE_CHIPS": ",".join(part), "TPU_CHIPS_PER_PROCESS_BOUNDS": TPU_BOUNDS[len(part)],
            "TPU_PROCESS_BOUNDS": "1,1,1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
