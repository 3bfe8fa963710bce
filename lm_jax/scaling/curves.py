"""Training curves: a table's own rows where a run has several, or what a sweep's runs recorded in folders beside it.

    <folder of runs.jsonl>/points/<run>/metrics.jsonl manifest.json

Only the end of a run, its learning rate down, is a loss that so many tokens can reach: inside a curve the loss is above
that, along cosine and linear schedules by less and less (Hoffmann et al. 2022 read such curves as they are), along
the trunk of a WSD schedule by all that a cool-down gains. `Curve.falls` tells the ones from the others.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

CURVE = 4  # points that are a training curve, not repeats of its end
NEAR, LATE = 0.15, 0.02  # a point of a smoothed curve is the mean of rows over 15 % of its tokens, or 2 % of the run
FALLING = ("cosine", "linear")  # schedules whose learning rate falls all the way


@dataclass(frozen=True)
class Curve:
    """Loss along one run, and the loss that the table has of its end. C and D rise."""

    run: str
    N: float
    D: np.ndarray
    C: np.ndarray
    loss: np.ndarray
    end: float
    falls: bool  # whether the learning rate fell all the way
    smoothed: bool = False


def within(columns: Mapping[str, np.ndarray]) -> tuple[Curve, ...]:
    """Runs that have CURVE rows or more in the table."""
    found = []
    for run in np.unique(columns["run"]) if "run" in columns else ():
        rows = np.flatnonzero(columns["run"] == run)
        rows = rows[np.argsort(columns["D"][rows], kind="stable")]
        if len(np.unique(columns["D"][rows])) >= CURVE:
            D, C, loss = (columns[name][rows] for name in ("D", "C", "loss"))
            found.append(Curve(str(run), float(columns["N"][rows[0]]), D, C, loss, float(loss[-1]), falls=True))
    return tuple(found)


def beside(folder: Path, columns: Mapping[str, np.ndarray], *, loss: str) -> tuple[tuple[Curve, ...], list[str]]:
    """Curves that the table's runs recorded, smoothed, and what must be told of them.

    Runs of one size and seed may share a trunk, which the longest of them has: the others begin where they left it.
    """
    found, spoilt, seen = [], [], {}
    for i in np.argsort(-columns["D"], kind="stable") if "run" in columns else ():
        place = folder / "points" / str(columns["run"][i])
        rows, bad = _rows(place / "metrics.jsonl", loss)
        spoilt += [f"{place.name} ({bad})"] if bad else []
        shared = seen.setdefault((columns["N"][i], columns["seed"][i] if "seed" in columns else ""), set())
        own = next((k for k, row in enumerate(rows) if row not in shared), len(rows))
        shared.update(rows)
        if own < len(rows):
            D, losses = _smooth(np.array(rows[max(own - 1, 0):]), whole=rows[-1][0])
            if len(D) >= CURVE:
                found.append(Curve(place.name, float(columns["N"][i]), D, D * columns["C"][i] / columns["D"][i], losses,
                                   float(columns["loss"][i]), _schedule(place) in FALLING, smoothed=True))
    told = [f"rows of metrics.jsonl that are none are passed over: {', '.join(spoilt[:5])}"
            + (f" and {len(spoilt) - 5} more runs" if len(spoilt) > 5 else "")] if spoilt else []
    return tuple(found), told


def _rows(path: Path, loss: str) -> tuple[list[tuple[float, float]], int]:
    """(tokens, loss) of training steps in the order of tokens, evaluations left out; and how many lines are no rows."""
    found, bad = {}, 0
    for line in path.read_bytes().split(b"\n") if path.is_file() else ():
        try:
            row = json.loads(line) if line.strip() else {"tag": ""}
            if "tag" not in row and row[loss] is not None and math.isfinite(row[loss]) and row["tokens"] > 0:
                found[float(row["tokens"])] = float(row[loss])
        except (ValueError, KeyError, TypeError):
            bad += 1
    return sorted(found.items()), bad


def _smooth(rows_n2: np.ndarray, *, whole: float) -> tuple[np.ndarray, np.ndarray]:
    """Means of tokens (in log) and losses over steps of NEAR of the tokens so far, or of LATE of the `whole` run where
    that is shorter, as a cool-down is; steps without a row have no point."""
    D, losses = rows_n2.T
    turn = LATE / NEAR * whole
    place = np.where(D < turn, np.log(np.minimum(D, turn) / turn) / NEAR, (D - turn) / (LATE * whole))
    _, step = np.unique(np.ceil(place), return_inverse=True)
    mean = lambda values: np.bincount(step, values) / np.bincount(step)
    return np.exp(mean(np.log(D))), mean(losses)


def _schedule(place: Path) -> str:
    """Of the learning rate, as the run's manifest has it; nothing where that is not to be read."""
    try:
        return json.loads((place / "manifest.json").read_bytes())["config"]["optim"]["schedule"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""

