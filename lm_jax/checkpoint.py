"""Checkpoints: asynchronous, atomic, proven whole before they are believed, restored onto any mesh.

    <folder>/<step>/arrays/...          the state as nested dicts of arrays, by orbax
    <folder>/<step>/MANIFEST.json       step, extra, shape and dtype of each leaf, size and SHA-256 of each file

A checkpoint is written as `saving-<step>`, sealed with its manifest, and renamed when all of it has reached the disk: a
folder named by a number is whole, or was damaged later. Orbax checks no sums and restores a flipped bit in silence, so
every file is compared with the manifest before it is read. A damaged checkpoint is renamed `<step>.bad`, never deleted,
and the one before it is taken. Of several processes each writes its shards; only process 0 judges, renames and deletes.
"""

import json
import logging
import math
import re
import shutil
import threading
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, NamedSharding, SingleDeviceSharding

from lm_jax import disk, faults, seal
from lm_jax.errors import ConfigError, Failure

NONE, BAD = -1, -2  # what process 0 tells the others in place of a step


class CheckpointError(Failure, RuntimeError):
    """A checkpoint could not be written; the message names the cause."""

    code = 74


class NoCheckpointError(CheckpointError):
    """There are checkpoints, and none can be read."""

    code = 79


class Checkpoints:
    """The checkpoints of one run: the `keep` newest stay, and that of step `spare`; without `keep` the folder is read
    and left as it is."""

    def __init__(self, folder, *, keep: int | None = None, spare: int = 0, say=print):
        self.folder = Path(folder).absolute()
        self._keep, self._spare = keep, spare
        self._say = say
        self._newest = None  # the step last saved or restored here; not asked of the disk, where processes may differ
        self._thread = None
        self._error = None
        logging.getLogger("absl").addFilter(_not_from_orbax)

    def save(self, step: int, tree, extra: dict) -> bool:
        """Begin to save a pytree of arrays and a JSON-able dict; returns once the arrays are copied from the devices.

        Waits for the save before, and raises its error. A step saved or restored just before is not saved again: False.
        """
        if self._keep is None:
            raise ValueError(f"{self.folder} was opened for reading: pass keep= to save")
        self.wait()
        if step == self._newest:
            return False
        leaves = _named(tree)
        body = {"step": step, "extra": json.loads(json.dumps(extra)), "leaves": _signature(leaves)}
        part = self.folder / f"saving-{step}"
        try:
            if jax.process_index() == 0:
                self._sweep()
                part.mkdir(parents=True)
            checkpointer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
            faults.reach("save/begin")
            checkpointer.save(part / "arrays", args=ocp.args.PyTreeSave(_nested(leaves)))
        except Exception as e:
            self._fail(step, part, e)
            self.poll()
        self._thread = threading.Thread(target=self._finish, args=(step, part, body, checkpointer), name="checkpoint")
        self._thread.start()
        return True

    def restore(self, like, *, partial: bool = False, most: float = math.inf):
        """(step, tree, extra) of the newest intact checkpoint of at most `most` steps, or None where none ever was.

        `like` is a pytree of arrays or ShapeDtypeStructs whose shardings say where the values go, on whatever mesh;
        leaves without one are replicated over the mesh in use, or on JAX's first device. `partial` allows `like` to ask
        for fewer leaves than were saved. Raises ConfigError where names, shapes or dtypes differ, NoCheckpointError
        where every checkpoint is damaged.
        """
        self.wait()
        step = self._agreed_step(most)
        self._newest = step
        if step is None:
            return None
        manifest = seal.read(self.folder / str(step))
        leaves = {name: _placed(leaf) for name, leaf in _named(like).items()}
        _compare(step, manifest["leaves"], _signature(leaves), partial=partial)
        item = _nested(leaves)
        args = ocp.args.PyTreeRestore(item, ocp.checkpoint_utils.construct_restore_args(item), partial_restore=partial)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            restored = _named(checkpointer.restore(self.folder / str(step) / "arrays", args=args))
        tree = jax.tree.unflatten(jax.tree.structure(like), [restored[name] for name in leaves])
        return step, tree, manifest["extra"]

    def steps(self) -> list[int]:
        """Steps with a manifest, oldest first, as the disk has them now."""
        return [int(path.name) for path in self._numbered() if (path / seal.NAME).is_file()]

    def poll(self):
        """Raise the error of a save in the background, if it has failed by now."""
        if self._error:
            error, self._error = self._error, None
            raise error

    def wait(self):
        """Return when nothing is being saved; raises the error of the last save."""
        if self._thread:
            self._thread.join()
            self._thread = None
        self.poll()

    def close(self):
        self.wait()

    def _finish(self, step, part, body, checkpointer):
        """The background's share: the rest of the arrays, the manifest, the rename, the oldest one's end."""
        try:
            faults.reach("save/arrays")
            checkpointer.wait_until_finished()  # of all processes
            checkpointer.close()
            if jax.process_index() == 0:
                faults.reach("save/manifest")
                seal.write(part, body)
                faults.reach("save/rename")
                part.rename(self.folder / str(step))
                disk.sync(self.folder)
                for old in [at for at in self.steps() if at != self._spare][:-self._keep]:
                    self._remove(self.folder / str(old))
            self._newest = step
        except BaseException as e:
            self._fail(step, part, e)

    def _fail(self, step, part, error):
        """Note the error for whoever polls, and give back the disk that the attempt took."""
        free = shutil.disk_usage(self.folder).free / 2**20 if self.folder.exists() else 0
        if jax.process_index() == 0:
            shutil.rmtree(part, ignore_errors=True)
        cause = " ".join(str(error).split())[-200:]  # orbax names the system's error last
        self._error = CheckpointError(f"checkpoint {step} was not saved in {self.folder}, where {free:.0f} MiB were "
                                      "free. Those before it are intact, and a restart goes on from them. "
                                      f"{type(error).__name__}: ...{cause}")
        self._error.__cause__ = error

    def _agreed_step(self, most) -> int | None:
        """What process 0 finds, told to all."""
        code, problem = 0, "process 0 found no intact checkpoint"
        if jax.process_index() == 0:
            try:
                step = self._newest_intact(most)
                code = NONE if step is None else step
            except NoCheckpointError as e:
                code, problem = BAD, str(e)
        if jax.process_count() > 1:
            code = int(multihost_utils.broadcast_one_to_all(np.int32(code)))
        if code == BAD:
            raise NoCheckpointError(problem)
        return None if code == NONE else code

    def _newest_intact(self, most) -> int | None:
        damaged = list(self.folder.glob("*.bad*"))
        for path in reversed([path for path in self._numbered() if int(path.name) <= most]):
            try:
                seal.verify(path)
                return int(path.name)
            except seal.DamagedError as e:
                damaged.append(self._quarantine(path, str(e)))
        if damaged:
            names = ", ".join(sorted(path.name for path in damaged))
            raise NoCheckpointError(f"no intact checkpoint in {self.folder}: {names} damaged. Bring one back, or "
                                    "remove them to start afresh")
        return None

    def _quarantine(self, path, reason):
        """Rename a damaged checkpoint and say so."""
        aside = path
        if self._keep is not None:
            names = (path.with_name(f"{path.name}.bad{i}") for i in ("", *range(2, 1000)))
            aside = path.rename(next(name for name in names if not name.exists()))
        self._say(f"warning: checkpoint {path} is damaged: {reason}. Kept as {aside.name}; trying the one before it")
        return aside

    def _sweep(self):
        """Remove what a save or a removal that was killed has left."""
        for pattern in ("saving-*", "deleting-*"):
            for path in self.folder.glob(pattern):
                shutil.rmtree(path)

    def _remove(self, path):
        """Delete a checkpoint, which under its own name is whole until it is gone."""
        aside = path.rename(path.with_name(f"deleting-{path.name}"))
        faults.reach("save/collect")
        shutil.rmtree(aside)

    def _numbered(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        names = (path for path in self.folder.iterdir() if path.is_dir() and re.fullmatch("0|[1-9][0-9]*", path.name))
        return sorted(names, key=lambda path: int(path.name))


def _compare(step, saved, wanted, *, partial):
    """Raise ConfigError unless what was saved is what is wanted."""
    names = wanted if partial else wanted.keys() | saved.keys()
    lines = [f"{name}: {saved.get(name, 'nothing')} saved, {wanted.get(name, 'nothing')} wanted"
             for name in sorted(names) if saved.get(name) != wanted.get(name)]
    if lines:
        lines[5:] = [f"and {len(lines) - 5} more"] if len(lines) > 5 else []
        raise ConfigError(f"checkpoint {step} is of another model or optimizer: use the config that it was saved with, "
                          "or another --workdir\n  " + "\n  ".join(lines))


def _signature(leaves) -> dict[str, str]:
    return {name: f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}" for name, leaf in leaves.items()}


def _placed(leaf):
    """Shape, dtype and a sharding over real devices."""
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        mesh = jax.sharding.get_mesh()
        sharding = SingleDeviceSharding(jax.local_devices()[0]) if mesh.empty else NamedSharding(mesh, jax.P())
    elif isinstance(getattr(sharding, "mesh", None), AbstractMesh):  # as jax.eval_shape gives it
        sharding = NamedSharding(jax.sharding.get_mesh(), sharding.spec)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _named(tree) -> dict:
    """"/"-joined path -> leaf, in the tree's order, whatever the tree is made of."""
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}
    if len(leaves) != len(pairs):
        raise ValueError("two leaves of the tree have one name: keep '/' out of its keys")
    return leaves


def _nested(leaves) -> dict:
    """The same as nested plain dicts, which is all that the disk sees."""
    tree = {}
    for name, leaf in leaves.items():
        *folders, last = name.split("/")
        inner = tree
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[last] = leaf
    return tree


def _not_from_orbax(record) -> bool:
    """Keeps orbax from printing the tracebacks of errors in its threads: they are raised here, in a sentence."""
    return "orbax" not in record.pathname or record.levelno < logging.ERROR
