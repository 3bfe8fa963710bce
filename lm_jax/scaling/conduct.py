"""What `python -m lm_jax.sweep` does once its flags are right: points shown, run here or submitted, and their end."""

import shlex
from functools import partial
from pathlib import Path

import jax
import rich.console
from ml_collections import config_flags

from lm_jax.config import Config
from lm_jax.devices import STACKED
from lm_jax.errors import ConfigError
from lm_jax.launchers import LAUNCHERS, slots, submit
from lm_jax.launchers.local import Pool
from lm_jax.preflight import topology
from lm_jax.scaling import records, sweep, watch

EXIT = {"ok": 0, "failed": 1, "full": 74, "stopped": 75}
LIMITS = {"jobs": "0", "retries": "2", "minutes": "0", "stacked": str(STACKED)}


def run(c: Config, values, argv) -> int:
    """Show the points of a sweep, run what has no result yet, and say how all ended; the exit code."""
    jax.config.update("jax_platforms", "cpu")  # accelerators are for the points
    launcher, limits = asked(argv, values)
    out = Path(values.out or f"sweeps/{c.name}")
    points = sweep.points(config_flags.get_config_filename(values["config"]), values.config)
    prices = sweep.Prices(topology.parse(values.topology)) if values.topology else None
    if prices:
        prices.refuse(points)
    overrides = {point.id: point.overrides for point in points}
    found, notes = records.rebuild(out, overrides) if out.exists() else ({}, [])
    states = {point.id: found.get(point.id, {}).get("status") or "waiting" for point in points}
    left = [point for point in points if states[point.id] not in records.ENDED]
    places = slots.slots(int(limits["jobs"])) if launcher == "local" else []
    single = all(len(slot.names) == 1 for slot in places) if places else prices.topology.chips == 1
    jobs = sweep.jobs(points, {point.id for point in left}, argv, out, minutes=limits["minutes"],
                      stacked=limits["stacked"] if single else 0, least=max(1, len(places)))
    console = rich.console.Console()
    console.print(watch.plan(points, states, prices))
    if any(point.begins for point in points):
        say(console, f"{sum(point.begins > 0 for point in points)} points begin as a shorter one: FLOPs of a point are "
                     "those of its whole path, their sum below has every step once")
    say(console, *notes, f"{len(left)} of {len(points)} points are to be run" + pace(found, left))
    if launcher != "local" and left:
        rendered = LAUNCHERS[launcher](jobs, name=c.name, topology=prices.topology, settings=settings(values.settings))
        submit(rendered, Path("sweeps", c.name, launcher), dry_run=values.dry_run)
    if launcher != "local" or values.dry_run:
        return 0
    if left:
        sweep.unchanged(points, found, say=partial(say, console))
    status = run_here(left, jobs, out, places, limits, console) if left else "ok"
    found, _ = records.rebuild(out, overrides)
    say(console, closing(points, found, out, status, argv))
    return EXIT[status]


def asked(argv, values) -> tuple[str, dict[str, float]]:
    """The launcher, and the numbers among the flags; ConfigError for flags that cannot be, or would do nothing."""
    if any(argument.startswith("--workdir") for argument in argv):
        raise ConfigError("--workdir is of one run: the folder of a sweep is --out")
    launcher = sweep.chosen(values.launcher or "local", ("local", *LAUNCHERS), "--launcher")
    idle = ("settings",) if launcher == "local" else ("jobs", "retries")
    for name in idle:
        if values[name].value is not None:
            raise ConfigError(f"--{name} does nothing with --launcher={launcher}: leave it out")
    if launcher != "local" and not values.topology:
        raise ConfigError(f"--launcher={launcher}: on which hardware? Pass --topology={topology.FORMS}")
    return launcher, {name: number(values[name].value or default, f"--{name}") for name, default in LIMITS.items()}


def settings(text: str | None) -> dict[str, str]:
    """'key=value key=value' as a dict; a value with spaces is put in quotes, as in a shell."""
    parts = shlex.split(text or "")
    for part in parts:
        if "=" not in part:
            raise ConfigError(f"--settings={text}: {part!r} is not key=value")
    return dict(part.split("=", 1) for part in parts)


def run_here(points, jobs, out, places, limits, console) -> str:
    """Run jobs on this machine, and show how they do."""
    pool = Pool(jobs, out, places, retries=int(limits["retries"]), say=partial(say, console))
    with watch.Watch(points, out, console, ended=lambda: records.rebuild(out, {})) as show:
        return pool.run(show)


def closing(points, found: dict, out: Path, status: str, argv) -> str:
    """The last lines: how many ended how, what to look at, what to do next."""
    ended = [found[point.id] for point in points if point.id in found]
    of = lambda state: sum(record["status"] == state for record in ended)
    flagged = {flag: sum(flag in record["flags"] for record in ended) for record in ended for flag in record["flags"]}
    lines = [f"{status}: {of('ok')} of {len(points)} points have a loss" + "".join(
        f", {count} {flag}" for flag, count in flagged.items()) + f"; records are in {out / 'runs.jsonl'}"]
    lines += [f"  {record['run']} failed, {record['why']}: {record['last_line']} ({record['log']})"
              for record in ended if record["status"] == "failed"]
    following = f"python -m lm_jax.fit {shlex.quote(str(out / 'runs.jsonl'))}" if status == "ok" else \
        f"{sweep.command(argv)}   # goes on with what is missing"
    return "\n".join([*lines, "next:", f"  {following}"])


def pace(found: dict, left) -> str:
    """How long the rest takes where this folder's runs ended, if any did: steps alone, one after another."""
    ended = [record for record in found.values() if record["status"] == "ok"]
    if not ended or not left:
        return ""
    rate = sum(record["flops"] for record in ended) / sum(record["seconds"] for record in ended)
    seconds = watch.spent(left) / rate
    return f", {watch.duration(seconds)} of steps at the {rate:.3g} FLOP/s of those that ended"


def number(text: str, flag: str) -> float:
    """A flag's number, not below 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value < float("inf"):
        raise ConfigError(f"{flag}={text}: a number, at least 0")
    return value


def say(console, *lines: str):
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
