"""From a rendered submission to the cluster: write its files, and run the one command that hands them over."""

import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from lm_jax import disk
from lm_jax.errors import ConfigError

TOOLS = {  # where each comes from
    "kubectl": "install it (https://kubernetes.io/docs/tasks/tools) and give it the cluster's credentials",
    "sky": 'pip install "skypilot[gcp]", in an environment of its own',
    "sbatch": "submit from a login node of the Slurm cluster",
}


@dataclass(frozen=True)
class Submission:
    """What a launcher renders."""

    files: dict[str, str]  # relative path -> text
    command: tuple[str, ...]  # the one command that submits them, to be run in their folder


def submit(submission: Submission, folder: Path | str, *, dry_run: bool = False):
    """Write the files into a folder and run the command there; with dry_run show it instead.

    The tool's own words pass through, those about missing credentials included. ConfigError where the tool is not
    here, or refuses; the files are then in their place, to be submitted from elsewhere or again.
    """
    folder, tool = Path(folder), submission.command[0]
    for path, text in submission.files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        disk.replace(folder / path, [text])
        print(f"{folder / path}: {text.count(chr(10))} lines", flush=True)
    command = f"cd {shlex.quote(str(folder))} && {shlex.join(submission.command)}"
    if dry_run:
        print(f"submit with: {command}", flush=True)
        return
    if shutil.which(tool) is None:
        raise ConfigError(f"there is no {tool} on this machine: {TOOLS[tool]}; the files are written, submit with: "
                          f"{command}")
    print(f"$ {command}", flush=True)
    done = subprocess.run(submission.command, cwd=folder)
    if done.returncode:
        raise ConfigError(f"{tool} ended with code {done.returncode}, for the reason it gave above; the files are "
                          f"written, once it is cured submit with: {command}")
