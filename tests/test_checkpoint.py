"""Checkpoints come back bit for bit, on any mesh, or are refused with a reason; a run never loses the one before."""

import errno
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lm_jax import checkpoint, disk, optim, seal
from lm_jax.checkpoint import CheckpointError, Checkpoints
from lm_jax.config import ConfigError, OptimConfig
from lm_jax.errors import Failure
from lm_jax.models.layers import Kind

KINDS = {"w": Kind("DF", "D", "matrix"), "b": Kind("F", "", "vector")}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with checkpoints 3 and 6, to be copied before it is harmed."""
    folder = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(folder, keep=2)
    for step in (3, 6):
        checkpoints.save(step, _tree(step), {"rows": step * 8})
    checkpoints.close()
    return folder


def test_values_and_extra_come_back_bit_for_bit_into_the_same_structure(saved):
    step, tree, extra = Checkpoints(saved).restore(_tree(0))
    assert (step, extra) == (6, {"rows": 48})
    assert jax.tree.structure(tree) == jax.tree.structure(_tree(6)) and _same(tree, _tree(6))


def test_a_folder_without_checkpoints_is_a_fresh_start(tmp_path):
    assert Checkpoints(tmp_path / "none").restore(_tree(0)) is None


def test_only_the_newest_are_kept_and_a_step_is_saved_once(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert [checkpoints.save(step, _tree(step), {}) for step in (1, 2, 3, 3)] == [True, True, True, False]
    checkpoints.close()
    assert checkpoints.steps() == [2, 3] and sorted(os.listdir(tmp_path)) == ["2", "3"]


def test_an_optimizer_goes_on_from_disk_as_if_it_had_not_stopped(tmp_path):
    tx = optim.make(OptimConfig(name="muon", ema=0.9, spike=6.0), 100, KINDS)
    weights = {"w": jnp.ones((4, 6)), "b": jnp.zeros(6)}

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(weights, state, seed):
        grads = jax.tree.map(lambda w: jax.random.normal(jax.random.key(seed), w.shape), weights)
        updates, state = tx.update(grads, state, weights, loss=seed * 1.0)
        return optax.apply_updates(weights, updates), state

    run, checkpoints = (weights, tx.init(weights)), Checkpoints(tmp_path, keep=1)
    for i in range(4):
        run = step(*run, i)
        if i == 1:
            checkpoints.save(2, run, {})  # the next step reuses these buffers while they are being written
    checkpoints.wait()
    like = jax.eval_shape(lambda w: (w, tx.init(w)), {"w": jnp.ones((4, 6)), "b": jnp.zeros(6)})
    _, resumed, _ = checkpoints.restore(like)
    for i in (2, 3):
        resumed = step(*resumed, i)
    assert _same(run, resumed)


def test_a_checkpoint_moves_to_another_mesh(tmp_path):
    value = jnp.arange(64, dtype=jnp.float32).reshape(8, 8)
    first = _mesh((8, 1))
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, {"w": jax.device_put(value, NamedSharding(first, PartitionSpec("fsdp", None)))}, {})
    checkpoints.close()
    for shape in ((4, 2), (2, 2), (1, 1)):
        mesh = _mesh(shape)
        with jax.set_mesh(mesh):
            like = jax.eval_shape(lambda: jnp.zeros((8, 8), out_sharding=PartitionSpec("fsdp", "model")))
            _, tree, _ = Checkpoints(tmp_path).restore({"w": like})
        assert tree["w"].sharding == NamedSharding(mesh, PartitionSpec("fsdp", "model"))
        assert _same(tree["w"], value)


def test_a_model_is_read_without_its_optimizer(saved):
    _, tree, _ = Checkpoints(saved).restore({"model": _tree(0)["model"]}, partial=True)
    assert _same(tree["model"], _tree(6)["model"])


def test_a_checkpoint_of_another_model_names_what_differs_and_is_left_alone(saved, tmp_path):
    folder = _copy(saved, tmp_path)
    with pytest.raises(ConfigError, match=r"model/w: float32\[4, 6\] saved, float32\[4, 8\] wanted"):
        Checkpoints(folder, keep=2).restore(_tree(0) | {"model": {"w": jnp.zeros((4, 8))}})
    with pytest.raises(ConfigError, match="opt/0: bfloat16.* saved, nothing wanted"):
        Checkpoints(folder, keep=2).restore({"model": _tree(0)["model"]})
    assert Checkpoints(folder).steps() == [3, 6]


def test_a_harmed_file_makes_it_fall_back_and_say_why(saved, tmp_path):
    files = sorted(p.relative_to(saved / "6") for p in (saved / "6").rglob("*") if p.is_file())
    assert len(files) > 8
    for file in files:
        for harm, reason in ((_flip, "SHA-256|cannot be read"), (_truncate, "bytes of|cannot be read"),
                             (os.remove, "missing|has no MANIFEST"), (_zero, "SHA-256|cannot be read"),
                             (_empty, "bytes of|cannot be read")):
            folder = _copy(saved, tmp_path)
            if harm in (_truncate, _zero, _empty) and not (folder / "6" / file).stat().st_size:
                continue
            harm(folder / "6" / file)
            _falls_back(folder, reason, also=file.name if "MANIFEST" not in file.name else "MANIFEST")


def test_junk_named_like_a_step_makes_it_fall_back_and_say_why(saved, tmp_path):
    folder = _copy(saved, tmp_path)
    shutil.rmtree(folder / "6")
    (folder / "9999").mkdir()
    said = _falls_back(folder, "has no MANIFEST")
    assert "9999" in said
    shutil.copytree(folder / "3", folder / "12")
    assert "it was written as step 3" in _falls_back(folder, "12 is damaged")
    (folder / "10").write_text("a file, not a checkpoint")
    assert Checkpoints(folder, keep=2).restore(_tree(0))[0] == 3


def test_a_change_of_the_data_position_is_noticed(saved, tmp_path):
    folder = _copy(saved, tmp_path)
    manifest = folder / "6" / "MANIFEST.json"
    manifest.write_text(manifest.read_text().replace('"rows": 48', '"rows": 49'))
    _falls_back(folder, "SHA-256")


def test_a_reader_warns_and_renames_nothing(saved, tmp_path):
    folder, said = _copy(saved, tmp_path), []
    _flip(folder / "6" / "arrays" / "_METADATA")
    assert Checkpoints(folder, say=said.append).restore(_tree(0))[0] == 3
    assert sorted(os.listdir(folder)) == ["3", "6"] and len(said) == 1
    with pytest.raises(ValueError, match="reading"):
        Checkpoints(folder).save(9, _tree(9), {})


def test_when_every_checkpoint_is_damaged_nothing_starts_afresh_in_silence(saved, tmp_path):
    folder = _copy(saved, tmp_path)
    for step in ("3", "6"):
        _truncate(folder / step / "MANIFEST.json")
    for _ in range(2):  # nor the second time, when all are renamed
        with pytest.raises(CheckpointError, match="3.bad, 6.bad damaged"):
            Checkpoints(folder, keep=2, say=lambda _: None).restore(_tree(0))


@pytest.mark.parametrize("room", [200, 6_000])
def test_a_full_disk_is_an_error_soon_and_nothing_is_lost(saved, tmp_path, room):
    """A limit on the size of a file stands for the disk: the small one stops the first file, the larger the arrays."""
    folder = _copy(saved, tmp_path)
    said = []
    checkpoints = Checkpoints(folder, keep=2, say=said.append)
    noise = np.random.default_rng(0).random((64, 64))  # compresses badly
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(CheckpointError, match="9 was not saved .* Those before it are intact.* too large"):
            for tries in range(1, 4):
                checkpoints.save(9, {"w": jnp.asarray(noise)}, {})
                deadline = time.time() + 10
                while time.time() < deadline and len(said) < tries:  # as a trainer does after each step
                    checkpoints.poll()
                    time.sleep(0.01)
        assert len(said) == 2 and all("Training goes on; 3 failures in a row end it" in line for line in said)
        checkpoints.save(9, {"w": jnp.asarray(noise)}, {})
        with pytest.raises(CheckpointError, match="9 was not saved"):
            checkpoints.wait()  # at a run's end there is no later save that may be better
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    checkpoints.wait()
    assert sorted(os.listdir(folder)) == ["3", "6"]
    assert _same(checkpoints.restore(_tree(0))[1], _tree(6))
    assert checkpoints.save(9, _tree(9), {})
    checkpoints.close()
    assert checkpoints.steps() == [6, 9]


def test_a_save_that_is_slower_than_its_interval_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SLOW", 0.2)
    monkeypatch.setenv("LM_JAX_FAULTS", "stall@save/arrays=1:seconds=3")
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert not checkpoints.busy()
    checkpoints.save(1, _tree(1), {})
    time.sleep(0.5)
    assert checkpoints.busy()
    checkpoints.wait()
    assert not checkpoints.busy() and checkpoints.steps() == [1]


def test_many_saves_leave_no_memory_behind(tmp_path):
    checkpoints, tree = Checkpoints(tmp_path, keep=1), {"w": jnp.ones((8, 2**20))}  # 32 MB
    resident = lambda: int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
    held = []
    for step in range(1, 21):
        checkpoints.save(step, tree, {})
        checkpoints.wait()
        held.append(resident())
    assert max(held[10:]) - min(held[2:5]) < 1.3 * tree["w"].nbytes


def test_what_comes_to_the_devices_otherwise_than_it_was_saved_is_set_aside(saved, tmp_path):
    """Files that agree with their manifest say nothing of what reads them."""
    _falls_back(_misprinted(saved, tmp_path), "model/w came to the devices with another fingerprint")


def test_who_only_reads_is_told_of_what_comes_otherwise(saved, tmp_path):
    folder = _misprinted(saved, tmp_path)
    with pytest.raises(CheckpointError, match="checkpoint 6 of .* cannot be read: model/w came"):
        Checkpoints(folder).restore(_tree(0))
    assert sorted(os.listdir(folder)) == ["3", "6"]


def test_a_later_one_that_is_damaged_says_nothing_of_those_before(saved, tmp_path):
    folder = _copy(saved, tmp_path)
    (folder / "6").rename(folder / "6.bad")
    assert Checkpoints(folder).restore(_tree(0), most=2) is None
    assert Checkpoints(folder).restore(_tree(0), most=5)[0] == 3


def test_a_disk_that_refuses_is_no_damage(saved, tmp_path, monkeypatch):
    folder = _copy(saved, tmp_path)

    def refuse(path):
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(disk, "sha256", refuse)
    with pytest.raises(Failure, match="Input/output error.*Nothing was changed") as told:
        Checkpoints(folder, keep=2).restore(_tree(0))
    assert told.value.code == 74 and sorted(os.listdir(folder)) == ["3", "6"]


def test_what_comes_after_a_step_can_be_forgotten(saved, tmp_path):
    checkpoints = Checkpoints(_copy(saved, tmp_path), keep=2)
    checkpoints.restore(_tree(0), most=5)
    checkpoints.forget(3)
    assert checkpoints.steps() == [3]
    assert checkpoints.save(6, _tree(7), {})
    checkpoints.close()
    assert _same(checkpoints.restore(_tree(0))[1], _tree(7))


def test_arrays_that_are_given_up_are_free_before_others_are_read(saved):
    like = _tree(0)
    _, tree, _ = Checkpoints(saved).restore(like, donate=True)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(like)) and _same(tree, _tree(6))


def test_a_kill_at_any_moment_leaves_whole_checkpoints_only(tmp_path):
    code = ("import sys, jax.numpy as jnp; from lm_jax.checkpoint import Checkpoints\n"
            "checkpoints = Checkpoints(sys.argv[1], keep=2); like = {'w': jnp.zeros(20_000)}\n"
            "found = checkpoints.restore(like); step = found[0] if found else 0\n"
            "assert not found or (found[1]['w'] == step).all()\n"
            "while True:\n"
            "    step += 1; checkpoints.save(step, {'w': jnp.full(20_000, step, jnp.float32)}, {})\n"
            "    print(step, flush=True)\n")
    begun = 0
    for moment in (0.0, 0.013, 0.05):
        process = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True)
        first = int(process.stdout.readline())
        assert begun - 2 < first <= begun + 1, "a step that was saved is lost"
        for _ in range(3):
            begun = int(process.stdout.readline())
        time.sleep(moment)
        os.kill(process.pid, signal.SIGKILL)
        begun = max([begun, *map(int, process.stdout.read().split())])
        process.wait()
        assert Checkpoints(tmp_path).steps()[-1] >= begun - 1
    like = {"w": jnp.zeros(20_000)}
    said = []
    checkpoints = Checkpoints(tmp_path, keep=2, say=said.append)
    step, tree, _ = checkpoints.restore(like)
    assert (tree["w"] == step).all() and not said
    checkpoints.save(step + 1, like, {})
    checkpoints.close()
    assert len(os.listdir(tmp_path)) == 2, "what the kills left is swept"


def _falls_back(folder, reason, also=""):
    """Restoring finds checkpoint 3, has put the newer one aside, and says why; returns what was said."""
    said = []
    step, tree, extra = Checkpoints(folder, keep=2, say=said.append).restore(_tree(0))
    assert step == 3 and extra == {"rows": 24} and _same(tree, _tree(3))
    assert [name for name in os.listdir(folder) if name.endswith(".bad")]
    assert len(said) == 1 and re.search(reason, said[0]) and also in said[0], said
    return said[0]


def _misprinted(saved, tmp_path):
    """A copy whose newest checkpoint is sealed with another fingerprint than its array has."""
    folder = _copy(saved, tmp_path)
    body = seal.read(folder / "6")
    body["fingerprints"]["model/w"] = "0123456789abcdef"
    del body["files"]
    seal.write(folder / "6", body)
    return folder


def _copy(saved, tmp_path):
    folder = tmp_path / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    return shutil.copytree(saved, folder)


def _flip(path):
    data = bytearray(path.read_bytes() or b"\0")
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def _zero(path):
    path.write_bytes(bytes(path.stat().st_size))


def _empty(path):
    os.truncate(path, 0)


def _tree(step):
    """A state with nested dicts, a tuple, several types and an empty node."""
    rng = np.random.default_rng(step)
    return {"model": {"w": jnp.asarray(rng.normal(size=(4, 6)), jnp.float32)},
            "opt": (jnp.asarray(rng.normal(size=3), jnp.bfloat16), jnp.int32(step), optax.EmptyState())}


def _mesh(shape):
    return jax.make_mesh(shape, ("fsdp", "model"), devices=jax.devices()[:shape[0] * shape[1]])


def _same(a, b):
    """Equal to the bit, NaNs and signs of zero too."""
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() and x.dtype == y.dtype
               for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
