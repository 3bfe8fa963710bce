"""Run what a sweep's config varies: points that are done never again, points that broke off from where they were.

    python -m lm_jax.sweep --config=configs/sweeps/tiny.py

A sweep's config is a config whose file also has get_points(c), a list of overrides, one a point. The same command goes
on where the last one ended, and runs what was added since; several at once share the work. The folder (`--out`,
default sweeps/<config name>) gets runs.jsonl, a record a point, which `python -m lm_jax.fit` reads, and points/<id>/,
the folder of each run. Exit codes: 0 every point has a result, 1 some were given up (the same command tries them
again), 2 the sweep cannot run, 74 no room on a disk, 75 stopped, what ran has saved.
"""

from pathlib import Path

import jax
import rich.console
from ml_collections import config_flags

from lm_jax import config, errors
from lm_jax.errors import ConfigError
from lm_jax.launchers import slots
from lm_jax.launchers.local import Pool, outcome
from lm_jax.preflight import topology
from lm_jax.scaling import records, sweep, watch

EXIT = {"ok": 0, "failed": 1, "full": 74, "stopped": 75}
FLAGS = {
    "out": "the sweep's folder; default sweeps/<config name>",
    "launcher": "where points run: local",
    "jobs": "points at once on this machine; default one, or one for each accelerator",
    "retries": "further attempts at a point that crashes; default 2",
    "minutes": "time limit of an attempt at a point; default none",
    "topology": f"hardware that points must fit, and are priced for: {topology.FORMS}",
}


def main(argv):
    jax.config.update("jax_platforms", "cpu")  # accelerators are for the points
    c, values = config.parse(argv, doc=__doc__, switches={"dry_run": "show the points and what they take, run nothing"},
                             **FLAGS)
    if any(argument.startswith("--workdir") for argument in argv):
        raise ConfigError("--workdir is of one run: the folder of a sweep is --out")
    sweep.chosen(values.launcher or "local", LAUNCHERS, "--launcher")
    limits = {name: number(values[name].value or default, f"--{name}") for name, default in LIMITS.items()}
    out = Path(values.out or f"sweeps/{c.name}")
    path = config_flags.get_config_filename(values["config"])
    points = sweep.points(path, values.config)
    prices = sweep.Prices(topology.parse(values.topology)) if values.topology else None
    console = rich.console.Console()

    def say(line):
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    jobs = sweep.jobs(points, argv, out, minutes=limits["minutes"])
    asked = {point.id: point.overrides for point in points}
    found, notes = records.rebuild(out, asked) if out.exists() else ({}, [])
    states = {job.id: outcome(job) or found.get(job.id, {}).get("status") or "waiting" for job in jobs}
    left = [job for job in jobs if states[job.id] not in records.ENDED]
    if prices:
        prices.refuse(points)
    console.print(watch.plan(points, states, prices))
    for line in (*notes, f"{len(left)} of {len(points)} points are to be run"):
        say(line)
    if values.dry_run:
        return 0
    if left:
        sweep.unchanged(points, found, say=say)
    status = run_here(points, left, out, limits, console) if left else "ok"
    found, _ = records.rebuild(out, asked)
    say(closing(points, found, out, status, argv))
    return EXIT[status]


def run_here(points, jobs, out, limits, console) -> str:
    """Run jobs on this machine, and show how they do."""
    ids = {job.id for job in jobs}
    pool = Pool(jobs, out, slots.slots(int(limits["jobs"])), retries=int(limits["retries"]),
                say=lambda line: console.print(line, markup=False, highlight=False))
    with watch.Watch([point for point in points if point.id in ids], out, console,
                     ended=lambda: records.rebuild(out, {})) as show:
        return pool.run(show)


def closing(points, found: dict, out: Path, status: str, argv) -> str:
    """The last lines: how many ended how, what to look at, what to do next."""
    ended = [found[point.id] for point in points if point.id in found]
    of = lambda state: sum(record["status"] == state for record in ended)
    flagged = {flag: sum(flag in record["flags"] for record in ended) for record in ended for flag in record["flags"]}
    lines = [f"{status}: {of('ok')} of {len(points)} points have a loss" + "".join(
        f", {count} {flag}" for flag, count in flagged.items()) + f"; records are in {out / 'runs.jsonl'}"]
    lines += [f"  {record['run']} failed, {record['why']}: {record['last_line']} (points/{record['run']}/log.txt)"
              for record in ended if record["status"] == "failed"]
    following = f"python -m lm_jax.fit {out / 'runs.jsonl'}" if status == "ok" else \
        f"{sweep.command(argv)}   # goes on with what is missing"
    return "\n".join([*lines, "next:", f"  {following}"])


def number(text: str, flag: str) -> float:
    """A flag's number, not below 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value < float("inf"):
        raise ConfigError(f"{flag}={text}: a number, at least 0")
    return value


LAUNCHERS = ("local",)
LIMITS = {"jobs": "0", "retries": "2", "minutes": "0"}

if __name__ == "__main__":
    errors.run(main)
