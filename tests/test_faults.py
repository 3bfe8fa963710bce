"""Faults strike where and when they are told to, and nowhere else: the torture of the other tests is real."""

import ast
import os
import pathlib
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lm_jax import faults
from lm_jax.clock import Clock
from lm_jax.errors import ConfigError, Failure

ROOT = pathlib.Path(__file__).parent.parent
REACH = """
import sys
from lm_jax import errors, faults
def main(argv):
    for number in range(1, 4):
        faults.reach(argv[1])
        print(number, flush=True)
errors.run(main)
"""


@pytest.fixture
def planned(monkeypatch):
    """Sets the variable, from which on nothing has happened yet."""
    faults._schedule.cache_clear()
    yield lambda text: (monkeypatch.setenv(faults.VARIABLE, text), faults._schedule.cache_clear())
    faults._schedule.cache_clear()


def test_without_the_variable_nothing_happens(monkeypatch):
    monkeypatch.delenv(faults.VARIABLE, raising=False)
    grads = {"w": jnp.ones(3)}
    faults.reach("step", 1)
    assert faults.planned() is None and faults.poisoned(grads, 1) is grads and faults.struck(grads, 1) is grads


@pytest.mark.parametrize("text, told", [
    ("kil@step=3", "no kind 'kil': did you mean kill?"), ("kill@stpe=3", "no place 'stpe': did you mean step?"),
    ("kill@step=x", "'x' is no whole number of at least 1"), ("kill@step=0", "'0' is no whole number of at least 1"),
    ("kill@step=9..3", "'3' is no whole number of at least 9"), ("kill", "it names no place"),
    ("stall@wait=1:second=4", "no option 'second': did you mean seconds?"),
    ("stall@wait=1:seconds=nan", "'nan' is no number of at least 0"), ("nan@save=1", "no place 'save': there are step"),
    ("kill@step=3,", "'': it names no place"), ("kill@step=3:process=one", "'one' is no whole number of at least 0")])
def test_a_variable_that_says_no_fault_is_refused_with_the_nearest_and_the_grammar(planned, text, told):
    planned(text)
    with pytest.raises(ConfigError) as refused:
        faults.planned()
    assert told in str(refused.value) and "KIND@PLACE=TIME" in str(refused.value) and refused.value.code == 2


def test_training_does_not_begin_with_a_fault_that_cannot_be(tmp_path):
    argv = [sys.executable, "-m", "lm_jax.train", "--config=configs/tiny.py", f"--workdir={tmp_path}/run"]
    found = subprocess.run(argv, env=os.environ | {faults.VARIABLE: "kill@stp=3"}, text=True, capture_output=True,
                           timeout=120, cwd=ROOT)
    assert found.returncode == 2 and "did you mean step?" in found.stderr and not (tmp_path / "run").exists()


@pytest.mark.parametrize("text, code, reached", [
    ("kill@wait=2", -signal.SIGKILL, 1), ("term@wait=3", -signal.SIGTERM, 2), ("segv@wait", -signal.SIGSEGV, 0),
    ("exit@wait=2:code=76", 76, 1), ("enospc@wait=2", 74, 1), ("error@wait=2", 1, 1), ("oom@wait=2", 2, 1),
    ("kill@wait=2..2:seed=5,kill@save=1", -signal.SIGKILL, 1), ("stall@wait=2:seconds=0.1", 0, 3),
    ("kill@wait=4,kill@step=1", 0, 3), ("kill@wait=2:process=1", 0, 3)])
def test_each_kind_strikes_a_process_at_its_time(text, code, reached):
    found = subprocess.run([sys.executable, "-c", REACH, "wait"], env=os.environ | {faults.VARIABLE: text}, text=True,
                           capture_output=True, timeout=60, cwd=ROOT)
    assert (found.returncode, len(found.stdout.split())) == (code, reached), found.stderr
    assert ("fault: " in found.stderr) == (code != 0 or "stall" in text)


def test_a_hang_is_ended_by_nothing_but_a_signal():
    process = subprocess.Popen([sys.executable, "-c", REACH, "save"], env=os.environ | {faults.VARIABLE: "hang@save=2"},
                               text=True, stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout.readline() == "1\n"
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    process.kill()
    assert process.communicate()[0] == ""


def test_a_fault_happens_once_and_steps_are_told_by_their_number(planned):
    planned("error@step=7,error@wait=2")
    faults.reach("step", 6)
    with pytest.raises(RuntimeError, match="injected: error@step=7"):
        faults.reach("step", 7)
    faults.reach("step", 7)  # after a rollback it is made again
    with Clock() as clock:
        for _ in range(2):
            with clock.phase("step"):  # a phase, not the place
                pass
        with clock.phase("wait"):
            pass
        with pytest.raises(RuntimeError, match="wait=2"), clock.phase("wait"):
            pass
        assert clock._phases == ["start"]


def test_a_time_is_drawn_by_its_seed(planned):
    drawn = []
    for seed in range(40):
        planned(f"kill@step=3..9:seed={seed}")
        drawn.append(faults.planned().faults[0].time)
        faults._schedule.cache_clear()
        assert faults.planned().faults[0].time == drawn[-1]
    assert set(drawn) == set(range(3, 10))


def test_gradients_are_no_numbers_at_the_steps_named_and_every_bit_the_same_at_others(planned):
    planned("nan@step=2,nan@step=4")
    grads = {"w": jnp.array([1.5, -0.0, 1e-30]), "b": jnp.array([2.0], jnp.bfloat16)}
    traced = jax.jit(lambda grads, step: faults.poisoned(grads, step))
    for step in range(1, 6):
        found = traced(grads, jnp.int32(step))
        if step in (2, 4):
            assert all(bool(jnp.isnan(leaf).all()) for leaf in jax.tree.leaves(found))
        else:
            assert jax.tree.map(_bits, found) == jax.tree.map(_bits, grads)


def test_a_flip_changes_one_bit_of_one_device_s_copy(planned):
    planned("flip@step=5:device=3:seed=1")
    mesh = jax.make_mesh((4, 2), ("fsdp", "model"))
    put = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))
    tree = {"copied": put(jnp.arange(24.0).reshape(4, 6)), "cut": put(jnp.arange(64.0).reshape(8, 8), "fsdp", "model"),
            "key": put(jax.random.key(0))}
    assert faults.struck(tree, 4) is tree
    hit = faults.struck(tree, 5)
    assert faults.struck(tree, 5) is tree, "once"
    assert hit["cut"] is tree["cut"], "an array with copies comes first"
    for before, after in zip(tree["copied"].addressable_shards, hit["copied"].addressable_shards, strict=True):
        flipped = np.unpackbits(_raw(before.data) ^ _raw(after.data)).sum()
        assert flipped == (before.device.id == 3)
    planned("flip@step=1:device=99")
    with pytest.raises(Failure, match="no device=99: there are"):
        faults.struck(tree, 1)


def test_every_place_of_the_program_can_be_named_and_every_name_is_a_place():
    """By the calls of `reach` and `phase` in the sources."""
    found = {"step"}
    for path in (ROOT / "lm_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("reach", "phase"):
                found |= {leaf.value for leaf in ast.walk(node.args[0]) if isinstance(leaf, ast.Constant)}
    assert found - {None, 0} == set(faults.PLACES)


def _raw(array):
    return np.array(array).reshape(-1).view(np.uint8)


def _bits(array):
    return np.asarray(array).tobytes()
