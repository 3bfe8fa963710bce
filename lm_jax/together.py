"""Train several points of a sweep in one process, where that is cheaper and their numbers stay what they are alone.

    python -m lm_jax.together --config=configs/sweeps/tiny.py --out=sweeps/tiny --points=0123456789ab,ba9876543210

Points that differ in length alone share a trunk: the shortest is trained first, and each longer one begins as the one
before it was when its cool-down began. Small points that differ in seed, learning rate, weight decay or initial
weights are trained as one program, on one device. `python -m lm_jax.sweep` starts this; what has a result is left as it
is. Exit codes as of lm_jax.train, 78 if any diverged.
"""

from dataclasses import replace
from pathlib import Path

import jax
from ml_collections import config_flags

from lm_jax import config, errors, hosts, parallel, signals
from lm_jax.checkpoint import Checkpoints
from lm_jax.clock import Clock
from lm_jax.errors import ConfigError
from lm_jax.launchers.job import outcome
from lm_jax.recipes import run
from lm_jax.scaling import ladder, sweep, together
from lm_jax.workdir import Workdir

EXIT = {"ok": 0, "stopped": 75, "diverged": 78}
FLAGS = {"out": "the sweep's folder", "points": "ids, with commas between"}


def main(argv):
    c, values = config.parse(argv, doc=__doc__, **FLAGS, **hosts.FLAGS)
    hosts.start(values.coordinator, values.processes, values.process)
    points = asked(sweep.points(config_flags.get_config_filename(values["config"]), values.config), values)
    mesh, out, statuses = parallel.use(c.mesh), Path(values.out), set()
    with signals.ending():
        for batch, stack in batches(points, out):
            statuses |= trained(batch, out, mesh, stack=stack)
            if "stopped" in statuses:
                break
    status = next((status for status in ("stopped", "diverged") if status in statuses), "ok")
    hosts.exchange("end", status)
    return EXIT[status]


def batches(points, out: Path):
    """What is trained at once, shorter points before the longer ones that begin as they do; and whether as a stack."""
    for group in sweep.groups(points, sweep.STACKED):
        small = ladder.counts(group[0].planned)["total"] <= sweep.STACKED
        stack = small and jax.device_count() == 1  # also of one: its lengths are one program, which makes many steps
        for steps in sorted({point.config.train.steps for point in group}):
            todo = [point for point in group if point.config.train.steps == steps
                    and not outcome(out / "points" / point.id / "summary.json")]
            yield from ([(todo, True)] if todo else []) if stack else [([point], False) for point in todo]


def trained(points, out: Path, mesh: dict, *, stack: bool) -> set[str]:
    """Train points of one length, in a stack or a single one on the mesh; how they ended."""
    members = []
    for point in points:
        workdir = Workdir(out / "points" / point.id, writes=jax.process_index() == 0)
        clock = Clock()
        recipe = run.opened(point.config, workdir, clock, hosts.mark())
        if members and recipe.store.digest == members[0].recipe.store.digest:
            recipe = replace(recipe, store=members[0].recipe.store)
        members.append(together.Member(recipe, workdir, clock, beginning(point, out)))
    if stack:
        summaries = together.train(members, mesh)
    else:
        summaries = [run.train(one.recipe, one.workdir, one.clock, mesh, start=one.start)[0] for one in members]
    for point, member, summary in zip(points, members, summaries):
        hosts.say(f"{point}: {summary['status']} after {summary['steps']:,} steps"
                  + (f", validation loss {summary['val_loss']:.4f}" if "val_loss" in summary else ""))
        member.clock.close()
        member.workdir.close()
    return {summary["status"] for summary in summaries}


def beginning(point: sweep.Point, out: Path) -> str | None:
    """The sibling's folder, if it has kept what the point can begin as; else the point is trained from its first step.
    """
    folder = out / "points" / point.sibling
    kept = point.begins and point.begins in Checkpoints(folder / "checkpoints").steps()
    return hosts.exchange("beginning", str(folder) if kept else "")[0] or None  # as process 0 sees the disk


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


if __name__ == "__main__":
    errors.run(main)
