"""The trainer's promises: any cut of a batch is one step, a stopped run an unbroken one, bad updates change nothing."""

import contextlib
import os
import signal

import jax
import numpy as np
import pytest
import tiny

from lm_jax import config, hosts, losses, optim, parallel, trainer
from lm_jax.config import ConfigError, OptimConfig
from lm_jax.models import transformer
from lm_jax.models.layers import kinds
from lm_jax.workdir import Workdir

STEPS = 6


def stepper(family="decoder", *, microbatches=1, **knobs):
    """A tiny model's first state, and its jitted step."""
    model = transformer.make(tiny.settings(family), seed=0)
    o = OptimConfig(warmup=2, **knobs)
    tx = optim.make(o, STEPS, kinds(model))
    step = trainer.make_step(losses.next_token, tx, optim.schedule(o, STEPS), microbatches=microbatches)
    return trainer.begin(model, tx), jax.jit(step)


def flat(tree):
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def batches(seed=0, *, family="decoder"):
    make = tiny.pairs if family == "encoder_decoder" else tiny.rows
    return make(seed)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_microbatches_are_the_same_step_as_the_whole_batch(family):
    batch, key = batches(family=family), jax.random.key(0)
    results = []
    for parts in (1, 4):
        state, step = stepper(family, microbatches=parts, eps=1e-2)  # else Adam takes the sign of zero gradients' noise
        results.append(step(state, batch, key))
    (whole, whole_metrics), (cut, cut_metrics) = results
    for name in ("loss", "grad_norm", "update_norm"):
        np.testing.assert_allclose(cut_metrics[name], whole_metrics[name], rtol=1e-5)
    after, before = trainer.parameters(whole.model), trainer.parameters(cut.model)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), after, before)


def test_rows_without_weight_change_neither_loss_nor_gradient():
    state, step = stepper()
    batch = batches()
    mute = batch | {"weights": batch["weights"] * (np.arange(8)[:, None] < 5)}
    garbled = mute | {"tokens": np.where(np.arange(8)[:, None] < 5, mute["tokens"], 1)}
    one, two = (step(state, b, jax.random.key(0))[1] for b in (mute, garbled))
    assert one["loss"] == two["loss"]
    np.testing.assert_allclose(one["grad_norm"], two["grad_norm"], rtol=1e-6)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_poisoned_batch_changes_nothing_but_the_counts(poison):
    state, step = stepper(ema=0.9)
    state, _ = step(state, batches(0), jax.random.key(0))
    bad = batches(1)
    bad["weights"] = bad["weights"].copy()
    bad["weights"][0, 0] = poison
    after, metrics = step(state, bad, jax.random.key(1))
    assert metrics["skipped"] == 1 and metrics["streak"] == 1 and after.step == state.step + 1
    for (name, a), b in zip(flat((state.model, state.opt)).items(), flat((after.model, after.opt)).values()):
        if "skipped" not in name and "streak" not in name:
            np.testing.assert_array_equal(a, b, err_msg=name)
    clean, _ = step(after, batches(2), jax.random.key(2))
    never, _ = step(state, batches(2), jax.random.key(2))
    jax.tree.map(np.testing.assert_array_equal, trainer.parameters(clean.model), trainer.parameters(never.model))


def run(path, *, stop_at=None, data="d", steps=STEPS, loss=losses.next_token, start=None, weights=(), **optimizer):
    """A run of the Trainer in a folder, stopped by a real SIGTERM after `stop_at` steps; (status, trainer)."""
    c = config.default()
    c.train.update(steps=steps, batch=8, checkpoint_every=4, loggers="")
    c.optim.update(dict(warmup=2, ema=0.9, spike=5.0) | optimizer)
    c.data.weights = weights
    c = config.resolve(c)

    @contextlib.contextmanager
    def source(first):
        yield (batches(step) for step in range(first, steps))

    def kill(run):
        if run.done == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    recipe = trainer.Recipe(loss, source, tokens=8 * 16, flops=1e6, data=data, hooks=(trainer.Every(1, kill),))
    workdir = Workdir(path)
    workdir.open(config.to_dict(c))
    try:
        model = transformer.make(tiny.settings(dropout=0.1), seed=0)
        it = trainer.Trainer(c, model, recipe, workdir, start=start, say=lambda line: None)
        status = it.fit()
        it.log.close()
        return status, it
    finally:
        workdir.close()


def test_a_run_that_is_stopped_and_started_again_is_bitwise_the_unbroken_one(tmp_path):
    status, whole = run(tmp_path / "whole")
    assert status == "ok"
    status, part = run(tmp_path / "part", stop_at=3)
    assert status == "stopped" and part.done in (3, 4), "a signal is honoured at the next step"
    status, again = run(tmp_path / "part")
    assert status == "ok" and again.done == STEPS
    for (name, a), b in zip(flat(whole.state).items(), flat(again.state).values()):
        np.testing.assert_array_equal(a, b, err_msg=name)
    rows = [[line.split('"tokens"')[0] for line in (tmp_path / name / "metrics.jsonl").open()]
            for name in ("whole", "part")]
    assert rows[0] == rows[1] and len(rows[0]) == STEPS, "each step's numbers are there once, and the same"


def test_a_longer_run_that_starts_from_a_shorter_ones_trunk_is_bitwise_what_it_would_be_alone(tmp_path):
    wsd = dict(schedule="wsd", decay=0.3)
    _, whole = run(tmp_path / "whole", steps=24, **wsd)
    _, short = run(tmp_path / "short", steps=14, **wsd)
    trunk = optim.trunk(short.config.optim, 14)
    assert trunk == 9 and short.checkpoints.steps() == [9, 12, 14], "two newest, and the one before the cool-down"
    status, branch = run(tmp_path / "branch", steps=24, stop_at=13, start=tmp_path / "short", **wsd)
    assert status == "stopped" and branch.begun == trunk
    status, branch = run(tmp_path / "branch", steps=24, start=tmp_path / "short", **wsd)
    assert status == "ok" and branch.begun == trunk, "what it began as is known after a restart"
    for (name, a), b in zip(flat(whole.state).items(), flat(branch.state).values()):
        np.testing.assert_array_equal(a, b, err_msg=name)
    rows = [[line.split('"tokens"')[0] for line in (tmp_path / name / "metrics.jsonl").open()]
            for name in ("whole", "branch")]
    assert rows[0] == rows[1] and len(rows[0]) == 24, "the trunk's rows are the branch's too"


def test_a_run_starts_only_from_what_it_would_have_been(tmp_path):
    run(tmp_path / "a", schedule="wsd", decay=0.3, steps=14)
    start = lambda **other: run(tmp_path / "b", start=tmp_path / "a", **(dict(schedule="wsd", steps=24) | other))
    with pytest.raises(ConfigError, match="optim.lr: 0.003 -> 0.001"):
        start(lr=1e-3)
    with pytest.raises(ConfigError, match="was trained on data d and the store now holds e"):
        start(data="e")
    with pytest.raises(ConfigError, match="no checkpoint of its first 2 steps.*it has .9, 12, 14."):
        start(schedule="cosine")
    with pytest.raises(ConfigError, match="weights has stages"):
        run(tmp_path / "c", schedule="wsd", steps=14, weights=((0.0, 1.0), (0.5, 1.0)))
        run(tmp_path / "b", start=tmp_path / "c", schedule="wsd", steps=24, weights=((0.0, 1.0), (0.5, 1.0)))
    with pytest.raises(ConfigError, match="is no run's folder"):
        run(tmp_path / "b", start=tmp_path / "none")


def test_a_run_does_not_go_on_with_other_data(tmp_path):
    run(tmp_path, stop_at=2)
    with pytest.raises(ConfigError, match="was trained on data d and the store now holds e"):
        run(tmp_path, data="e")


def test_a_run_whose_every_update_is_refused_is_diverged(tmp_path):
    def broken(model, batch, key):
        metrics = losses.next_token(model, batch, key)
        return {name: trainer.Mean(mean.total * np.nan, mean.weight) for name, mean in metrics.items()}

    status, it = run(tmp_path, steps=trainer.PATIENCE + 10, loss=broken)
    assert status == "diverged" and it.done <= trainer.PATIENCE + 2


def test_the_average_of_the_weights_is_what_is_evaluated():
    state, step = stepper(ema=0.5)
    for seed in range(3):
        state, _ = step(state, batches(seed), jax.random.key(seed))
    shown = trainer.parameters(trainer.evaluated(state))
    jax.tree.map(np.testing.assert_array_equal, shown, optim.ema_params(state.opt))
    differs = jax.tree.map(lambda a, b: bool(np.any(a != b)), shown, trainer.parameters(state.model))
    assert any(jax.tree.leaves(differs))


def test_eight_devices_train_as_one_does():
    batch, losses_seen = batches(), []
    for mesh in (None, config.MeshConfig(fsdp=2, model=2, data=2)):
        with jax.set_mesh(parallel.make_mesh(mesh)) if mesh else contextlib.nullcontext():
            state, step = stepper()
            for seed in range(2):
                state, metrics = step(state, hosts.put_batch(batch), jax.random.key(seed))
            losses_seen.append([float(metrics[name]) for name in ("loss", "grad_norm", "param_norm")])
    np.testing.assert_allclose(*losses_seen, rtol=1e-5)
