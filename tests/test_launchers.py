"""Submissions are what the engines want, by their own words, and carry commands to the letter."""

import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import pytest
import yaml

from lm_jax.errors import ConfigError
from lm_jax.launchers import LAUNCHERS, Submission, legal, nodes, submit
from lm_jax.launchers.job import Job
from lm_jax.preflight.topology import parse

CRD = pathlib.Path(__file__).parents[2] / "shared" / "schemas" / "jobset_crd.yaml"
ODD = ("a b", "it's", '"', "$HOME $(HOME) $$x `id`", "1e-3", "true", "two\nlines", "*", "", "--x=#;&|")
IDS = ("123456e78901", "0123456789ab")
BUCKET = {"bucket": "gs://results"}
NEEDED = {"jobset": BUCKET | {"image": "gcr.io/p/image:1"}, "sky": BUCKET, "slurm": {}}


def jobs(*words, program="train", minutes=0.0) -> list[Job]:
    return [Job(id, (program, *words, f"--workdir={folder}"), minutes, (f"{folder}/summary.json",))
            for id in IDS for folder in [f"/bucket/x/points/{id}"]]


def render(launcher, topology="h100-8", points=None, name="sweep", **settings) -> Submission:
    settings = NEEDED[launcher] | settings
    return LAUNCHERS[launcher](points or jobs(), name=name, topology=parse(topology), settings=settings)


def documents(*args, **settings) -> list[dict]:
    (text,) = render(*args, **settings).files.values()
    return list(yaml.safe_load_all(text))


def parts(jobset: dict) -> tuple[dict, dict, dict, dict]:
    """Its replicated job, the job's and the pod's spec, and the container."""
    (job,) = jobset["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    return job, job["template"]["spec"], pod, pod["containers"][0]


def wrong(value, schema: dict, where: str = "") -> list[str]:
    """What in a document its Kubernetes schema does not allow."""
    if schema.get("x-kubernetes-int-or-string"):
        return [] if isinstance(value, (int, str)) else [f"{where}: neither number nor text"]
    types = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
    kind = types[schema["type"]]
    if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
        return [f"{where}: {value!r} is no {schema['type']}"]
    found = [f"{where}: {value!r}"] if value not in schema.get("enum", [value]) else []
    if kind is list:
        return found + [said for i, item in enumerate(value) for said in wrong(item, schema["items"], f"{where}[{i}]")]
    if kind is dict:
        known, rest = schema.get("properties", {}), schema.get("additionalProperties")
        found += [f"{where}.{key} is missing" for key in schema.get("required", ()) if key not in value]
        for key, item in value.items():
            if key not in known and not rest and not schema.get("x-kubernetes-preserve-unknown-fields") and known:
                found.append(f"{where}.{key} is unknown")
            elif key in known or rest:
                found += wrong(item, known.get(key, rest), f"{where}.{key}")
    return found


@pytest.mark.skipif(not CRD.exists(), reason="the published schema of JobSet is not beside the checkout")
@pytest.mark.parametrize("topology, settings", [
    ("4xv5p-128", {"queue": "q", "spot": "true", "host_network": "true"}), ("v6e-1", {}), ("v7x-64", {}),
    ("h100-32", {"secret": "wandb", "home": "/lm_jax", "priority": "low", "service_account": "s", "namespace": "n"})])
def test_jobsets_obey_their_published_schema(topology, settings):
    versions = yaml.safe_load(CRD.read_text())["spec"]["versions"]
    (schema,) = (version["schema"]["openAPIV3Schema"] for version in versions)
    found = documents("jobset", topology, jobs(*ODD, minutes=30), **settings)
    for jobset in found:
        assert not wrong(jobset, schema)
    parts(found[0])[3]["imagePolicy"] = "x"
    parts(found[0])[1]["completions"] = "2"
    assert len(wrong(found[0], schema)) == 2, "the check would not see a mistake"


# As `xpk workload create --dry-run --output-manifest-file` (1.16) writes them, and the machine type in its table.
@pytest.mark.parametrize("topology, label, shape, hosts, chips, machine", [
    ("v4-8", "tpu-v4-podslice", "2x2x1", 1, 4, "ct4p-hightpu-4t"),
    ("v4-128", "tpu-v4-podslice", "4x4x4", 16, 4, "ct4p-hightpu-4t"),
    ("v5e-8", "tpu-v5-lite-podslice", "2x4", 2, 4, "ct5lp-hightpu-4t"),
    ("v5e-16", "tpu-v5-lite-podslice", "4x4", 4, 4, "ct5lp-hightpu-4t"),
    ("v5p-8", "tpu-v5p-slice", "2x2x1", 1, 4, "ct5p-hightpu-4t"),
    ("v5p-128", "tpu-v5p-slice", "4x4x4", 16, 4, "ct5p-hightpu-4t"),
    ("v6e-1", "tpu-v6e-slice", "1x1", 1, 1, "ct6e-standard-1t"),
    ("v6e-256", "tpu-v6e-slice", "16x16", 64, 4, "ct6e-standard-4t"),
    ("tpu7x-32", "tpu7x", "2x4x4", 8, 4, "tpu7x-standard-4t"),
])
def test_slices_are_what_xpk_asks_gke_for(topology, label, shape, hosts, chips, machine):
    jobset = documents("jobset", topology)[0]
    job, spec, pod, container = parts(jobset)
    assert pod["nodeSelector"] == {"cloud.google.com/gke-tpu-accelerator": label,
                                   "cloud.google.com/gke-tpu-topology": shape}
    assert (job["replicas"], spec["parallelism"], spec["completions"], spec["backoffLimit"]) == (1, hosts, hosts, 0)
    assert container["resources"]["limits"] == {"google.com/tpu": chips}
    assert pod["tolerations"] == [{"key": "google.com/tpu", "operator": "Exists"}]
    assert pod["restartPolicy"] == "Never" and nodes.gke(parse(topology)).machine == machine
    # xpk claims the pool for single hosts too, which would run a sweep's points one after another.
    exclusive = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    assert jobset["metadata"].get("annotations", {}) == (exclusive if hosts > 1 else {})


def test_slices_are_replicas_and_eight_chips_may_share_a_host():
    job, spec, _, _ = parts(documents("jobset", "4xv5e-256")[0])
    assert (job["replicas"], spec["completions"]) == (4, 64)
    _, spec, _, container = parts(documents("jobset", "v6e-8", chips_per_host="8")[0])
    assert (spec["completions"], container["resources"]["limits"]) == (1, {"google.com/tpu": 8})
    assert "ct6e-standard-8t" in next(iter(render("jobset", "v6e-8", chips_per_host="8").files.values()))


def test_spot_queue_and_secret_are_asked_for_by_reference():
    jobset = documents("jobset", "v5e-4", spot="true", queue="team", secret="wandb")[0]
    _, _, pod, container = parts(jobset)
    assert jobset["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true" and len(pod["tolerations"]) == 2
    assert container["envFrom"] == [{"secretRef": {"name": "wandb"}}]


def test_pods_with_gpus_are_told_where_to_meet():
    job, spec, _, container = parts(documents("jobset", "h100-32")[0])
    assert (job["replicas"], spec["completions"], container["resources"]["limits"]) == (1, 4, {"nvidia.com/gpu": 8})
    host = f"sweep-{IDS[0]}-slice-0-0.sweep-{IDS[0]}"
    assert container["command"][-3:] == [f"--coordinator={host}:8476", "--processes=4", "--process=$(PROCESS)"]
    assert "--processes=4" not in parts(documents("jobset", "h100-4")[0])[3]["command"]


@pytest.mark.parametrize("topology, refused", [("v5e-1", True), ("v5e-16", False)])
def test_ends_that_would_come_again_fail_a_jobset_and_saved_ones_go_on(topology, refused):
    jobset = documents("jobset", topology)[0]
    fail, saved, evicted = parts(jobset)[1]["podFailurePolicy"]["rules"]
    final = fail["onExitCodes"]["values"]
    assert fail["action"] == "FailJob" and {74, 77, 78, 79, 124} <= set(final) and not {75, 76, 1} & set(final)
    assert (2 in final) == refused, "of several processes, 2 is also that the others were late"
    assert saved == {"action": "Ignore", "onExitCodes": {"containerName": "train", "operator": "In", "values": [75]}}
    assert evicted["action"] == "Ignore"
    assert jobset["spec"]["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]


def test_a_pod_gets_its_command_to_the_letter():
    submission = render("jobset", "v5e-4", jobs(*ODD, minutes=1.5))
    for jobset, job in zip(documents("jobset", "v5e-4", jobs(*ODD, minutes=1.5)), jobs(*ODD), strict=True):
        command = parts(jobset)[3]["command"]
        assert command[:4] == ["timeout", "--foreground", "--kill-after=300", "90"]
        assert all("$" not in word.replace("$$", "") for word in command)  # else Kubernetes would look for a variable
        assert [word.replace("$$", "$") for word in command[4:]] == list(job.argv)
    text = submission.files["sweep.yaml"]
    assert f'"{IDS[0]}"' in text and '"1e-3"' in text, "numbers to Go's YAML"
    assert submission.command == ("kubectl", "apply", "-f", "sweep.yaml")


def test_names_are_legal_and_long_ones_are_refused():
    jobset = documents("jobset", "2xv5p-128", name="Chinchilla_N x D!")[0]
    assert jobset["metadata"]["name"] == f"chinchilla-n-x-d-{IDS[0]}"
    longest = 63 - len(f"-{IDS[0]}-slice-1-15-abcde")
    documents("jobset", "2xv5p-128", name="a" * longest)
    for name, said in (("a" * (longest + 1), "shorten it"), ("7b", "begin with a letter")):
        with pytest.raises(ConfigError, match=said):
            render("jobset", "2xv5p-128", name=name)


def run_script(tmp_path, text, **env) -> subprocess.CompletedProcess:
    """A rendered script, where `train` writes its words to a file and ends as it is told."""
    tools = {"train": 'printf "%s\\0" "$@" >words; while [ "$WAIT" ] && [ ! -e told ]; do sleep .1; done; exit "$END"',
             "srun": 'shift 2; "$@"', "scontrol": 'echo "scontrol $*"', "scancel": 'echo "scancel $*"; touch told'}
    for tool, body in tools.items():
        (tmp_path / tool).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / tool).chmod(0o755)
    (tmp_path / "script").write_text(text)
    assert subprocess.run(["bash", "-n", "script"], cwd=tmp_path, capture_output=True, text=True).stderr == ""
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "END": "0"} | env
    return subprocess.run(["bash", "script"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("launcher, variable", [("slurm", "SLURM_ARRAY_TASK_ID"), ("sky", "SKYPILOT_JOB_RANK")])
def test_a_script_runs_the_command_of_its_number_to_the_letter(tmp_path, launcher, variable, number):
    points = jobs(*ODD, minutes=0.5)
    settings = {"home": str(tmp_path), "setup": "export A=1"} if launcher == "slurm" else {"image": "python:3.12"}
    (text,) = render(launcher, points=points, **settings).files.values()
    text = text if launcher == "slurm" else yaml.safe_load(text)["run"]
    done = run_script(tmp_path, text, **{variable: str(number)})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "words").read_text().split("\0")[:-1] == list(points[number].argv[1:])
    assert run_script(tmp_path, text, **{variable: "2"}).returncode == 2
    assert run_script(tmp_path, text, END="78", **{variable: "1"}).returncode == 78


def test_slurm_puts_back_what_was_stopped_and_nothing_else(tmp_path):
    env = {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_JOB_ID": "17", "SLURM_JOB_ID": "17"}
    (text,) = render("slurm", home=str(tmp_path)).files.values()
    stopped, crashed = (run_script(tmp_path, text, END=code, **env) for code in ("75", "1"))
    assert (stopped.returncode, "scontrol requeue 17_0\n" in stopped.stdout) == (75, True), "17 is the whole array"
    assert (crashed.returncode, "scontrol" in crashed.stdout) == (1, False)
    (text,) = render("slurm", points=jobs(minutes=1 / 60), home=str(tmp_path)).files.values()
    assert run_script(tmp_path, text, **env).returncode == 0
    time.sleep(1.3)
    assert not (tmp_path / "told").exists(), "one that ended in time was told to stop, and its next start would be"
    late = run_script(tmp_path, text, END="75", WAIT="1", **env)
    assert (late.returncode, "scontrol" in late.stdout) == (legal.LATE, False)
    assert "scancel --signal=TERM 17_0\n" in late.stdout


def test_slurm_asks_for_nodes_gpus_and_time():
    submission = render("slurm", "h100-32", jobs(minutes=50), gpu="h100", parallel="4", partition="p")
    lines = submission.files["sweep.sbatch"].splitlines()
    options = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]
    assert {"nodes=4", "ntasks-per-node=1", "gpus-per-node=h100:8", "time=60", "signal=TERM@300", "requeue",
            "partition=p"} <= set(options)
    assert submission.command == ("sbatch", "--array=0-1%4", "sweep.sbatch")


def test_a_time_limit_tells_a_run_once_to_save():
    """GNU timeout in its usual way would tell it twice, and a run that is told twice does not save."""
    program = ("import signal, sys, time\nseen = []\nsignal.signal(15, lambda *_: seen.append(1))\n"
               "print('up', flush=True)\n"
               "while not seen: time.sleep(.05)\ntime.sleep(.3); print(len(seen)); sys.exit(75)")
    command = [*legal.TIMEOUT, "{}", sys.executable, "-c", program]
    limited = subprocess.run([word.format("1") for word in command[:4]] + command[4:], capture_output=True, text=True)
    assert (limited.returncode, limited.stdout.split()) == (legal.LATE, ["up", "1"])
    free = subprocess.Popen([word.format("0") for word in command[:4]] + command[4:], stdout=subprocess.PIPE, text=True)
    assert free.stdout.readline() == "up\n"
    free.send_signal(signal.SIGTERM)
    assert (free.communicate(timeout=20)[0].strip(), free.returncode) == ("1", 75)


@pytest.mark.parametrize("topology, resources, count", [
    ("v5p-128", {"accelerators": "tpu-v5p-128", "infra": "gcp"}, 1),
    ("v5e-16", {"accelerators": "tpu-v5litepod-16"}, 1),
    ("h100-32", {"accelerators": "H100:8"}, 4), ("a100-4", {"accelerators": "A100-80GB:4"}, 1)])
def test_sky_asks_for_accelerators_and_recovers_what_was_stopped(topology, resources, count):
    submission = render("sky", topology, spot="true", secret="WANDB_API_KEY")
    (task,) = yaml.safe_load_all(submission.files["sweep.yaml"])
    assert resources.items() <= task["resources"].items() and task["num_nodes"] == count
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75] and task["resources"]["use_spot"] is True
    assert ("--coordinator" in task["run"]) == (count > 1)
    assert submission.command == ("sky", "jobs", "launch", "--yes", "--detach-run", "--num-jobs", "2", "--secret",
                                  "WANDB_API_KEY", "sweep.yaml")


@pytest.mark.skipif("SKY_PYTHON" not in os.environ, reason="no $SKY_PYTHON, a python that has skypilot")
@pytest.mark.parametrize("topology", ["v5p-128", "v6e-8", "h100-32"])
def test_skypilot_reads_its_tasks(tmp_path, topology):
    (tmp_path / "task.yaml").write_text(render("sky", topology, jobs(*ODD), spot="true").files["sweep.yaml"])
    program = ("import sky; t = sky.Task.from_yaml('task.yaml'); r = next(iter(t.resources))\n"
               "print(t.num_nodes, r.accelerators, r.use_spot, r.job_recovery)")
    done = subprocess.run([os.environ["SKY_PYTHON"], "-c", program], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"HOME": str(tmp_path)}, timeout=120)
    assert done.returncode == 0 and "True" in done.stdout and "[75]" in done.stdout, done.stderr[-2000:]


@pytest.mark.parametrize("launcher, topology, settings, said", [
    ("jobset", "v5e-4", {"spt": "true"}, "did you mean 'spot'"),
    ("jobset", "v5e-4", {"spot": "yes"}, "wanted true or false"),
    ("jobset", "v5e-4", {"image": "a b"}, "wanted one word"),
    ("jobset", "v5e-4", {"mount": "/elsewhere"}, "is not on the bucket"),
    ("jobset", "v3-32", {}, "GKE has no v3"), ("jobset", "v5e-2", {}, "no topology 1x2"),
    ("jobset", "v5p-2", {}, "no topology|no 1 x 1"), ("jobset", "v5p:2x2x3", {}, "no topology 2x2x3"),
    ("jobset", "v5e-16", {"chips_per_host": "8"}, "4 chips a host"),
    ("jobset", "v5e-4", {"queue": "hf_" + "a1" * 17}, "wanted small letters"),
    ("jobset", "v5e-4", {"context": "hf_" + "a1" * 17}, "looks like a credential"),
    ("sky", "2xv5e-16", {}, "joins no slices"), ("sky", "v5p:4x4x32", {}, "SkyPilot has v5p-1024 as"),
    ("sky", "v7x-64", {}, "SkyPilot has no v7x"), ("sky", "v5e-4", {"bucket": "b"}, "as in gs://b"),
    ("slurm", "v5e-4", {}, "Slurm is used for GPUs"), ("slurm", "h100-8", {"partition": "a\n#SBATCH"}, "one word"),
])
def test_what_cannot_be_asked_for_is_refused_with_the_cure(launcher, topology, settings, said):
    with pytest.raises(ConfigError, match=said):
        render(launcher, topology, **settings)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_credentials_equal_points_and_no_points_are_refused(launcher):
    for points, said in ((jobs("--token=hf_" + "aB1" * 12), "looks like a credential"), (jobs() * 2, "the same id")):
        with pytest.raises(ConfigError, match=said):
            render(launcher, points=points)
    with pytest.raises(ConfigError, match="no point is left"):
        LAUNCHERS[launcher]([], name="x", topology=parse("h100-8"), settings=NEEDED[launcher])


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_submitting_writes_the_files_and_runs_the_one_command_beside_them(launcher, tmp_path, monkeypatch, capfd):
    submission, folder = render(launcher), tmp_path / "new" / "out"
    tool = tmp_path / submission.command[0]
    tool.write_text('#!/bin/sh\npwd\nprintf "%s\\n" "$0" "$@"\n'
                    '[ ! "$REFUSE" ] || { echo "no credentials" >&2; exit 9; }\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    submit(submission, folder, dry_run=True)
    shown = capfd.readouterr().out
    assert shlex.join(submission.command) in shown and str(tool) not in shown
    assert {path.name: path.read_text() for path in folder.iterdir()} == submission.files
    submit(submission, folder)
    assert capfd.readouterr().out.endswith("\n".join([str(folder), str(tool), *submission.command[1:], ""]))
    monkeypatch.setenv("REFUSE", "1")
    with pytest.raises(ConfigError, match="code 9"):
        submit(submission, folder)
    assert capfd.readouterr().err == "no credentials\n"


def test_a_missing_tool_is_named_with_where_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="no sbatch on this machine: submit from a login node"):
        submit(render("slurm"), tmp_path)
    assert (tmp_path / "sweep.sbatch").exists()
