"""Many processes as one run: they join, go through the start together, and each reads only the rows its devices hold.

A process drives some of the devices of a machine: all of a TPU host's, one or all GPUs of a node. All run the same
program on the same config; process 0 also writes and speaks.
"""

import contextlib
import functools
import importlib.util
import itertools
import os
import re
import secrets
import sys
import threading
from pathlib import Path

import jax
import numpy as np
from jax._src import distributed  # its key-value store: no device takes part, so a wait may last for hours
from jax.sharding import NamedSharding

from lm_jax.config import ConfigError
from lm_jax.parallel import activation

FLAGS = {
    "coordinator": "host:port of process 0, where TPU, Slurm or Open MPI do not say it",
    "processes": "how many processes the run has; with --coordinator",
    "process": "number of this one, from 0; with --coordinator. Where several share a node, JAX_LOCAL_DEVICE_IDS=0,1 "
               "says which of its GPUs are this one's",
}
DETERMINISTIC = "--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0"  # no atomics, no choice by stopwatch
JOINING = 300  # seconds in which all processes must have come
LOST = 60  # seconds without a sign of life, or at the end without the others, after which a process is given up
WAITING = 7 * 86_400  # seconds for what one process does while others wait, such as preparing data
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")  # as srun sets them
NODE_GPUS = Path("/proc/driver/nvidia/gpus")  # a folder for each
_asked = itertools.count()  # exchanges so far: the same on all processes, which ask the same in the same order


def start(coordinator=None, processes=None, process=None, *, timeout: int = JOINING, deterministic: bool = False):
    """Join the run's other processes, before any device is touched, and keep compiled programs in ~/.cache/lm_jax.

    The flags are strings, or None where the cluster says it all; JAX_COMPILATION_CACHE_DIR puts programs elsewhere.
    `deterministic` forbids XLA what makes the last bits of two runs differ on GPUs.
    Raises ConfigError where the flags contradict each other, and where the others do not come within `timeout` seconds.
    Later, when one dies or fails alone, JAX ends the others within about `LOST` seconds.
    """
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/lm_jax/xla"))
    if deterministic:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC}".strip()  # read with the devices
    how = joining(os.environ, coordinator, processes, process)
    if how is None:
        return
    with _patience(how, timeout):
        jax.distributed.initialize(**how, initialization_timeout=2 * timeout, heartbeat_timeout_seconds=LOST,
                                   shutdown_timeout_seconds=LOST)
    if jax.process_count() > 1:
        say(f"{jax.process_count()} processes, {jax.device_count()} devices")


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


def say(line: str):
    """Print a line from process 0."""
    if jax.process_index() == 0:
        print(line, flush=True)


def together(work):
    """`work()` on process 0, then on all others at once: in a shared folder the first builds and the others find.

    What fails on one process ends all: each raises it, or says where it failed and why; none is left waiting. The
    `Failure`s of a start belong here, since later a process that ends alone leaves the others to JAX's heartbeat.
    """
    result, error, me = None, None, jax.process_index()
    for turn in ("first", "others"):
        if (turn == "first") == (me == 0):
            try:
                result = work()
            except Exception as e:
                error = e
        failures = exchange(f"start/{turn}", str(error) if error else "")
        if error:
            raise error
        for number, failure in enumerate(failures):
            if failure:
                raise ConfigError(f"process {number} cannot start: {failure}")
    return result


def same(**digests: str):
    """Raise ConfigError, on every process, unless all have the same digests: which names what each is a digest of."""
    for name, digest in digests.items():
        told = exchange(f"same/{name}", digest)
        if others := [f"{number} ({found})" for number, found in enumerate(told) if found != told[0]]:
            raise ConfigError(f"process {', '.join(others)} has another {name} than process 0 ({told[0]}): give all "
                              f"processes the same {name}")


def exchange(name: str, text: str) -> list[str]:
    """What each process has to say under a name; all ask in the same order, and go on when all have said it."""
    if jax.process_count() == 1:
        return [text]
    store, call = distributed.global_state.client, next(_asked)
    names = [f"lm_jax/{call}/{name}/{n}" for n in range(jax.process_count())]
    store.key_value_set(names[jax.process_index()], text)
    return [store.blocking_key_value_get(key, WAITING * 1000) for key in names]


def mark() -> str:
    """A word that this run's processes know and no other run's; empty for a process that is alone."""
    return exchange("mark", secrets.token_hex(8))[0] if jax.process_count() > 1 else ""


def rows_here(batch: int) -> np.ndarray:
    """Numbers, in order, of a batch's rows that this process's devices hold; hosts along `model` hold the same ones."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return np.arange(batch)
    sharding = NamedSharding(mesh, activation("BT", (batch, 1)))
    pieces = sharding.addressable_devices_indices_map((batch, 1)).values()
    return np.unique(np.concatenate([np.arange(*rows.indices(batch)) for rows, _ in pieces]))


def put_batch(batch, rows: int | None = None):
    """The `rows_here` of a batch of so many rows, as host arrays -> global arrays, laid out as activations are.

    Without `rows` the arrays are the whole batch, on every process.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jax.tree.map(jax.numpy.asarray, batch)

    def put(x):
        shape = (rows or x.shape[0], *x.shape[1:])
        sharding = NamedSharding(mesh, activation("BT", shape))
        places = _places(mesh, rows) if rows else range(len(x))

        def piece(index):
            start, stop, _ = index[0].indices(shape[0])
            return x[(slice(places[start], places[start] + stop - start), *index[1:])]

        return jax.make_array_from_callback(shape, sharding, piece)

    return jax.tree.map(put, batch)


@functools.lru_cache(maxsize=8)
def _places(mesh, batch: int) -> dict[int, int]:
    """Number of a batch's row -> its place among the rows here."""
    with jax.sharding.set_mesh(mesh):
        return {int(row): place for place, row in enumerate(rows_here(batch))}


@contextlib.contextmanager
def _patience(how, timeout):
    """Ends the process with code 2 and the cure after so many seconds, where JAX would abort it with a stack trace."""
    cure = ("start all of them, let each reach process 0 at its port, and give each a number of its own" if how else
            "a TPU host without a metadata server is alone with TPU_SKIP_MDS_QUERY=1")
    problem = f"the run's processes did not find each other in {timeout} s: {cure}"

    def end():
        print(f"error: {problem}", file=sys.stderr, flush=True)
        os._exit(ConfigError.code)

    clock = threading.Timer(timeout, end)
    clock.daemon = True
    clock.start()
    try:
        yield
    except (RuntimeError, ValueError, OSError) as e:
        raise ConfigError(f"{problem}. JAX said: {' '.join(str(e).split())[:200]}") from e
    finally:
        clock.cancel()


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
