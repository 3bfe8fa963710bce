"""A run that is stopped goes on with fewer devices and sees the same batches; on the same mesh it is the same run."""

import json
import os
import signal

import jax
import pytest

from lm_jax import config, parallel, trainer
from lm_jax.data import store
from lm_jax.recipes import pretrain
from lm_jax.workdir import Workdir

STEPS = 6
MESHES = {8: dict(fsdp=2, model=2, sequence=2), 4: dict(data=2, model=2), 1: dict()}  # fsdp takes what is left


def run(root, name, devices, *, stop=STEPS):
    """Train in a folder on so many devices, up to a real SIGTERM after `stop` steps."""
    c = config.default()
    c.model.update(width=32, depth=1, heads=2, dtype="float32", dropout=0.1)
    c.data.update(sources="markov:documents=300,length=31", root=str(root / "data"), tokenizer="byte", length=32)
    c.optim.update(warmup=2, ema=0.9)
    c.train.update(steps=STEPS, batch=8, checkpoint_every=100)
    c.mesh.update(MESHES[devices])
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
            status = it.fit()
        workdir.close()
    assert (status, it.done) == ("ok" if stop == STEPS else "stopped", stop)


def numbers(root, name):
    """What each step gave, but for what a clock says."""
    rows = map(json.loads, (root / name / "metrics.jsonl").open())
    return {row["step"]: [row[key] for key in ("loss", "grad_norm", "param_norm", "lr")] for row in rows}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    root = tmp_path_factory.mktemp("elastic")
    run(root, "unbroken", 8)
    return root, numbers(root, "unbroken")


def test_eight_devices_then_four_then_one_see_the_batches_of_an_unbroken_run(unbroken):
    root, expected = unbroken
    for devices, stop in ((8, 2), (4, 4), (1, STEPS)):
        run(root, "fewer", devices, stop=stop)
    found = numbers(root, "fewer")
    assert found.keys() == expected.keys() == set(range(1, STEPS + 1))
    for step in expected:
        assert found[step] == pytest.approx(expected[step], rel=1e-5), step
    losses = sorted(loss for loss, *_ in expected.values())
    assert min(b - a for a, b in zip(losses, losses[1:])) > 1e-3, "another batch would be noticed"


def test_the_same_mesh_started_again_is_the_unbroken_run_bit_for_bit(unbroken):
    root, expected = unbroken
    run(root, "again", 8, stop=3)
    run(root, "again", 8)
    assert numbers(root, "again") == expected
