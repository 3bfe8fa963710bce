"""How the processes of a run find each other: by flags, or as Open MPI, Slurm or a Cloud TPU says."""

import importlib.util
import re
from pathlib import Path

from lm_jax.errors import ConfigError

FLAGS = {
    "coordinator": "host:port of process 0, where TPU, Slurm or Open MPI do not say it",
    "processes": "how many processes the run has; with --coordinator",
    "process": "number of this one, from 0; with --coordinator. Where several share a node, JAX_LOCAL_DEVICE_IDS=0,1 "
               "says which of its GPUs are this one's",
}
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")  # as srun sets them
NODE_GPUS = Path("/proc/driver/nvidia/gpus")  # a folder for each


def joining(env, coordinator=None, processes=None, process=None) -> dict | None:
    """How to join, as arguments of jax.distributed.initialize; None for a process that is alone.

    Flags come first, then Open MPI (mpirun), Slurm (srun), Cloud TPU. One task of Slurm or Open MPI, and a script or
    shell in an allocation of many, are alone.
    """
    if {coordinator, processes, process} != {None}:
        return _flags(coordinator, processes, process)
    if int(env.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        on_node = env.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1")
        return {"cluster_detection_method": _open_mpi(env),
                "local_device_ids": _gpus(env, "OMPI_COMM_WORLD_LOCAL_RANK", on_node)}
    tasks = int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", 1)))
    if tasks > 1 and all(key in env for key in SLURM):
        on_nodes = env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_TASKS_PER_NODE", "1"))
        return {"cluster_detection_method": "slurm", "num_processes": tasks,
                "local_device_ids": _gpus(env, "SLURM_LOCALID", on_nodes)}
    return {} if _is_pod(env) else None  # JAX asks the TPU's own environment, and on Compute Engine its metadata server


def _flags(coordinator, processes, process) -> dict:
    """The flags as arguments, or a ConfigError that says what is wrong with them."""
    given = f"--coordinator={coordinator} --processes={processes} --process={process}"
    if None in (coordinator, processes, process):
        raise ConfigError(f"{given}: pass all three, as in --coordinator=host:1234 --processes=4 --process=0, or none")
    port = re.fullmatch(r".+:(\d+)", coordinator)
    if not port or not 0 < int(port[1]) < 2**16:
        raise ConfigError(f"--coordinator={coordinator}: the address of process 0 and a free port of its machine, as "
                          "in host:1234")
    if not (processes.isdecimal() and process.isdecimal() and int(process) < int(processes)):
        raise ConfigError(f"--processes={processes} --process={process}: so many, numbered from 0 to one less")
    return {"coordinator_address": coordinator, "num_processes": int(processes), "process_id": int(process),
            "cluster_detection_method": "deactivate"}


def _open_mpi(env) -> str:
    """JAX's way to ask it; from version 5 on Open MPI tells processes no address, and mpi4py must send one around."""
    if "OMPI_MCA_orte_hnp_uri" in env:
        return "ompi"
    if importlib.util.find_spec("mpi4py") is None:
        raise ConfigError("this Open MPI (5 or later) does not say where process 0 is: pip install mpi4py, or pass "
                          "--coordinator=host:1234 --processes=$OMPI_COMM_WORLD_SIZE --process=$OMPI_COMM_WORLD_RANK")
    return "mpi4py"


def _gpus(env, local: str, tasks: str) -> list[int] | None:
    """Which of the GPUs it sees are a process's, of `tasks` on its node ("8", "8(x2),4"): an even share of them.

    None leaves it to JAX_LOCAL_DEVICE_IDS; [] is all, for the only process of a node and where the launcher has shared
    them out. Where none can be counted (AMD's cannot) each process takes one.
    """
    if "JAX_LOCAL_DEVICE_IDS" in env:
        return None
    most = max(int(part.split("(")[0]) for part in tasks.split(","))
    visible = env.get("CUDA_VISIBLE_DEVICES")
    shared = "SLURM_GPUS_PER_TASK" in env or visible is not None and "," not in visible
    if most == 1 or shared or env.get("JAX_PLATFORMS") == "cpu":
        return []
    count = visible.count(",") + 1 if visible else _count(NODE_GPUS) or most
    if count % most:
        raise ConfigError(f"{most} processes cannot share a node's {count} GPUs evenly: start as many on each node as "
                          "divide them, or tell each in JAX_LOCAL_DEVICE_IDS=0,1 which of those it sees are its own")
    here, each = int(env[local]), count // most
    return list(range(here * each, (here + 1) * each))


def _count(folder: Path) -> int:
    """How many files and folders are in one; 0 if it is not there."""
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def _is_pod(env) -> bool:
    """Whether this is a host of a TPU slice of several hosts, of several slices, or one whose metadata must say."""
    if "tpu" not in env.get("JAX_PLATFORMS", "tpu"):
        return False
    hosts = env.get("TPU_PROCESS_ADDRESSES", env.get("TPU_WORKER_HOSTNAMES"))
    if hosts is None:  # JAX sets the first of these where it finds chips and libtpu, the second where it finds no chip
        return "TPU_ML_PLATFORM" in env and "TPU_SKIP_MDS_QUERY" not in env
    return "," in hosts or int(env.get("MEGASCALE_NUM_SLICES", 1)) > 1
