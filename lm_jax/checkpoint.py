"""Checkpoints: asynchronous, atomic, proven whole before they are believed, restored onto any mesh.

    <folder>/<step>/arrays/...          the state as nested dicts of arrays, by orbax
    <folder>/<step>/MANIFEST.json       step, extra, type and fingerprint of each leaf, size and SHA-256 of each file

A checkpoint is written as `saving-<step>`, sealed with its manifest, and renamed when all of it has reached the disk: a
folder named by a number is whole, or was damaged later. Orbax checks no sums and restores a flipped bit in silence, so
every file is compared with the manifest before it is read, and then what lies on the devices with the fingerprints. A
damaged checkpoint is renamed `<step>.bad`, never deleted, and the one before it is taken. Of several processes each
writes its shards; only process 0 judges, renames and deletes.
"""

import json
import logging
import math
import re
import shutil
import threading
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import AbstractMesh, NamedSharding, SingleDeviceSharding

from lm_jax import disk, faults, fingerprint, peers, seal
from lm_jax.errors import ConfigError, Failure

FAILURES = 3  # saves in a row that may not fail
SLOW = 10.0  # seconds after which a save is not waited for by the next one


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
        self._thread, self._began = None, 0.0
        self._error, self._failed = None, 0  # of the last save, until it was told; and how many in a row
        logging.getLogger("absl").addFilter(_not_from_orbax)

    def busy(self) -> bool:
        """Whether the save before is a slow one, and still going on: to wait for it would hold up what is trained."""
        slow = self._thread is not None and self._thread.is_alive() and time.monotonic() - self._began > SLOW
        return self._told("busy", slow)

    def save(self, step: int, tree, extra: dict, *, hold: float = math.inf) -> bool:
        """Begin to save a pytree of arrays and a JSON-able dict; returns once the arrays are copied from the devices.

        Waits for the save before. A step saved or restored just before is not saved again: False. The newest of at most
        `hold` steps stays too. Raises CopiesError where devices that should hold the same do not.
        """
        if self._keep is None:
            raise ValueError(f"{self.folder} was opened for reading: pass keep= to save")
        self._join()
        self.poll()
        part = self.folder / f"saving-{step}"
        self._newest, problem = self._told("save", self._begun(step, part))  # what fails there fails on all processes
        if problem:
            self._fail(step, part, OSError(problem))
        if problem or step == self._newest:
            return False
        leaves = fingerprint.named(tree)
        body = {"step": step, "extra": json.loads(json.dumps(extra)), "leaves": _signature(leaves),
                "fingerprints": fingerprint.of(leaves)}
        try:
            checkpointer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
            checkpointer.save(part / "arrays", args=ocp.args.PyTreeSave(fingerprint.nested(leaves)))
        except Exception as e:
            self._fail(step, part, e)
            return False
        self._began = time.monotonic()
        self._thread = threading.Thread(name="checkpoint", target=self._finish,
                                        args=(step, part, body, checkpointer, hold))
        self._thread.start()
        return True

    def restore(self, like, *, partial: bool = False, most: float = math.inf, donate: bool = False):
        """(step, tree, extra) of the newest intact checkpoint of at most `most` steps, or None where none ever was.

        `like` is a pytree of arrays or ShapeDtypeStructs whose shardings say where the values go, on whatever mesh;
        leaves without one are replicated over the mesh in use, or on JAX's first device. `partial` allows `like` to ask
        for fewer leaves than were saved. `donate` frees the arrays of `like` before others are read: a device need not
        hold both. Raises ConfigError where names, shapes or dtypes differ, NoCheckpointError where every checkpoint is
        damaged.
        """
        self._join()
        self.poll()
        leaves = {name: _placed(leaf) for name, leaf in fingerprint.named(like).items()}
        while (step := self._agreed_step(most)) is not None:
            manifest = seal.read(self.folder / str(step))
            _compare(step, manifest["leaves"], _signature(leaves), partial=partial)
            for leaf in jax.tree.leaves(like) if donate else ():
                leaf.delete()
            restored = self._read(step, leaves, partial=partial)
            found, saved = fingerprint.of(restored), manifest["fingerprints"]
            if not (wrong := [name for name in found if found[name] != saved[name]]):
                self._newest = step
                tree = jax.tree.unflatten(jax.tree.structure(like), [restored[name] for name in leaves])
                return step, tree, manifest["extra"]
            reason = f"{wrong[0]} came to the devices with another fingerprint"
            if self._keep is None:
                raise NoCheckpointError(f"checkpoint {step} of {self.folder} cannot be read: {reason}")
            if jax.process_index() == 0:
                self._quarantine(self.folder / str(step), reason)
        return None

    def forget(self, step: int):
        """Remove the checkpoints after a step, as what comes after it will be another."""
        if jax.process_index() == 0:
            for later in [at for at in self.steps() if at > step]:
                self._remove(self.folder / str(later))

    def steps(self) -> list[int]:
        """Steps with a manifest, oldest first, as the disk has them now."""
        return [int(path.name) for path in self.numbered() if (path / seal.NAME).is_file()]

    def poll(self):
        """Say it if a save in the background has failed by now; raise the error where too many in a row have."""
        if self._error:
            if self._failed == FAILURES:
                self.wait()
            self._say(f"warning: {self._error}. Training goes on; {FAILURES} failures in a row end it")
            self._error = None

    def wait(self):
        """Return when nothing is being saved; raises the error of the last save."""
        self._join()
        if self._error:
            error, self._error = self._error, None
            raise error

    close = wait

    def _begun(self, step, part) -> tuple[int | None, str]:
        """On process 0 make the folder of a new step's save: the newest step, and why there is no folder."""
        try:
            if jax.process_index() == 0 and step != self._newest:
                faults.reach("save/begin")
                self._sweep()
                part.mkdir(parents=True)
            return self._newest, ""
        except Exception as e:
            return self._newest, f"{type(e).__name__}: {e}"

    def _join(self):
        if self._thread:
            self._thread.join()
            self._thread = None

    def _told(self, name: str, value):
        """What process 0 has, where others may have something else."""
        return peers.told(name, value, limit=peers.LONG)

    def _read(self, step, leaves, *, partial) -> dict:
        item, folder = fingerprint.nested(leaves), epath.Path(self.folder / str(step) / "arrays")
        args = ocp.args.PyTreeRestore(item, ocp.checkpoint_utils.construct_restore_args(item), partial_restore=partial)
        try:
            restored = ocp.PyTreeCheckpointHandler().restore(folder, args=args)  # a Checkpointer waits without a limit
        except (ValueError, TypeError) as e:  # as it was written, which was no checkpoint
            raise NoCheckpointError(f"checkpoint {step} in {self.folder} cannot be read: {str(e)[:200]}. Remove it to "
                                    "go on from the one before it") from e
        peers.exchange("restored", str(step), limit=peers.LONG)
        return fingerprint.named(restored)

    def _finish(self, step, part, body, checkpointer, hold):
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
                steps = [at for at in self.steps() if at != self._spare]
                held = max((at for at in steps if at <= hold), default=None)
                for old in [at for at in steps[:-self._keep] if at != held]:
                    self._remove(self.folder / str(old))
            self._newest, self._failed = step, 0
        except BaseException as e:
            self._fail(step, part, e)

    def _fail(self, step, part, error):
        """Note the error for whoever polls, and give back the disk that the attempt took."""
        free = shutil.disk_usage(self.folder).free / 2**20 if self.folder.exists() else 0
        if jax.process_index() == 0:
            shutil.rmtree(part, ignore_errors=True)
        cause = " ".join(str(error).split())[-200:]  # orbax names the system's error last
        self._failed += 1
        self._error = CheckpointError(f"checkpoint {step} was not saved in {self.folder}, where {free:.0f} MiB were "
                                      "free. Those before it are intact, and a restart goes on from them. "
                                      f"{type(error).__name__}: ...{cause}")
        self._error.__cause__ = error

    def _agreed_step(self, most) -> int | None:
        """What process 0 finds, told to all."""
        step, problem = None, ""
        if jax.process_index() == 0:
            try:
                step = self._newest_intact(most)
            except NoCheckpointError as e:
                problem = str(e)
        step, problem = self._told("restore", (step, problem))
        if problem:
            raise NoCheckpointError(problem)
        return step

    def _newest_intact(self, most) -> int | None:
        damaged = [path for path in self.folder.glob("*.bad*") if int(path.name.partition(".")[0]) <= most]
        for path in reversed([path for path in self.numbered() if int(path.name) <= most]):
            try:
                seal.verify(path, step=int(path.name))
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
        for path in (*self.folder.glob("saving-*"), *self.folder.glob("deleting-*")):
            shutil.rmtree(path)

    def _remove(self, path):
        """Delete a checkpoint, which under its own name is whole until it is gone."""
        aside = path.rename(path.with_name(f"deleting-{path.name}"))
        faults.reach("save/collect")
        shutil.rmtree(aside)

    def numbered(self) -> list[Path]:
        """Folders that are named as checkpoints are, oldest first."""
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


def _not_from_orbax(record) -> bool:
    """Keeps orbax from printing the tracebacks of errors in its threads: they are raised here, in a sentence."""
    return "orbax" not in record.pathname or record.levelno < logging.ERROR
