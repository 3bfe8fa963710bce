"""The trainer's promises: any cut of a batch is one step, a stopped run an unbroken one, bad updates change nothing."""

import contextlib
import json
import os
import signal

import jax
import numpy as np
import pytest
import tiny

from lm_jax import config, fingerprint, hosts, losses, meter, optim, parallel, trainer, update
from lm_jax.checkpoint import CheckpointError
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
    step = update.make_step(losses.next_token, tx, optim.schedule(o, STEPS), microbatches=microbatches)
    return update.begin(model, tx), jax.jit(step)


def flat(tree):
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def same(one, other):
    for (name, a), b in zip(flat(one).items(), flat(other).values(), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


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
    after, before = update.parameters(whole.model), update.parameters(cut.model)
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
    assert metrics["skipped"] == 1 and metrics["burst_first"] == -1 and after.step == state.step + 1
    for (name, a), b in zip(flat((state.model, state.opt)).items(), flat((after.model, after.opt)).values()):
        if "skipped" not in name and "refused" not in name:
            np.testing.assert_array_equal(a, b, err_msg=name)
    clean, _ = step(after, batches(2), jax.random.key(2))
    never, _ = step(state, batches(2), jax.random.key(2))
    jax.tree.map(np.testing.assert_array_equal, update.parameters(clean.model), update.parameters(never.model))


def run(path, *, stop_at=None, data="d", steps=STEPS, loss=losses.next_token, start=None, weights=(), bad=(), train=(),
        order=lambda at: at, die_at=None, every=1, **optimizer):
    """A run of the Trainer in a folder, stopped by a real SIGTERM after `stop_at` steps; (status, trainer).

    Its batches have the numbers `order` of 0, 1, ...; those `bad` give no finite gradients. At `die_at`, (a step, how
    many rollbacks before it), it ends by a KeyError.
    """
    c = config.default()
    c.train.update(dict(steps=steps, batch=8, checkpoint_every=4, loggers="") | dict(train))
    c.optim.update(dict(warmup=2, ema=0.9, spike=5.0) | optimizer)
    c.data.weights = weights
    c = config.resolve(c)

    def made(number):
        batch = batches(number)
        return batch | ({"weights": np.full_like(batch["weights"], np.nan)} if number in bad else {})

    def source(first):
        return contextlib.nullcontext(made(order(at) % steps) for at in range(first, first + steps))

    def kill(run):
        if (run.done, len(run.rollbacks)) == die_at:
            raise KeyError
        if run.done == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    recipe = trainer.Recipe(loss, source, tokens=8 * 16, flops=1e6, data=data, hooks=(trainer.Every(every, kill),))
    workdir = Workdir(path)
    workdir.open(config.to_dict(c))
    try:
        model = transformer.make(tiny.settings(dropout=0.1), seed=0)
        with trainer.Trainer(c, model, recipe, workdir, start=start, say=lambda line: None) as it:
            return it.fit(), it
    finally:
        workdir.close()


def test_a_run_that_is_stopped_and_started_again_is_bitwise_the_unbroken_one(tmp_path):
    status, whole = run(tmp_path / "whole")
    assert status == "ok"
    status, part = run(tmp_path / "part", stop_at=3)
    assert status == "stopped" and part.done in (3, 4), "a signal is honoured at the next step"
    status, again = run(tmp_path / "part")
    assert status == "ok" and again.done == STEPS
    same(whole.state, again.state)
    rows = [[line.split('"tokens"')[0] for line in (tmp_path / name / "metrics.jsonl").open()]
            for name in ("whole", "part")]
    assert rows[0] == rows[1] and len(rows[0]) == STEPS, "each step's numbers are there once, and the same"


def test_a_step_s_numbers_are_read_when_the_next_one_is_under_way_and_nothing_else_is(tmp_path, monkeypatch):
    """So at most two steps are in flight, and the host waits for none that it has just sent."""
    events = []

    def noted(place, name, event):
        does = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *args: (events.append(event(*args)), does(*args))[1])

    noted(meter.Meter, "sent", lambda it, step, metrics: ("sent", step))
    noted(jax, "device_get", lambda tree: "from the devices")
    noted(meter.Meter, "record", lambda it, step, *numbers: ("read", step))
    send = trainer.Trainer.send

    def guarded(*args):
        with jax.transfer_guard_device_to_host("disallow"):  # all but what is asked for by name; not heeded by CPUs
            send(*args)

    monkeypatch.setattr(trainer.Trainer, "send", guarded)
    run(tmp_path, every=STEPS, train={"checkpoint_every": STEPS})
    expected = [("sent", 1)]
    for step in range(1, STEPS + 1):
        expected += [("sent", step + 1)] * (step < STEPS) + ["from the devices", ("read", step)]
    assert events[: len(expected)] == expected


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
    same(whole.state, branch.state)
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


BAD = (9, 10, 12, 13)  # the updates 10 to 14 have four that are refused, and there is a checkpoint of step 8


def test_a_run_goes_back_to_before_a_burst_of_refused_updates_and_skips_its_batches(tmp_path):
    status, it = run(tmp_path / "a", steps=20, bad=BAD)
    assert status == "ok" and it.done == 20 and it.rollbacks == [{"from": 14, "to": 8}] and it.skipped == 6
    rows = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [*range(1, 21)] and not any(row["skipped"] for row in rows)
    assert it.checkpoints.steps() == [16, 20]
    status, never = run(tmp_path / "b", steps=20, order=lambda at: at if at < 8 else at + 6)
    assert status == "ok" and not never.rollbacks
    same(it.state, never.state)
    status, few = run(tmp_path / "few", steps=20, bad=BAD[:3])
    assert status == "ok" and not few.rollbacks and int(few.state.opt.skipped) == 3, "one fewer is no burst"


def test_a_kill_around_a_rollback_changes_nothing(tmp_path):
    _, whole = run(tmp_path / "whole", steps=20, bad=BAD)
    for i, die_at in enumerate([(13, 0), (11, 1)]):
        with pytest.raises(KeyError):
            run(tmp_path / str(i), steps=20, bad=BAD, die_at=die_at)
        status, again = run(tmp_path / str(i), steps=20, bad=BAD)
        assert status == "ok" and again.rollbacks == whole.rollbacks
        same(whole.state, again.state)
    status, part = run(tmp_path / "part", steps=20, bad=BAD, stop_at=12)
    assert status == "stopped" and part.done in (12, 13)
    status, again = run(tmp_path / "part", steps=20, bad=BAD)
    assert status == "ok" and again.rollbacks == whole.rollbacks
    same(whole.state, again.state)


@pytest.mark.parametrize("rollbacks", [0, 2])
def test_a_run_that_went_back_too_often_is_diverged_and_stays_so(tmp_path, rollbacks):
    bad = range(9, 10_000)
    status, it = run(tmp_path, steps=40, bad=bad, train={"rollbacks": rollbacks})
    assert status == "diverged" and len(it.rollbacks) == rollbacks
    status, again = run(tmp_path, steps=40, bad=bad, train={"rollbacks": rollbacks})
    assert status == "diverged" and again.done == it.done and again.rollbacks == it.rollbacks
    status, more = run(tmp_path, steps=40, bad=bad, train={"rollbacks": rollbacks + 1})
    assert status == "diverged" and len(more.rollbacks) == rollbacks + 1, "unless it is told to"


def test_the_checkpoint_before_refusals_that_may_become_a_burst_is_kept(tmp_path):
    bad = (10, 20, 30, 40)  # a burst is over 50 updates, and two newest checkpoints over 4
    status, it = run(tmp_path, steps=50, bad=bad, order=lambda at: min(at, 49), train={"checkpoint_every": 2})
    assert status == "ok" and it.rollbacks == [{"from": 41, "to": 10}]
    assert it.checkpoints.steps() == [48, 50], "and no longer than that"


def test_a_folder_that_lost_its_config_still_knows_it(tmp_path):
    run(tmp_path, stop_at=5)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match="checkpoints of a run with another config.*\n  optim.lr: 0.003 -> 0.001"):
        run(tmp_path, lr=1e-3)


def test_a_last_save_that_fails_is_no_good_end(tmp_path, monkeypatch):
    monkeypatch.setenv("LM_JAX_FAULTS", "enospc@save/begin=2,enospc@save/begin=3")
    with pytest.raises(CheckpointError, match="checkpoint 6 was not saved.*No space left"):
        run(tmp_path)


def test_a_burst_before_the_first_checkpoint_is_diverged(tmp_path):
    status, it = run(tmp_path, steps=20, bad=range(20))
    assert status == "diverged" and it.done <= 6


def test_devices_whose_copies_differ_end_the_run_before_they_are_saved(tmp_path, monkeypatch):
    monkeypatch.setenv("LM_JAX_FAULTS", "flip@step=7:device=5")
    with jax.set_mesh(parallel.make_mesh(config.MeshConfig(data=4, fsdp=1, model=2))):
        with pytest.raises(fingerprint.CopiesError, match="does not hold the bits of") as told:
            run(tmp_path, steps=20, train={"compare_every": 3, "checkpoint_every": 8})
    assert told.value.code == 77 and str(told.value).startswith(str(jax.devices()[5]))
    assert not (tmp_path / "checkpoints" / "8").exists()


def test_the_average_of_the_weights_is_what_is_evaluated():
    state, step = stepper(ema=0.5)
    for seed in range(3):
        state, _ = step(state, batches(seed), jax.random.key(seed))
    shown = update.parameters(update.evaluated(state))
    jax.tree.map(np.testing.assert_array_equal, shown, optim.ema_params(state.opt))
    differs = jax.tree.map(lambda a, b: bool(np.any(a != b)), shown, update.parameters(state.model))
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
