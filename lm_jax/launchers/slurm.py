"""Points as a Slurm job array, on nodes with GPUs and a shared disk; submitted by `sbatch --array`.

A point is an array task: srun starts one process a node, which has all GPUs of the task there, and lm_jax.hosts joins
them by what srun says. Stopped and saved (75), by preemption or as the allocation's time runs out, the task is put
back into the queue and goes on; other ends are its last. Preempted without a GraceTime, it goes on from what it saved
before. The script holds the commands, and Slurm keeps a copy of it:
a later submission from the same folder cannot change what an earlier one runs.
"""

import math
import os
import shlex
from collections.abc import Sequence

import lm_jax.launchers.legal as legal  # `from lm_jax.launchers import` would be a circle
import lm_jax.launchers.nodes as nodes
from lm_jax.clock import HUNG
from lm_jax.errors import ConfigError
from lm_jax.launchers.job import Job
from lm_jax.launchers.legal import Setting
from lm_jax.launchers.submit import Submission
from lm_jax.preflight.topology import Topology

SETTINGS = {
    "home": Setting("folder on the shared disk where commands start, with configs/; else the current one", "line"),
    "setup": Setting("a line of shell before each point, as in: source .venv/bin/activate", "line"),
    "time": Setting("longest allocation; a point that needs longer is queued again and goes on", "clock"),
    "parallel": Setting("how many points run at a time; default is all", "number"),
    "gpu": Setting("the GPUs' type where the cluster wants it, as in h100"),
    "partition": Setting("partition"), "account": Setting("account"), "qos": Setting("quality of service"),
    "constraint": Setting("feature of nodes"), "reservation": Setting("reservation"),
    "cpus": Setting("CPUs a node", "number"), "memory": Setting("memory a node, as in 200G; 0 is all of it"),
}
HANGS = 10  # a task that hung is put back unless it has been so often
OPTIONS = {"cpus": "cpus-per-task", "memory": "mem"}  # sbatch's own names, where they are others
PASSED = ("partition", "account", "qos", "constraint", "reservation", "cpus", "memory", "time")


def render(jobs: Sequence[Job], *, name: str, topology: Topology, settings: dict[str, str]) -> Submission:
    """A batch script with the commands of all points, and the command that submits it as an array."""
    jobs, given = legal.checked(jobs), legal.read(settings, SETTINGS, "slurm")
    if topology.device.platform != "gpu":
        raise ConfigError(f"{topology.name}: Slurm is used for GPUs here; for TPUs take --launcher=jobset or sky")
    name, minutes = legal.name(name, longest=40), max(job.minutes for job in jobs)
    if minutes and not given["time"] and all(job.minutes for job in jobs):
        given["time"] = str(math.ceil(minutes + 2 * legal.GRACE / 60))  # until the limit of its own has ended a point
    lines = ["#!/bin/bash", *_options(name, topology, given), *_script(jobs, given)]
    limit = f"%{given['parallel']}" if given["parallel"] else ""
    return Submission({f"{name}.sbatch": "\n".join(lines) + "\n"},
                      ("sbatch", f"--array=0-{len(jobs) - 1}{limit}", f"{name}.sbatch"))


def _options(name: str, topology: Topology, given: dict) -> list[str]:
    count, each = nodes.hosts(topology)
    kind = f"{given['gpu']}:" if given["gpu"] else ""
    options = {"job-name": name, "nodes": count, "ntasks-per-node": 1, "gpus-per-node": f"{kind}{each}",
               "output": f"{name}-%A_%a.log", "open-mode": "append", "requeue": None}
    options |= {OPTIONS.get(key, key): given[key] for key in PASSED if given[key] not in ("", 0)}
    if given["time"]:
        options["signal"] = f"TERM@{legal.GRACE}"  # to the processes, so long before the allocation ends
    return [f"#SBATCH --{key}" + ("" if value is None else f"={value}") for key, value in options.items()]


def _script(jobs: Sequence[Job], given: dict) -> list[str]:
    task = '"${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"'  # SLURM_JOB_ID is, of one of the tasks, the whole array's
    return [
        "",
        "trap : TERM  # this shell lives on, to put the point back into the queue",
        f"cd -- {shlex.quote(os.path.abspath(given['home']))} || exit {legal.REFUSED}",
        *([given["setup"]] if given["setup"] else []),
        *legal.choice(jobs, "SLURM_ARRAY_TASK_ID"),
        "# Late, the processes of srun are told to save: by Slurm, since srun itself would kill them.",
        f'{{ [ "$limit" -gt 0 ] && sleep "$limit" >&- 2>&- && exec scancel --signal=TERM {task}; }} & timer=$!',
        f'srun --kill-on-bad-exit=0 --wait={legal.GRACE} "$@"  # the last to save has so long after the first',
        "code=$?",
        f'kill "$timer" 2>/dev/null || [ "$limit" -eq 0 ] || [ "$code" -ne {legal.STOPPED} ] || code={legal.LATE}',
        f'if [ "$code" -eq {legal.STOPPED} ] || {{ [ "$code" -eq {HUNG} ] '
        f'&& [ "${{SLURM_RESTART_COUNT:-0}}" -lt {HANGS} ]; }}; then scontrol requeue {task}; fi',
        'exit "$code"',
    ]
