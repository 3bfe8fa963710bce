"""runs.jsonl: what each point of a sweep came to, one record a point, built from the points' own summaries.

    <out>/sweep.json    every point that was ever asked for: its name and what it overrides
    <out>/runs.jsonl    run params tokens flops loss loss_stderr bits_per_byte lr batch seed status flags ...

The summaries are the truth and the file is written anew, whole, whenever a point ends: a half-written line, or a folder
that is gone, is noticed and told. A record whose folder is gone stays, as it is all that is left of the run.
"""

import contextlib
import fcntl
import json
from pathlib import Path

from lm_jax import config, disk
from lm_jax.errors import REFUSED, ConfigError, DataError
from lm_jax.workdir import plain

COOLED = 0.25  # of the peak: a run that ends at a higher rate still has loss to lose (Hägele et al. 2024)
SHORTEST = 0.05  # share of the steps over which a cool-down earns its gain
ENDED = ("ok", "diverged")
CONVENTION = "products of the model, attention by its mask, three passes"


def rebuild(out: Path, asked: dict[str, dict]) -> tuple[dict[str, dict], list[str]]:
    """Write runs.jsonl from what is in the points' folders, and sweep.json with what is `asked` for, {name: overrides}.

    Returns the records by name, and what must be told. Records are those of all plans that this folder has seen.
    """
    with _alone(out):
        asked = _earlier(out / "sweep.json") | asked
        before, notes = _read(out / "runs.jsonl")
        found = {}
        for folder in sorted((out / "points").glob("*")):
            one, problem = of_folder(folder, asked.get(folder.name, {}))
            notes += [problem] if problem else []
            if one:
                found[folder.name] = one
        for name, record in before.items():
            if not (out / "points" / name).exists() and record.get("status") in ENDED:
                notes.append(f"points/{name} is gone; its record stays: delete its line in runs.jsonl to run it again")
                found[name] = record
        found = {name: found[name] for name in sorted(found, key=lambda name: found[name]["flops"] or 0)}
        _edges(list(found.values()))
        _write(out / "sweep.json", [json.dumps(asked, indent=1), "\n"])
        _write(out / "runs.jsonl", [json.dumps(record) + "\n" for record in found.values()])
    revisions = {record["code_revision"] for record in found.values()} - {None}
    if len(revisions) > 1:
        notes.append(f"points come from {len(revisions)} revisions of the code ({', '.join(sorted(revisions))}): a fit "
                     "takes them one at a time (--where=code_revision=...)")
    return found, notes


def of_folder(folder: Path, overrides: dict) -> tuple[dict | None, str]:
    """A point's record, None while it has not ended; and what is wrong with its files.

    A result without a manifest that tells what it is of is set aside, so that the point goes on from its checkpoint.
    """
    try:
        summary, manifest, failure = (disk.read_json(folder / f"{name}.json")
                                      for name in ("summary", "manifest", "failure"))
        if not summary or summary.get("status") not in ENDED:
            return failure and _failed(folder.name, failure, manifest, overrides), ""
        return plain(_record(folder.name, summary, manifest, overrides)), ""
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        with contextlib.suppress(FileNotFoundError):
            (folder / "summary.json").rename(folder / "summary.json.bad")
        return None, (f"points/{folder.name} has a damaged record ({type(error).__name__}: {error}): it goes on from "
                      "its last checkpoint")


def _record(name: str, summary: dict, manifest: dict, overrides: dict) -> dict:
    c, n = manifest["config"], manifest["parameters"]
    return {
        "run": name, "params": {"total": n["total"], "non_embedding": n["non_embedding"],
                                "effective": manifest["flops_per_token"] / 6},
        "tokens": summary["tokens"], "flops": summary["flops"],
        "flops_spent": summary.get("flops_spent", summary["flops"]),  # equal, before runs could share a trunk
        "flops_convention": CONVENTION,
        "loss": summary.get("val_loss"), "loss_stderr": summary.get("val_loss_stderr"),
        "bits_per_byte": summary.get("val_bits_per_byte"), "lr": c["optim"]["lr"],
        "batch": summary["tokens"] // max(summary["steps"], 1), "seed": c["seed"], "status": summary["status"],
        "flags": flags(c, summary["status"]), "epochs": summary.get("epochs"),
        "tokenizer": manifest["tokenizer"], "data_digest": manifest["data_digest"],
        "code_revision": manifest["code_revision"], "seconds": summary["seconds"], "steps": summary["steps"],
        "true_loss": summary.get("true_loss"), "config": overrides}


def flags(c: dict, status: str) -> list[str]:
    """What a reader must know of a run before its loss is believed, from its config (nested) and outcome."""
    o, steps = c["optim"], c["train"]["steps"]
    last = {"constant": 1.0, "rsqrt": (max(1, o["warmup"]) / steps) ** 0.5}.get(o["schedule"], o["floor"])
    short = o["schedule"] == "wsd" and o["decay"] < SHORTEST
    uncooled = not o["ema"] and (last > COOLED or short or o["warmup"] >= steps)  # an average of weights is cool too
    return ["diverged"] * (status == "diverged") + ["under-cooled"] * uncooled


def _edges(records: list[dict]):
    """Flag the best of runs that differ in their learning rate where it has the lowest or highest of all."""
    groups = {}
    for record in records:
        record["flags"] = [flag for flag in record["flags"] if flag != "edge-of-lr-grid"]
        if record["status"] in ENDED:
            key = config.digest([record[name] for name in ("params", "tokens", "batch", "seed", "data_digest")])
            groups.setdefault(key, []).append(record)
    for group in groups.values():
        rates = sorted({record["lr"] for record in group})
        ended = [record for record in group if record["loss"] is not None and "diverged" not in record["flags"]]
        best = min(ended, key=lambda record: record["loss"], default=None)
        if best and len(rates) > 1 and best["lr"] in (rates[0], rates[-1]):
            best["flags"].append("edge-of-lr-grid")


def _failed(name: str, failure: dict, manifest: dict | None, overrides: dict) -> dict:
    return {"run": name, "status": "failed", "flags": ["failed"], "loss": None, "flops": None, "config": overrides,
            "why": failure["why"], "last_line": failure["last_line"], "tries": failure["tries"], "log": failure["log"],
            "code_revision": (manifest or {}).get("code_revision")}


def _read(path: Path) -> tuple[dict[str, dict], list[str]]:
    """Records of the file as it is, by name; and its lines that are none."""
    found, notes = {}, []
    lines = path.read_bytes().splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            found[record["run"]] = record
        except (ValueError, KeyError, TypeError):
            notes.append(f"line {number} of runs.jsonl was half-written or no record: the file was made anew from the "
                         "points' summaries")
    return found, notes


def _earlier(path: Path) -> dict[str, dict]:
    """What was asked for before."""
    try:
        return disk.read_json(path) or {}
    except ValueError as error:
        raise DataError(f"{path} is no JSON ({error}): delete it; results stay, and points that are still in the "
                        "config get their overrides again") from error


def _write(path: Path, lines: list[str]):
    """A file whole, if it is not that already."""
    if not path.exists() or path.read_text("utf-8", "replace") != "".join(lines):
        disk.replace(path, lines)


@contextlib.contextmanager
def _alone(out: Path):
    """One writer at a time; another waits."""
    try:
        (out / "queue").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        raise ConfigError(f"--out={out} cannot be used: {error}. Pass a folder that takes files") from error
    with open(out / "queue" / "records.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
