"""What a launcher is given: the points of a sweep as commands, each with the files whose presence ends it."""

import os
from dataclasses import dataclass
from pathlib import Path

from lm_jax import disk


@dataclass(frozen=True)
class Job:
    """Points of a sweep that one command runs, most often one: several share a program, or a trunk. Running it again,
    after whatever end, goes on from what was saved."""

    id: str  # of the first point of its group, be that done or not; its folder holds log.txt of the local launcher
    argv: tuple[str, ...]  # the complete command: ("python", "-m", "lm_jax.train", "--config=...", "--workdir=...")
    minutes: float  # time limit; 0 is none
    results: tuple[str, ...]  # what ends each, renamed into place: <out>/points/<id>/summary.json with ok or diverged

    @property
    def points(self) -> tuple[str, ...]:
        """Twelve hex digits each: the digest of a point's resolved config and data, which also names its folder."""
        return tuple(Path(result).parent.name for result in self.results)

    @property
    def folder(self) -> Path:
        return Path(self.results[0]).parent.with_name(self.id)

    def outcomes(self) -> dict[str, str | None]:
        """Of each point."""
        return {point: outcome(Path(result)) for point, result in zip(self.points, self.results)}

    def outcome(self) -> str | None:
        """"ok" or, if any has, "diverged" where all points have a result; else None."""
        found = set(self.outcomes().values())
        return None if None in found else "diverged" if "diverged" in found else "ok"

    def last_line(self) -> str:
        """What it said last, which for an error is what was wrong."""
        try:
            with open(self.folder / "log.txt", "rb") as log:
                log.seek(max(0, os.path.getsize(log.name) - 4096))
                lines = log.read().decode(errors="replace").split("\n")
        except FileNotFoundError:
            lines = []
        return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "it printed nothing")


def outcome(summary: Path) -> str | None:
    """"ok" or "diverged" where there is a result; None where there is none, or one that says it was stopped."""
    try:
        status = (disk.read_json(summary) or {}).get("status")
    except (ValueError, AttributeError):
        return None  # damaged: running the point again goes on from its last checkpoint and writes it anew
    return status if status in ("ok", "diverged") else None
