"""What a launcher is given: the points of a sweep as commands, each with the file whose presence ends it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Job:
    """One point of a sweep. Running its command again, after whatever end, goes on from what was saved."""

    id: str  # twelve hex digits, the digest of its resolved config and data; also the name of its folder points/<id>
    argv: tuple[str, ...]  # the complete command: ("python", "-m", "lm_jax.train", "--config=...", "--workdir=...")
    minutes: float  # time limit; 0 is none
    result: str  # the file that ends it, renamed into place: <workdir>/summary.json with status ok or diverged
