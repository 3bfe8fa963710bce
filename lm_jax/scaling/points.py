"""What `python -m lm_jax.together` does once its flags are right: points by their lengths, in stacks or one by one."""

from dataclasses import replace
from pathlib import Path

import jax
from ml_collections import config_flags

from lm_jax import faults, hosts, parallel, peers, seal, signals
from lm_jax.checkpoint import Checkpoints
from lm_jax.clock import Clock
from lm_jax.config import Config
from lm_jax.devices import STACKED
from lm_jax.errors import ConfigError, Failure
from lm_jax.launchers.job import outcome
from lm_jax.recipes import run as runs
from lm_jax.scaling import ladder, sweep, together
from lm_jax.workdir import Workdir


def run(c: Config, values) -> int:
    """Train the points that are asked for and have no result; the exit code."""
    faults.planned()
    hosts.start(values.coordinator, values.processes, values.process, deterministic=c.train.deterministic)
    points = asked(sweep.points(config_flags.get_config_filename(values["config"]), values.config), values)
    out, statuses, failures = Path(values.out), set(), []
    with signals.ending():
        for batch, stack in batches(points, out, float(values.stacked or STACKED)):
            for ended in trained(batch, out, stack=stack):
                if isinstance(ended, Failure):
                    failures.append(ended)
                else:
                    statuses.add(ended)
            if "stopped" in statuses:
                break
        status = next((status for status in ("stopped", "diverged") if status in statuses), "ok")
        peers.exchange("end", status)
    if failures and status != "stopped":
        raise failures[0]
    return runs.EXIT[status]


def batches(points, out: Path, stacked: float):
    """What is trained at once, shorter points before the longer ones that begin as they do; and whether as a stack."""
    for group in sweep.groups(points, stacked):
        small = ladder.counts(group[0].planned)["total"] <= stacked
        stack = small and jax.device_count() == 1  # also of one: its lengths are one program, which makes many steps
        for steps in sorted({point.config.train.steps for point in group}):
            todo = unfinished([point for point in group if point.config.train.steps == steps], out)
            yield from ([(todo, True)] if todo else []) if stack else [([point], False) for point in todo]


def unfinished(points, out: Path) -> list[sweep.Point]:
    """Those that have no result, as process 0 sees the disk."""
    todo = ",".join(point.id for point in points if not outcome(out / "points" / point.id / "summary.json"))
    told = peers.exchange("todo", todo)[0].split(",")
    return [point for point in points if point.id in told]


def trained(points, out: Path, *, stack: bool) -> list[str | Failure]:
    """Train points of one length, in a stack or a single one on the mesh; of each how it ended, or why it could not
    begin, which keeps no other from it."""
    mesh, members, found = parallel.use(points[0].config.mesh), {}, {}
    with Clock() as clock:
        for point in points:
            workdir = Workdir(out / "points" / point.id, writes=jax.process_index() == 0)
            try:
                recipe = runs.opened(point.config, workdir, clock, hosts.mark())
            except Failure as reason:
                found[point.id] = reason
                continue
            if members and recipe.store.digest == (first := next(iter(members.values())).recipe).store.digest:
                recipe = replace(recipe, store=first.store)
            members[point.id] = together.Member(recipe, workdir, beginning(point, out))
        if stack and members:
            found |= dict(zip(members, together.train(list(members.values()), clock, mesh)))
        elif members:
            (point, one), = members.items()
            found[point], _ = runs.train(one.recipe, one.workdir, clock, mesh, start=one.start)
    for point in points:
        if point.id in members:
            members[point.id].workdir.close()
        hosts.say(f"{point}: {told(found[point.id])}")
    return [ended if isinstance(ended, Failure) else ended["status"] for ended in found.values()]


def told(ended: dict | Failure) -> str:
    if isinstance(ended, Failure):
        return f"cannot be trained: {ended}"
    return f"{ended['status']} after {ended['steps']:,} steps" + (
        f", validation loss {ended['val_loss']:.4f}" if "val_loss" in ended else "")


def beginning(point: sweep.Point, out: Path) -> str | None:
    """The sibling's folder, if it has kept what the point can begin as; else the point is trained from its first step.
    """
    folder, kept = out / "points" / point.sibling, False
    if point.begins and point.begins in Checkpoints(folder / "checkpoints").steps():
        try:
            seal.verify(folder / "checkpoints" / str(point.begins), step=point.begins)
            kept = True
        except seal.DamagedError as damage:
            hosts.say(f"{point} begins at its first step: checkpoint {point.begins} of {folder} is damaged: {damage}")
    seen = peers.exchange("beginning", str(folder) if kept else "", limit=peers.LONG)
    return seen[0] or None  # as process 0 sees the disk


def asked(points, values) -> list[sweep.Point]:
    """The points of --points; ConfigError for one that the config does not have."""
    if not values.out or not values.points:
        raise ConfigError("pass --out, the sweep's folder, and --points, ids with commas between")
    known = {point.id: point for point in points}
    for name in values.points.split(","):
        if name not in known:
            raise ConfigError(f"--points: the config has no point {name}; it has {', '.join(known)}. A config that is "
                              "drawn anew at each reading has no lasting points")
    return [known[name] for name in values.points.split(",")]
