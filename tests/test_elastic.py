"""A run that is stopped goes on with other devices, on the same batches; on the same mesh it is the same run."""

import json
import os
import signal

import jax
import numpy as np
import pytest

from lm_jax import config, fingerprint, parallel, trainer, update
from lm_jax.data import store
from lm_jax.recipes import pretrain
from lm_jax.workdir import Workdir

STEPS = 50
MESHES = {  # devices and mesh; fsdp takes what is left
    "8": (8, dict(fsdp=2, model=2, sequence=2)), "4": (4, dict(data=2, model=2)), "4 x 2": (8, dict(fsdp=4, model=2)),
    "1": (1, dict()),
}


def run(root, name, mesh, *, stop=STEPS):
    """Train in a folder on a mesh, up to a real SIGTERM after `stop` steps; the state it began with and that it left.
    """
    c = config.default()
    c.model.update(width=32, depth=1, heads=2, dtype="float32", dropout=0.1)
    c.data.update(sources="markov:documents=300,length=31", root=str(root / "data"), tokenizer="byte", length=32)
    c.optim.update(warmup=2, ema=0.9)
    c.train.update(steps=STEPS, batch=8, checkpoint_every=100)
    devices, axes = MESHES[mesh]
    c.mesh.update(axes)
    c = config.resolve(c)

    def kill(run):
        if run.done == stop - 1:  # heard after the next step
            os.kill(os.getpid(), signal.SIGTERM)

    with jax.set_mesh(parallel.make_mesh(c.mesh, jax.devices()[:devices])):
        recipe = pretrain.Pretraining(c, store.prepare(c.data, say=lambda line: None))
        workdir = Workdir(root / name)
        workdir.open(config.to_dict(c))
        plan = recipe.recipe((trainer.Every(1, kill),) if stop < STEPS else ())
        with trainer.Trainer(c, recipe.model(), plan, workdir, say=lambda line: None) as it:
            begun, status = bits(it.state), it.fit()
        workdir.close()
    assert (status, it.done) == ("ok" if stop == STEPS else "stopped", stop)
    return begun, bits(it.state)


def bits(state):
    """Every array of a state, whole."""
    return {name: np.asarray(leaf).tobytes() for name, leaf in fingerprint.named(update.saved(state)).items()}


def numbers(root, name):
    """What each step gave, but for what a clock says."""
    rows = map(json.loads, (root / name / "metrics.jsonl").open())
    return {row["step"]: [row[key] for key in ("loss", "grad_norm", "param_norm", "lr")] for row in rows}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    root = tmp_path_factory.mktemp("elastic")
    run(root, "unbroken", "8")
    return root, numbers(root, "unbroken")


def test_a_run_goes_on_from_mesh_to_mesh_with_the_state_that_was_left_and_the_batches_of_an_unbroken_run(unbroken):
    root, expected = unbroken
    left = None
    for mesh, stop in (("8", 10), ("4", 20), ("4 x 2", 30), ("1", 40), ("8", STEPS)):
        begun, after = run(root, "moved", mesh, stop=stop)
        assert left is None or begun == left, f"on {mesh} a run begins with every bit that was left"
        left = after
    found = numbers(root, "moved")
    assert found.keys() == expected.keys() == set(range(1, STEPS + 1))
    for step in expected:
        assert found[step] == pytest.approx(expected[step], rel=2e-6), step
    losses = sorted(loss for loss, *_ in expected.values())
    assert min(b - a for a, b in zip(losses, losses[1:])) > 2e-5 * losses[-1], "another batch would be noticed"


def test_the_same_mesh_started_again_is_the_unbroken_run_bit_for_bit(unbroken):
    root, expected = unbroken
    run(root, "again", "8", stop=3)
    run(root, "again", "8")
    assert numbers(root, "again") == expected
