"""What becomes of a run when one of its processes is killed, stopped, cut off, told to end, fails, is late or hangs."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest
from test_hosts import free_port, python

from lm_jax import peers

# A process that joins, computes with the others, says so, and then does something.
BEGIN = """
import sys, time, jax, numpy as np
from lm_jax import clock, errors, hosts, parallel, peers, signals
from lm_jax.config import MeshConfig
def main(argv):
    hosts.start(*argv[1:4])
    me, folder = int(argv[3]), argv[4]
    with signals.ending(), clock.Clock() as timer, jax.set_mesh(parallel.make_mesh(MeshConfig())):
        x = hosts.put_batch({{"x": np.ones((8, 4), np.float32)}})["x"]
        total = jax.jit(lambda x: x.sum())
        together = lambda: jax.device_get(total(x))
        together()
        print("here", flush=True)
        {what}
errors.run(main)
"""
WORK = "while True: together()"


@pytest.fixture
def launch(tmp_path):
    """Starts so many processes, whose heartbeats are missed after 10 s, and returns when they are at work."""
    running = []

    def start(processes: int, what: str = WORK):
        port = free_port()
        running.extend(python(BEGIN.format(what=what), [f"127.0.0.1:{port}", str(processes), str(n), str(tmp_path)],
                              LM_JAX_LOST="10") for n in range(processes))
        for process in running:
            next(line for line in process.stdout if line == "here\n")
        return running

    yield start
    for process in running:
        process.kill()
        process.wait()


def ended(processes) -> tuple[list[int], list[str]]:
    """Exit codes, and what was said of errors."""
    said = [process.communicate(timeout=60)[1] for process in processes]
    return [process.returncode for process in processes], said


@pytest.mark.parametrize("processes, victim, how", [(4, 2, signal.SIGKILL), (2, 0, signal.SIGKILL),
                                                    (2, 1, signal.SIGSTOP)])
def test_when_one_is_gone_the_others_end_and_say_which(launch, processes, victim, how):
    running = launch(processes)
    running[victim].send_signal(how)
    codes, said = ended([process for n, process in enumerate(running) if n != victim])
    assert 0 not in codes, said
    for text in said:
        named = f"process {victim} does not answer" in text or f"stopped sending heartbeats):\n{victim}\n" in text
        assert named or victim == 0 and "leader" in text, text


def test_a_signal_to_one_ends_all_in_the_midst_of_their_work(launch):
    running = launch(2)
    running[1].send_signal(signal.SIGTERM)
    codes, said = ended(running)
    assert codes == [75, 75] and all("stopped by SIGTERM to process 1" in text for text in said), said


def test_what_one_fails_of_ends_all_with_its_code(launch):
    running = launch(2, f"if me: raise errors.DataError('shard 3 is damaged')\n        {WORK}")
    codes, said = ended(running)
    assert codes == [77, 77], said
    assert "process 1 ends with code 77: shard 3 is damaged" in said[0] and "error: shard 3" in said[1]


def test_who_does_not_come_is_named_and_shows_where_it_is(launch):
    running = launch(2, "if me: time.sleep(60)\n        peers.exchange('restored', '', limit=3.0)")
    codes, said = ended(running)
    assert codes == [76, 76], said
    assert "process 1 did not come to 'restored' in 3 s" in said[0]
    assert "in main" in said[1] and "did not come to 'restored'" in said[1]


HANGS = """timer.watch(__import__("pathlib").Path(folder), writes=not me, patience=1.0)
        clock.LEAST, clock.TICK = 1.0, 0.1
        with timer.phase("step"):
            for _ in range(3):
                together()
                timer.step()
            if me:
                with timer.phase("save"):
                    time.sleep(4)
            together()
            print("no false alarm", flush=True)
            if me:
                with timer.phase("wait"):
                    stuck()
            together()
def stuck():
    time.sleep(600)"""


def test_one_that_hangs_ends_all_with_stacks_and_one_that_is_busy_ends_none(launch, tmp_path):
    """A step may last a second, a save longer: who waits for another's save does not hang."""
    running = launch(2, HANGS)
    codes, said = ended(running)
    assert codes == [76, 76], said
    assert "in phase 'step', process 1 in 'wait'" in said[0] and "in phase 'wait', process 0 in 'step'" in said[1]
    assert "in stuck" in said[1] and "in main" in said[0]
    assert "in phase 'step'" in (tmp_path / "stacks.txt").read_text()


ASKS = """
import sys
from lm_jax import errors, hosts, peers
def main(argv):
    hosts.start(*argv[1:4])
    me, asked, get, peers.PAGE = int(argv[3]), [], peers.get, 8
    def seen(*what):
        asked.append(what)
        return get(*what)
    peers.get = seen
    assert peers.exchange("numbers", str(me)) == ["0", "1", "2", "3"] and (len(asked) == 1 or not me), asked
    if me:
        assert get("process 0 went on", 60.0) == "yes"
    assert peers.told("number", [me], limit=60.0) == [0] and (len(asked) == 2 or not me), asked
    if not me:
        peers.put("process 0 went on", "yes")
    for n in range(100):
        assert peers.told("number", n if not me else None) == n
    peers.exchange("end", "")
    left = [key for key, _ in peers._store().key_value_dir_get("lm_jax/asked/")]
    assert len(left) < 2 * 8 * 5, left
    print("well", flush=True)
    peers.exchange("end", "")
errors.run(main)
"""


def test_a_question_costs_each_process_one_look_and_leaves_nothing_behind():
    at = f"127.0.0.1:{free_port()}"
    running = [python(ASKS, [at, "4", str(n)]) for n in range(4)]
    try:
        for process in running:
            out, said = process.communicate(timeout=120)
            assert (process.returncode, out.splitlines()[-1:]) == (0, ["well"]), said
    finally:
        for process in running:
            process.kill()


def test_a_process_alone_hears_only_itself():
    assert peers.count() == 1 and peers.number() == 0
    assert peers.exchange("anything", "word", limit=0.0) == ["word"]
    assert peers.told("anything", (3, None), limit=0.0) == [3, None], "as JSON has it"


NETWORK = """
set -e
ip netns add {a}; ip netns add {b}
ip link add {a} netns {a} type veth peer name {b} netns {b}
ip -n {a} addr add 10.77.0.1/24 dev {a}; ip -n {a} link set {a} up; ip -n {a} link set lo up
ip -n {b} addr add 10.77.0.2/24 dev {b}; ip -n {b} link set {b} up; ip -n {b} link set lo up
"""
WAIT = """
import sys, threading
from lm_jax import errors, hosts, peers, signals
def main(argv):
    hosts.start(*argv[1:4])
    with signals.ending():
        peers.put(f"here/{argv[3]}", "")
        assert peers.get(f"here/{1 - int(argv[3])}", 60.0) is not None
        print("here", flush=True)
        peers.exchange("for long", "", limit=600.0) if argv[3] == "0" else threading.Event().wait()
errors.run(main)
"""


@pytest.fixture
def network():
    """Names of two network namespaces with a cable between them."""
    a, b = (f"lmjax{side}{os.getpid()}" for side in "ab")
    if os.geteuid() or subprocess.run(["sh", "-c", NETWORK.format(a=a, b=b)], capture_output=True).returncode:
        pytest.skip("no network namespaces can be made here")
    yield a, b
    for name in (a, b):
        subprocess.run(["ip", "netns", "del", name])


def test_where_the_network_is_cut_both_sides_end(network):
    root = pathlib.Path(__file__).parent.parent
    env = os.environ | {"LM_JAX_LOST": "10", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", WAIT, "10.77.0.1:1234", "2"]
    running = [subprocess.Popen(["ip", "netns", "exec", name, *command, str(n)], env=env, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE) for n, name in enumerate(network)]
    try:
        for process in running:
            assert next((line for line in process.stdout if line == "here\n"), None), process.communicate()[1]
        subprocess.run(["ip", "-n", network[0], "link", "set", network[0], "down"], check=True)
        codes, said = ended(running)
    finally:
        for process in running:
            process.kill()
    assert 0 not in codes, said
    assert "heartbeat" in "".join(said).lower(), said
