"""The compiler's own word: a step compiled for a TPU topology, on a machine without any TPU."""

import importlib.util
import os
import re
import time
from dataclasses import dataclass

import jax

from lm_jax import parallel
from lm_jax.config import Config
from lm_jax.errors import ConfigError
from lm_jax.preflight import program
from lm_jax.preflight.topology import Topology

# What libtpu asks a real TPU machine for; any will do, as it only compiles.
MACHINE = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0",
           "TPU_ACCELERATOR_TYPE": "v5litepod-8", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of a step: `total` is its own peak of memory, in bytes a device, state and batch included,
    by which it takes or refuses a program; None where it refused, and `refusal` says why."""

    total: int | None
    seconds: float
    text: str = ""  # the program, whose collectives hlo.py reads
    refusal: str = ""


def compile(config: Config, topology: Topology) -> Compiled:
    """Compile the training step of `config` for `topology`; a minute or three, and 2 GB of memory.

    ConfigError without libtpu, for devices that are no TPUs, and for a mesh that the topology cannot be.
    """
    if topology.device.platform != "tpu":
        raise ConfigError(f"--compile for {topology.name}: only TPUs can be compiled for without having them")
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("--compile needs the TPU compiler (libtpu, 700 MB): pip install -e '.[tpu]', best in a "
                          "virtual environment of its own")
    os.environ.update(MACHINE)
    begun = time.time()
    mesh = parallel.make_mesh(config.mesh, _devices(topology))
    with jax.sharding.set_mesh(mesh):
        step = program.abstract(config, mesh)
        lowered = jax.jit(step.step, donate_argnums=0).trace(step.state, step.batch, step.key).lower(
            lowering_platforms=("tpu",))
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return Compiled(None, time.time() - begun, refusal=_first_line(error))
    return Compiled(compiled.memory_analysis().peak_memory_in_bytes, time.time() - begun, compiled.as_text())


def _devices(topology: Topology):
    from jax.experimental import topologies

    device, more = topology.device, {}
    if topology.slices > 1:
        more["num_slices"] = topology.slices
    if device.cores > device.per_chip:
        more["chip_config_name"] = "megacore"  # two cores as one device; of a v4 the compiler would make two
    return topologies.get_topology_desc(platform="tpu", topology_name=topology.jax_name, **more).devices


def _first_line(error: Exception) -> str:
    return re.sub(r"^RESOURCE_EXHAUSTED: ", "", str(error).splitlines()[0])
