"""How processes join: what each environment means, what wrong flags are told, which rows each process reads."""

import contextlib
import dataclasses
import os
import pathlib
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from lm_jax import cluster, hosts, parallel
from lm_jax.config import ConfigError, MeshConfig

ROOT = pathlib.Path(__file__).parent.parent
SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "4", "SLURM_PROCID": "3",
         "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911"}
CHIPS = {"TPU_ML_PLATFORM": "JAX"}  # what JAX notes of a machine with chips and libtpu


@pytest.mark.parametrize("env", [
    {},
    SLURM | {"SLURM_NTASKS": "1"},
    SLURM | {"SLURM_STEP_NUM_TASKS": "1"},  # a shell in an allocation of many
    {key: value for key, value in SLURM.items() if key != "SLURM_STEP_NODELIST"},  # salloc or sbatch, without srun
    OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"},
    CHIPS | {"TPU_WORKER_HOSTNAMES": "localhost"},
    CHIPS | {"TPU_SKIP_MDS_QUERY": "1"},
    CHIPS | {"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"},
])
def test_one_process_is_alone(env):
    assert cluster.joining(env) is None


@pytest.mark.parametrize("env", [
    CHIPS,  # Compute Engine, where the metadata server knows
    CHIPS | {"TPU_WORKER_HOSTNAMES": "a,b"},
    CHIPS | {"TPU_PROCESS_ADDRESSES": "a:1,b:1"},
    CHIPS | {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"},
])
def test_hosts_of_a_tpu_pod_ask_the_tpu(env):
    assert cluster.joining(env) == {}


def test_slurm_and_open_mpi_join_by_their_own_words():
    assert cluster.joining(SLURM)["cluster_detection_method"] == "slurm"
    assert cluster.joining(OPEN_MPI | SLURM)["cluster_detection_method"] == "ompi", "mpirun in an allocation of Slurm"
    newer = {key: value for key, value in OPEN_MPI.items() if key != "OMPI_MCA_orte_hnp_uri"}
    with pytest.raises(ConfigError, match="pip install mpi4py, or pass --coordinator"):
        cluster.joining(newer)


@pytest.mark.parametrize("more, gpus", [
    ({}, [4, 5, 6, 7]),  # as many as the node has
    ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, [2, 3]),
    ({"CUDA_VISIBLE_DEVICES": "5"}, []),  # bound by the launcher
    ({"CUDA_VISIBLE_DEVICES": ""}, []),
    ({"JAX_PLATFORMS": "cpu"}, []),
    ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_PER_TASK": "2"}, []),
    ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_STEP_TASKS_PER_NODE": "1(x4)"}, []),  # a process a node has them all
    ({"JAX_LOCAL_DEVICE_IDS": "3"}, None),
])
def test_processes_of_a_node_share_its_gpus(more, gpus, node):
    node(8)
    assert cluster.joining(SLURM | more)["local_device_ids"] == gpus


@pytest.fixture
def node(monkeypatch, tmp_path):
    """Makes this a node of so many NVIDIA GPUs."""
    monkeypatch.setattr(cluster, "NODE_GPUS", tmp_path / "gpus")

    def having(gpus):
        for number in range(gpus):
            (tmp_path / "gpus" / f"0000:{number:02}:00.0").mkdir(parents=True)

    return having


def test_of_gpus_that_cannot_be_counted_each_process_takes_one(node):
    node(0)
    assert cluster.joining(SLURM)["local_device_ids"] == [1]


@pytest.mark.parametrize("more, gpus", [
    ({}, 1), ({}, 3), ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_STEP_TASKS_PER_NODE": "4"}, 8),
])
def test_processes_that_cannot_share_the_gpus_evenly_name_the_cure(more, gpus, node):
    node(gpus)
    with pytest.raises(ConfigError, match="cannot share a node's . GPUs evenly: start as many on each node as divide"):
        cluster.joining(SLURM | more)


def test_flags_come_before_the_environment():
    how = cluster.joining(SLURM | OPEN_MPI, "node1:1234", "2", "1")
    assert (how["coordinator_address"], how["num_processes"], how["process_id"]) == ("node1:1234", 2, 1)
    assert how["cluster_detection_method"] == "deactivate"


@pytest.mark.parametrize("flags, said", [
    (("node1:1234", "2", None), "pass all three"),
    ((None, "2", "0"), "pass all three"),
    (("node1", "2", "0"), "as in host:1234"),
    (("node1:99999", "2", "0"), "as in host:1234"),
    (("node1:1234", "2", "2"), "numbered from 0"),
    (("node1:1234", "two", "0"), "numbered from 0"),
], ids=str)
def test_flags_that_are_wrong_name_the_cure(flags, said):
    with pytest.raises(ConfigError, match=said):
        cluster.joining({}, *flags)


JOIN = """
import sys
from lm_jax import errors, hosts, peers
def main(argv):
    print("joins", flush=True)
    hosts.start(*(argv[1:] or [None] * 3))
    me = hosts.jax.process_index()
    print(peers.exchange("hello", f"from {me}"))
    failures = (1, ZeroDivisionError("by zero")), (0, errors.DataError("damaged")), (1, OSError(28, "full"))
    for number, error in failures:
        def work():
            if me == number:
                raise error
        try:
            hosts.together(work)
        except Exception as e:
            print("together:", (errors.told(e) or (e, 1))[1], e)
    hosts.same(tokenizer="a", data="abc"[hosts.jax.process_index()])
errors.run(main)
"""


FULL = "[Errno 28] full: make room, and run the same command to go on from what was saved"


def launch(argv=(), **env):
    """A process that joins, says hello, fails alone, and disagrees."""
    return python(JOIN, argv, **env)


def python(code, argv, **env):
    env = os.environ | env | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", code, *argv], env=env, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize("cluster", ["slurm", "ompi"])
def test_what_one_process_meets_all_are_told(cluster):
    port = {"JAX_COORDINATOR_PORT": str(free_port())}
    environments = {
        "slurm": lambda i: SLURM | port | {"SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2",
                                           "SLURM_PROCID": i, "SLURM_LOCALID": i},
        "ompi": lambda i: OPEN_MPI | port | {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": i,
                                             "OMPI_COMM_WORLD_LOCAL_RANK": i}}
    running = [launch(**environments[cluster](i)) for i in "01"]
    outputs = [process.communicate(timeout=120) for process in running]
    for process, (out, err) in zip(running, outputs):
        assert "['from 0', 'from 1']" in out, err
        assert process.returncode == 2 and "process 1 (b) has another data than process 0 (a)" in err
    assert "2 processes, 4 devices" in outputs[0][0] and "2 processes" not in outputs[1][0], "one process speaks"
    said = [[line.partition(": ")[2] for line in out.splitlines() if line.startswith("together")] for out, _ in outputs]
    assert said[0] == ["1 process 1 cannot start: by zero", "77 damaged", f"74 process 1 cannot start: {FULL}"]
    assert said[1] == ["1 by zero", "77 process 0 cannot start: damaged", "74 [Errno 28] full"]


def test_a_process_whose_others_do_not_come_ends_in_time_and_says_so():
    first = launch([f"127.0.0.1:{free_port()}", "2", "0"], LM_JAX_JOINING="2")
    second = launch([f"127.0.0.1:{free_port()}", "2", "1"], LM_JAX_JOINING="2")
    for process in (first, second):
        out, err = process.communicate(timeout=60)
        assert process.returncode == 76 and "did not find each other in 2 s: start all of them" in err, err


def test_a_signal_while_they_join_ends_one_at_once_and_the_other_in_time():
    at = f"127.0.0.1:{free_port()}"
    first, second = (launch([at, "3", str(n)], LM_JAX_JOINING="6") for n in range(2))  # the third never comes
    for process in (first, second):
        assert process.stdout.readline() == "joins\n"
    second.send_signal(signal.SIGTERM)
    assert second.wait(timeout=60) == -signal.SIGTERM
    _, err = first.communicate(timeout=60)
    assert first.returncode == 76 and "did not find each other in 6 s" in err, err


@pytest.mark.parametrize("variable", ["LM_JAX_JOINING", "LM_JAX_LOST"])
def test_a_patience_that_is_no_number_is_told(variable, monkeypatch):
    monkeypatch.setenv(variable, "1m")
    with pytest.raises(ConfigError, match=f"{variable}='1m': a whole number of seconds"):
        hosts.start()


def test_rows_go_where_their_devices_are(rng):
    batch = {"tokens": rng.integers(0, 9, (8, 6)), "source": {"tokens": rng.integers(0, 9, (8, 4))}}
    for mesh in (None, MeshConfig(), MeshConfig(fsdp=2, model=2, sequence=2), MeshConfig(fsdp=4, data=2)):
        with jax.set_mesh(parallel.make_mesh(mesh)) if mesh else contextlib.nullcontext():
            np.testing.assert_array_equal(hosts.rows_here(8), np.arange(8))
            for put in (hosts.put_batch(batch), hosts.put_batch(batch, 8)):
                jax.tree.map(np.testing.assert_array_equal, put, batch)
                if mesh:
                    assert put["tokens"].sharding.spec == parallel.activation("BT", (8, 6))


@dataclasses.dataclass(frozen=True)
class Chip:
    """What of a device decides where it goes in a mesh."""

    id: int
    coords: tuple
    slice_index: int
    platform: str = "tpu"
    device_kind: str = "TPU v5"
    core_on_chip: int = 0
    process_index: int = 0


def pod(slices: int, *torus: int, **kind) -> list[Chip]:
    """The chips of equal slices."""
    places = [tuple(map(int, place)) for place in np.ndindex(*torus)]
    return [Chip(s * len(places) + i, place, s, **kind) for s in range(slices) for i, place in enumerate(places)]


def test_slices_lie_along_replica_and_a_torus_may_be_split():
    mesh = parallel.make_mesh(MeshConfig(replica=4, fsdp=-1, model=2), pod(2, 2, 2, 4))
    assert mesh.devices.shape == (4, 1, 4, 1, 1, 2)
    assert [{chip.slice_index for chip in copy.flat} for copy in mesh.devices] == [{0}, {0}, {1}, {1}]
    assert parallel.make_mesh(MeshConfig(fsdp=32, model=2), pod(1, 4, 4, 4)).devices.size == 64, "no axis is of 2"
    with pytest.raises(ConfigError, match="mesh.replica=1 over 2 TPU slices: set mesh.replica=2"):
        parallel.make_mesh(MeshConfig(), pod(2, 2, 2, 1))


def test_gpus_of_a_node_are_neighbours_along_the_last_axes():
    gpus = pod(4, 8, platform="gpu", device_kind="NVIDIA H100")  # a node is a slice to JAX
    mesh = parallel.make_mesh(MeshConfig(fsdp=4, model=8), gpus[::-1])
    assert [{gpu.slice_index for gpu in row.flat} for row in mesh.devices[0, 0]] == [{0}, {1}, {2}, {3}]
