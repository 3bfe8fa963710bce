"""Many processes as one run: they join, go through the start together, and each reads only the rows its devices hold.

A process drives some of the devices of a machine: all of a TPU host's, one or all GPUs of a node. All run the same
program on the same config; process 0 also writes and speaks.
"""

import contextlib
import functools
import json
import os
import secrets
import sys
import threading

import jax
import numpy as np
from jax.sharding import NamedSharding

from lm_jax import cluster, errors
from lm_jax.errors import ConfigError, Failure
from lm_jax.parallel import activation
from lm_jax.peers import BRIEF, LostError, exchange, told

BRIEFEST = "jax_persistent_cache_min_compile_time_secs"
DETERMINISTIC = "--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0"  # no atomics, no choice by stopwatch
# Seconds in which all processes must have come: images are pulled and nodes booted at different speeds.
JOINING = "LM_JAX_JOINING", 300
# Seconds without a sign of life, or at the end without the others, after which a process is given up. A host that is
# moved, swaps or has lost its network for less is waited for, which costs less than a restart of all.
LOST = "LM_JAX_LOST", 60


def start(coordinator=None, processes=None, process=None, *, deterministic: bool = False):
    """Join the run's other processes, before any device is touched, and keep compiled programs in ~/.cache/lm_jax.

    The flags are strings, or None where the cluster says it all; JAX_COMPILATION_CACHE_DIR puts programs elsewhere.
    `deterministic` forbids XLA what makes the last bits of two runs differ on GPUs.
    Raises ConfigError where the flags contradict each other; ends with code 76 where the others do not come in
    LM_JAX_JOINING seconds. Later, when one dies, JAX ends the others within about LM_JAX_LOST seconds.
    """
    timeout, lost = _seconds(*JOINING), _seconds(*LOST)
    keep_programs()
    if deterministic:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC}".strip()  # read with the devices
    how = cluster.joining(os.environ, coordinator, processes, process)
    if how is None:
        return
    jax.config.update("jax_enable_preemption_service", False)  # it swallows SIGTERM, which lm_jax.signals hears
    with _patience(how, timeout):
        jax.distributed.initialize(**how, initialization_timeout=2 * timeout, heartbeat_timeout_seconds=lost,
                                   shutdown_timeout_seconds=lost)
    if jax.process_count() > 1:
        say(f"{jax.process_count()} processes, {jax.device_count()} devices")


def keep_programs():
    """Keep what is compiled in ~/.cache/lm_jax/xla, for later starts to read, unless JAX's own variables say otherwise.

    JAX leaves out what compiled in less than a second, of which a start has a dozen: they took 0.3 s of it, each time.
    JAX's bound on their size, jax_compilation_cache_max_size, is not set: under it (0.10) one program without a file of
    its last use, as a killed process or a time without the bound leaves it, keeps all others from being written, and
    each that is written has all those files read, 0.2 s of 3,000.
    """
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/lm_jax/xla"))
    if BRIEFEST.upper() not in os.environ:
        jax.config.update(BRIEFEST, 0.0)


def say(line: str):
    """Print a line from process 0."""
    if jax.process_index() == 0:
        print(line, flush=True)


def together(work, name: str = "start", *, limit: float = BRIEF):
    """`work()` on process 0, then on all others at once: in a shared folder the first builds and the others find.

    What fails on one process ends all: it raises that, the others a Failure of the same exit code, which says where it
    failed and why; none is left waiting. Either turn has so many seconds, and a `name` for the error that comes after
    them.
    """
    result, error, me = None, None, jax.process_index()
    for turn in ("first", "others"):
        if (turn == "first") == (me == 0):
            try:
                result = work()
            except Exception as e:
                error = e
        ends = exchange(f"{name}/{turn}", json.dumps(error and (errors.told(error) or (str(error), 1))), limit=limit)
        if error:
            raise error
        for number, end in enumerate(map(json.loads, ends)):
            if end:
                raise _elsewhere(number, *end)
    return result


def same(**digests: str):
    """Raise ConfigError, on every process, unless all have the same digests: which names what each is a digest of."""
    for name, digest in digests.items():
        found = exchange(f"same/{name}", digest)
        if others := [f"{number} ({other})" for number, other in enumerate(found) if other != found[0]]:
            raise ConfigError(f"process {', '.join(others)} has another {name} than process 0 ({found[0]}): give all "
                              f"processes the same {name}")


def mark() -> str:
    """A word that this run's processes know and no other run's; empty for a process that is alone."""
    return told("mark", secrets.token_hex(8)) if jax.process_count() > 1 else ""


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


def _elsewhere(number: int, message: str, code: int) -> Failure:
    """What a process has failed of, for another one, which ends with its code."""
    failure = Failure(f"process {number} cannot start: {message}")
    failure.code = code
    return failure


@functools.lru_cache(maxsize=8)
def _places(mesh, batch: int) -> dict[int, int]:
    """Number of a batch's row -> its place among the rows here."""
    with jax.sharding.set_mesh(mesh):
        return {int(row): place for place, row in enumerate(rows_here(batch))}


@contextlib.contextmanager
def _patience(how, timeout):
    """Ends the process with the cure after so many seconds, where JAX would abort it with a stack trace."""
    cure = ("start all of them, let each reach process 0 at its port, and give each a number of its own" if how else
            "a TPU host without a metadata server is alone with TPU_SKIP_MDS_QUERY=1")
    problem = f"the run's processes did not find each other in {timeout} s: {cure}"

    def end():
        print(f"error: {problem}", file=sys.stderr, flush=True)
        os._exit(LostError.code)

    clock = threading.Timer(timeout, end)
    clock.daemon = True
    clock.start()
    try:
        yield
    except (RuntimeError, ValueError, OSError) as e:
        kind = LostError if isinstance(e, jax.errors.JaxRuntimeError) else ConfigError
        raise kind(f"{problem}. JAX said: {' '.join(str(e).split())[:200]}") from e
    finally:
        clock.cancel()


def _seconds(variable: str, default: int) -> int:
    """What a variable of the environment says; ConfigError for what is no number of seconds."""
    text = os.environ.get(variable, str(default))
    if not text.isdecimal() or not int(text):
        raise ConfigError(f"{variable}={text!r}: a whole number of seconds, {default} unless said")
    return int(text)
