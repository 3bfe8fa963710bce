"""What a run's folder is, whether it is whole, and what a restart would do: read, and nothing changed."""

import fcntl
import json
from pathlib import Path

from lm_jax import disk, seal
from lm_jax.checkpoint import Checkpoints
from lm_jax.config import from_dict
from lm_jax.errors import ConfigError
from lm_jax.lease import HOST
from lm_jax.recipes.pretrain import row_lengths

BEFORE = ("start", "data", "restore", "compile")  # phases before a start trains
SHARE = 0.001  # of the wall clock, below which a phase is not worth a word


def report(folder: Path) -> tuple[list[str], int]:
    """Lines for people, and the exit code that a restart would end with: 0 it trains or is done, 2, 78, 79.

    ConfigError where there is no run.
    """
    recorded = _json(folder / "config.json")
    if not isinstance(recorded, dict):
        raise ConfigError(f"--doctor={folder}: " + ("there is no such folder" if not folder.is_dir() else
                          "its config.json is " + ("damaged" if recorded else "missing") + ": it is no run's"))
    c, rows = from_dict(recorded), _rows(folder / "metrics.jsonl")
    lines = [f"{folder}: {c.name}, {c.train.steps:,} steps of {c.train.batch} rows of {sum(row_lengths(c)):,} tokens"]
    lines += [*_manifest(folder), *_metrics(folder, rows)]
    whole, damaged, told = _checkpoints(folder)
    lines += told
    summary = _json(folder / "summary.json")
    holder = _holder(folder)
    if holder:
        return [*lines, f"in use by {holder}: a second trainer is refused"], ConfigError.code
    if not whole and damaged:
        return [*lines, "a restart ends with code 79: no checkpoint is intact; bring one back, or remove them to start "
                        "afresh"], 79
    if isinstance(summary, dict) and summary.get("status") == "ok":
        return [*lines, f"done: validation loss {summary['val_loss']:.4f}; a restart evaluates again and changes "
                        "nothing else"], 0
    if isinstance(summary, dict) and summary.get("status") == "diverged":
        return [*lines, "it diverged, and a restart would again (code 78): begin another run with a lower learning "
                        "rate, or go on with more of train.rollbacks"], 78
    if not whole:
        return [*lines, "a restart begins at the first step: there is no checkpoint"], 0
    gone = max(0, max((row["step"] for row in rows), default=0) - whole[-1])
    return [*lines, f"a restart goes on from step {whole[-1]:,}"
                    + (f", and makes {gone:,} steps again" if gone else "")], 0


def _manifest(folder: Path) -> list[str]:
    found = _json(folder / "manifest.json")
    if not isinstance(found, dict):
        return ["manifest.json is " + ("damaged: a restart writes it anew" if found else "missing: it ended early")]
    return [f"{found['parameters']['total']:,} parameters, data {found['data_digest']}, code {found['code_revision']}, "
            f"started {len(found['starts'])} times, last on {found['devices']} x {found['device']}"]


def _metrics(folder: Path, rows: list[dict]) -> list[str]:
    """How far the rows go, and where the time went."""
    steps = [row["step"] for row in rows if "tag" not in row]
    lines = [f"metrics.jsonl: {len(steps):,} rows up to step {max(steps, default=0):,}"]
    if len(set(steps)) < len(steps):
        lines[0] += f", {len(steps) - len(set(steps))} of them twice"
    if skipped := max((row.get("skipped") or 0 for row in rows), default=0):
        lines += [f"{skipped:.0f} updates were refused (not finite, or spikes)"]
    for one in _record(folder / "summary.json").get("rollbacks", ()):
        lines += [f"went back from step {one['from']:,} to {one['to']:,} for such updates, and on with later batches"]
    phases = _json(folder / "phases.json")
    if isinstance(phases, dict):
        seconds, wall = phases["seconds"], sum(phases["seconds"].values())
        shares = sorted(((value / wall, name) for name, value in seconds.items() if value > SHARE * wall), reverse=True)
        lines += [f"{wall:,.0f} s of wall clock: " + ", ".join(f"{name} {share:.1%}" for share, name in shares)]
        if starts := len(_record(folder / "manifest.json").get("starts", ())):
            each = sum(seconds.get(phase, 0.0) for phase in BEFORE) / starts
            lines += [f"a start took {each:.1f} s until it trained ({', '.join(BEFORE)}), the mean of {starts}"]
    return lines


def _checkpoints(folder: Path) -> tuple[list[int], int, list[str]]:
    """Steps of those that are whole, how many are not, and a line of each."""
    found = Checkpoints(folder / "checkpoints")
    whole, lines = [], []
    for path in found.numbered():
        step = int(path.name)
        try:
            seal.verify(path, step=step)
            whole.append(step)
            lines.append(f"checkpoint {step:,}: whole, every file's SHA-256 is that of its manifest")
        except seal.DamagedError as error:
            lines.append(f"checkpoint {step:,}: damaged: {error}; a restart sets it aside")
    aside = sorted(path.name for path in found.folder.glob("*.bad*"))
    lines += [f"set aside as damaged: {', '.join(aside)}"] if aside else []
    return whole, len(lines) - len(whole), lines


def _holder(folder: Path) -> str:
    """Who has the folder, if anyone on this host does; a lease of another host is told as it stands."""
    lock, lease = folder / "lock", _json(folder / "lease")
    if lock.exists():
        with open(lock) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return " ".join(file.read().split())
    elsewhere = isinstance(lease, dict) and lease.get("host") != HOST  # here it would have the lock too
    return f"process {lease['process']} on {lease['name']}, if it still lives" if elsewhere else ""


def _rows(path: Path) -> list[dict]:
    """The whole rows of metrics.jsonl."""
    found = []
    if path.exists():
        for line in path.read_text(errors="replace").splitlines():
            try:
                row = json.loads(line)
                found += [row] if isinstance(row, dict) and "step" in row else []
            except ValueError:
                pass  # cut off by a kill: a restart takes it away
    return found


def _record(path: Path) -> dict:
    """A record; one without entries where it is missing or damaged."""
    found = _json(path)
    return found if isinstance(found, dict) else {}


def _json(path: Path):
    """What a file holds; None where it is missing, a string where it is damaged."""
    try:
        return disk.read_json(path)
    except ValueError as error:
        return str(error) or "damaged"
