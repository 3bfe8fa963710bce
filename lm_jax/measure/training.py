"""How fast a config trains: its rate against the limits, where a step's time goes, and its memory against the plan."""

import functools
import json
import statistics

import jax
import jax.numpy as jnp

from lm_jax import devices, hosts, log, parallel, update
from lm_jax.measure import ops, timing
from lm_jax.measure.figures import Figure, duration, median, rate
from lm_jax.measure.limits import Limits
from lm_jax.measure.subject import Subject, unwatched
from lm_jax.preflight import memory

GIB = devices.GIB


def measured(subject: Subject, limits: Limits, *, turns: int = timing.TURNS) -> list[Figure]:
    """Everything about a step of the subject."""
    batch = hosts.put_batch(subject.pretraining.loader.batch(0))
    compiled = subject.trainer.step.lower(subject.trainer.state, batch, jax.random.key(0)).compile()
    subject.trainer.step = compiled  # so that it is compiled once
    _step(subject, batch, 3)
    used = _memory(subject, compiled)  # before anything else has used any
    seconds = _seconds(subject, batch, turns, _pieces)
    return [*_rates(subject, limits, seconds["loop"]), *_split(seconds), *used,
            *ops.costliest(compiled, lambda: _step(subject, batch), limits, dtype=_dtype(subject))]


def gap(subject: Subject, *, turns: int = timing.TURNS) -> list[Figure]:
    """What the trainer's loop costs beside its steps: the last two figures of a step's split."""
    seconds = _seconds(subject, hosts.put_batch(subject.pretraining.loader.batch(0)), turns, lambda *_: {})
    return [duration("steps sent at once", seconds["step"]), *_host(seconds)]


def _rates(subject: Subject, limits: Limits, loop: list[float]) -> list[Figure]:
    """Tokens and FLOPs a second, and what share of a peak that is."""
    each, count = subject.flops, jax.device_count()
    peak, kind = limits.flops[_dtype(subject)], jax.devices()[0].device_kind
    share = lambda one: [100 * each / (one * count * s) for s in loop]
    many = f" of {count} devices" if count > 1 else ""
    found = [rate("tokens", subject.recipe.tokens, loop, "tokens/s", f"{subject.recipe.tokens:,} a step"),
             rate("model FLOPs", each, loop, "FLOP/s", f"{each:.4g} a step, causal pairs alone"),
             median("MFU, measured peak", share(peak), "%", f"of {peak / 1e12:.3g} TFLOP/s, the best GEMM{many}")]
    if nominal := devices.peak_flops(kind):
        found += [Figure("peak", nominal, "FLOP/s", f"{kind}, bfloat16", nominal=True),
                  median("MFU, nominal peak", share(nominal), "%", f"of the nominal peak{many}")]
    return found


def _split(seconds: dict[str, list[float]]) -> list[Figure]:
    """Where a step's time goes; parts are differences of what was timed in turns, and add up to the loop's."""
    less = lambda more, fewer: [a - b for a, b in zip(seconds[more], seconds[fewer])]
    whole, *rest = _host(seconds)
    return [whole, duration("  forward", seconds["forward"], "the loss alone"),
            duration("  backward", less("gradient", "forward"), "gradients less forward"),
            duration("  optimizer", less("step", "gradient"), "the whole step less gradients"), *rest]


def _host(seconds: dict[str, list[float]]) -> list[Figure]:
    """The loop's step, and what of it is no device's."""
    gap = [loop - step - wait for loop, step, wait in zip(seconds["loop"], seconds["step"], seconds["wait"])]
    share = statistics.median(gap) / statistics.median(seconds["loop"])
    waited = statistics.median(seconds["wait"]) / statistics.median(seconds["loop"])
    return [duration("step in the trainer's loop", seconds["loop"], "batches, metrics and records included"),
            duration("  data", seconds["wait"], f"waited for the loader: {waited:.2%}"),
            duration("  host gap", gap, f"the loop less steps sent at once and the wait: {share:.2%}")]


def _seconds(subject: Subject, batch, turns: int, pieces) -> dict[str, list[float]]:
    """Seconds a step of each part, timed in turns: steps of the trainer's own loop, steps sent one behind the other,
    and `pieces`: gradients, the loss."""
    parts, pieces = subject.config.train.microbatches, pieces(subject, batch)
    with subject.recipe.batches(0) as batches:
        send = functools.partial(subject.trainer.send, batches, unwatched(subject))
        for _ in range(3):
            send()
        subject.trainer.meter.flush()
        each = max(min(timing.alone(lambda: _step(subject, batch), turns=2)), 1e-6)
        count = timing.calls(each)
        found = {name: [] for name in ("loop", "wait", "step", *pieces)}
        for run in pieces.values():
            run()
        for _ in range(turns):
            for name, value in zip(("loop", "wait"), _loop(subject, send, count)):
                found[name].append(value)
            found["step"].append(timing.once(lambda: _step(subject, batch, count)) / count)
            for name, run in pieces.items():
                found[name].append(parts * statistics.median(timing.once(run) for _ in range(min(count, 5))))
    return found


def _loop(subject: Subject, send, count: int) -> tuple[float, float]:
    """Seconds a step of the trainer's loop in its stride, from one reading of a step's numbers to the next, and those
    of it that it waited for data, as the run's own record has them."""
    meter, metrics = subject.trainer.meter, subject.trainer.workdir.metrics
    meter.restart()
    send()
    before = subject.trainer.done
    seconds = timing.once(lambda: [send() for _ in range(count)]) / count
    meter.flush()
    rows = [row for row in map(json.loads, metrics.open()) if row["step"] > before]
    return seconds, statistics.fmean(row["data_wait"] for row in rows)


def _step(subject: Subject, batch, count: int = 1):
    """So many steps, one behind the other, until the last is done."""
    run, key = subject.trainer, jax.random.key(0)
    for _ in range(count):
        run.state, _ = run.step(run.state, batch, key)
    jax.block_until_ready(run.state)


def _pieces(subject: Subject, batch) -> dict:
    """The loss and the gradients of a microbatch, each with what it takes to call it."""
    run, loss, key = subject.trainer, subject.recipe.loss, jax.random.key(0)
    part = jax.jit(lambda batch: jax.tree.map(
        lambda a: parallel.split(a, subject.config.train.microbatches, axis=0)[0], batch))(batch)

    def scored(params, model):
        metrics = loss(update.with_parameters(model, params), part, key)
        return metrics["objective"].total

    forward = jax.jit(lambda model: scored(update.parameters(model), model))
    gradient = jax.jit(lambda model: jax.value_and_grad(scored)(update.parameters(model), model))
    return {name: functools.partial(lambda f: jax.block_until_ready(f(run.state.model)), f)
            for name, f in (("forward", forward), ("gradient", gradient))}


def _memory(subject: Subject, compiled) -> list[Figure]:
    """Bytes of a device: as planned, as the compiler laid them out, as the device says that it had them."""
    mesh = jax.sharding.get_mesh()
    mesh = parallel.make_mesh(subject.config.mesh, jax.devices()[:1]) if mesh.empty else mesh
    planned, laid = memory.estimate(subject.config, mesh)["total"], compiled.memory_analysis()
    program = (laid.argument_size_in_bytes + laid.output_size_in_bytes + laid.temp_size_in_bytes
               - laid.alias_size_in_bytes)
    found = [Figure("memory as planned", planned / GIB, "GiB", "lm_jax.preflight.memory, counted by types"),
             Figure("memory as compiled", program / GIB, "GiB",
                    f"arguments, results and temporaries; the plan is {planned / program - 1:+.1%} off")]
    if peak := log.peak_memory().get("device_memory_peak"):
        found.append(Figure("memory of the device", peak / GIB, "GiB",
                            f"its peak in this process; the plan is {planned / peak - 1:+.1%} off"))
    return found


def _dtype(subject: Subject) -> str:
    return jnp.dtype(subject.config.model.dtype).name
