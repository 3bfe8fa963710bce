"""What a launcher is given: the points of a sweep as commands, each with the file whose presence ends it."""

import os
from dataclasses import dataclass
from pathlib import Path

from lm_jax import disk


@dataclass(frozen=True)
class Job:
    """One point of a sweep. Running its command again, after whatever end, goes on from what was saved."""

    id: str  # twelve hex digits, the digest of its resolved config and data; also the name of its folder points/<id>
    argv: tuple[str, ...]  # the complete command: ("python", "-m", "lm_jax.train", "--config=...", "--workdir=...")
    minutes: float  # time limit; 0 is none
    result: str  # the file that ends it, renamed into place: <workdir>/summary.json with status ok or diverged

    @property
    def folder(self) -> Path:
        """Of the result; log.txt and failure.json lie beside it where the local launcher ran it."""
        return Path(self.result).parent

    def outcome(self) -> str | None:
        """"ok" or "diverged" where there is a result; None where there is none, or one that says it was stopped."""
        try:
            status = (disk.read_json(Path(self.result)) or {}).get("status")
        except (ValueError, AttributeError):
            return None  # damaged: running the point again goes on from its last checkpoint and writes it anew
        return status if status in ("ok", "diverged") else None

    def last_line(self) -> str:
        """What it said last, which for an error is what was wrong."""
        try:
            with open(self.folder / "log.txt", "rb") as log:
                log.seek(max(0, os.path.getsize(log.name) - 4096))
                lines = log.read().decode(errors="replace").split("\n")
        except FileNotFoundError:
            lines = []
        return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "it printed nothing")
