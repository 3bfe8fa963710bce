"""Points as one SkyPilot task: Cloud TPU VMs and their pods, GPUs of any cloud, Spot; submitted by `sky jobs launch`.

SkyPilot makes a managed job of every point, with machines of its own: it runs what is under its rank, on all hosts.
Stopped and saved (75) or preempted, it is recovered and goes on; after other errors it starts again `restarts` times.
"""

import os
from collections.abc import Sequence

import lm_jax.launchers.legal as legal  # `from lm_jax.launchers import` would be a circle
import lm_jax.launchers.nodes as nodes
from lm_jax.errors import ConfigError
from lm_jax.launchers.job import Job
from lm_jax.launchers.legal import Setting
from lm_jax.launchers.submit import Submission
from lm_jax.preflight.topology import Topology

SETTINGS = {
    "bucket": Setting("bucket for results, the only thing that outlives a machine, as in gs://name", "bucket", None),
    "mount": Setting("where machines see the bucket; --out begins with it", "path", "/bucket"),
    "source": Setting("folder of lm_jax and configs/ to upload; default is the current one", "line"),
    "image": Setting("container image that has lm_jax's dependencies; default is to install them", "word"),
    "infra": Setting("cloud, region and zone, as in gcp/us-east5/us-east5-a"),
    "spot": Setting("Spot machines", "switch", "false"),
    "restarts": Setting("how often a point that crashed starts again", "number", "3"),
    "secret": Setting("environment variables of this machine that the points get, as in WANDB_API_KEY", "names"),
}
VENV = "$HOME/lm_jax_env"  # SkyPilot's own Python may be older than 3.11


def render(jobs: Sequence[Job], *, name: str, topology: Topology, settings: dict[str, str]) -> Submission:
    """A task file that holds all points, and the command that launches it once a point."""
    jobs, given = legal.checked(jobs), legal.read(settings, SETTINGS, "sky")
    legal.on_bucket(jobs, given["mount"], home="")
    if "://" not in given["bucket"]:
        raise ConfigError(f"sky: bucket={given['bucket']!r}: say whose, as in gs://{given['bucket']}")
    name = legal.name(name, longest=40)
    text = f"# {len(jobs)} points; SKYPILOT_JOB_RANK, which --num-jobs sets, says which\n"
    text += legal.dump([_task(jobs, name, topology, given)])
    secrets = [word for key in given["secret"].split(",") if key for word in ("--secret", key)]
    command = ("sky", "jobs", "launch", "--yes", "--detach-run", "--num-jobs", str(len(jobs)), *secrets, f"{name}.yaml")
    return Submission({f"{name}.yaml": text}, command)


def _task(jobs: Sequence[Job], name: str, topology: Topology, given: dict) -> dict:
    resources = {"use_spot": given["spot"], "job_recovery": {
        "max_restarts_on_errors": given["restarts"], "recover_on_exit_codes": [legal.STOPPED]}}
    accelerator, count = nodes.sky(topology), 1
    if topology.device.platform == "gpu":
        count, each = nodes.hosts(topology)
        accelerator = f"{accelerator}:{each}"
    resources["accelerators"] = accelerator
    tpu = topology.device.platform == "tpu"
    if infra := given["infra"] or ("gcp" if tpu else ""):
        resources["infra"] = infra
    if given["image"]:
        resources["image_id"] = f"docker:{given['image']}"
    task = {"name": name, "workdir": os.path.abspath(given["source"]), "num_nodes": count, "resources": resources,
            "file_mounts": {given["mount"]: {"source": given["bucket"], "mode": "MOUNT"}}}
    if not given["image"]:
        task["setup"] = _setup("tpu" if tpu else "cuda")
    return task | {"run": _run(jobs, count, activate=not given["image"])}


def _setup(extra: str) -> str:
    """Python 3.12 and the dependencies, once a machine: by uv, as pip takes no digests beside what is editable."""
    python = f"{VENV}/bin/python"
    make = f'python3 -m pip install --quiet uv && python3 -m uv venv --quiet --python 3.12 "{VENV}"'
    install = f'python3 -m uv pip install --quiet --python "{python}" -c requirements.lock -e ".[{extra}]"'
    return f'set -e\n[ -x "{python}" ] || {{ {make}; }}\n{install}\n'


def _run(jobs: Sequence[Job], count: int, *, activate: bool) -> str:
    """Runs on every host of a point; those of a TPU pod find each other, nodes of GPUs are told."""
    lines = [f'. "{VENV}/bin/activate"'] if activate else []
    lines += [': "${SKYPILOT_JOB_RANK:?this SkyPilot does not number jobs: it is too old}"']
    lines += legal.choice(jobs, "SKYPILOT_JOB_RANK")
    if count > 1:
        first = f'"$(head -n 1 <<< "$SKYPILOT_NODE_IPS"):{legal.PORT}"'
        told = f'--coordinator={first} --processes="$SKYPILOT_NUM_NODES" --process="$SKYPILOT_NODE_RANK"'
        lines += [f'set -- "$@" {told}']
    return "\n".join([*lines, f'exec {" ".join(legal.TIMEOUT)} "$limit" "$@"', ""])
