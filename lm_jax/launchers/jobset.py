"""Points as JobSets for GKE: TPU v4 to 7x and GPUs, several slices, Spot, Kueue; submitted by `kubectl apply`.

A point is a JobSet, a slice one of its jobs, a host a pod. Stopped and saved (75) or evicted, a pod starts again for
nothing; a crash starts all pods of the point again, `restarts` times; an end that would come again fails the JobSet,
which stays for a day to be seen. Pods know nothing but their bucket. What GKE's own parts do is not repeated here:
they tell TPU pods their slice's hosts (TPU_WORKER_HOSTNAMES) and, of several slices, MEGASCALE_*.
A failed point is submitted again after `kubectl delete jobset <name>-<id>`: to apply what is there changes nothing.
"""

from collections.abc import Sequence

import lm_jax.launchers.legal as legal  # `from lm_jax.launchers import` would be a circle
import lm_jax.launchers.nodes as nodes
from lm_jax.launchers.job import Job
from lm_jax.launchers.legal import Setting
from lm_jax.launchers.submit import Submission
from lm_jax.preflight.topology import Topology

SETTINGS = {
    "image": Setting("container image with lm_jax, python and GNU timeout", default=None),
    "bucket": Setting("Cloud Storage bucket for results, the only thing that outlives a pod", "bucket", None),
    "mount": Setting("where pods see the bucket; --out begins with it", "path", "/bucket"),
    "home": Setting("folder of the image where commands start, which has configs/; else the image's own", "path"),
    "queue": Setting("Kueue's LocalQueue", "name"),
    "spot": Setting("Spot machines", "switch", "false"),
    "reservation": Setting("name of a reservation to consume", "name"),
    "restarts": Setting("how often a point that crashed starts again", "number", "10"),
    "secret": Setting("Kubernetes Secret whose keys pods get as environment variables", "name"),
    "service_account": Setting("Kubernetes service account that may use the bucket", "name"),
    "namespace": Setting("Kubernetes namespace", "name"),
    "context": Setting("cluster, as kubectl config get-contexts names it"),
    "priority": Setting("PriorityClass", "name"),
    "chips_per_host": Setting("8 for 2x4 slices of v5e and v6e in one host", "number"),
    "host_network": Setting("the node's own network, faster between slices; GKE 1.33 or later", "switch", "false"),
}
TRAIN, SLICE = "train", "slice"  # names of the container and of the replicated job
SUFFIX = 6  # letters of a pod's random end


def render(jobs: Sequence[Job], *, name: str, topology: Topology, settings: dict[str, str]) -> Submission:
    """One YAML document a point, and the command that applies them all."""
    jobs, given = legal.checked(jobs), legal.read(settings, SETTINGS, "jobset")
    legal.on_bucket(jobs, given["mount"], given["home"])
    pool = nodes.gke(topology, given["chips_per_host"])
    pod = f"-{'0' * 12}-{SLICE}-{topology.slices - 1}-{pool.hosts - 1}"
    name = legal.name(name, longest=63 - len(pod) - SUFFIX)
    text = f"# {len(jobs)} points, each on {topology.slices} node pool(s) of {pool}\n"
    text += legal.dump([_jobset(job, name, topology, pool, given) for job in jobs])
    context = ("--context", given["context"]) if given["context"] else ()
    return Submission({f"{name}.yaml": text}, ("kubectl", *context, "apply", "-f", f"{name}.yaml"))


def _jobset(job: Job, sweep: str, topology: Topology, pool: nodes.Pool, given: dict) -> dict:
    name, labels = f"{sweep}-{job.id}", {"lm-jax/sweep": sweep, "lm-jax/point": job.id}
    queue = {"kueue.x-k8s.io/queue-name": given["queue"]} if given["queue"] else {}
    metadata = {"name": name, "labels": labels | queue}
    if given["namespace"]:
        metadata["namespace"] = given["namespace"]
    if pool.topology and pool.hosts > 1:  # a slice has a node pool for itself; one-host slices share theirs
        metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    processes = topology.slices * pool.hosts
    slices, size = (topology.slices, pool.hosts) if pool.topology else (1, processes)
    template = {
        "parallelism": size, "completions": size, "completionMode": "Indexed", "backoffLimit": 0,
        "podFailurePolicy": {"rules": _rules(processes)},
        "template": {
            "metadata": {"labels": labels, "annotations": {"gke-gcsfuse/volumes": "true"}},
            "spec": _pod(job, name, processes, pool, given)},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": metadata,
        "spec": {
            "ttlSecondsAfterFinished": 86_400,
            "network": {"enableDNSHostnames": True, "subdomain": name},
            "failurePolicy": {"maxRestarts": given["restarts"], "rules": [
                {"name": "final", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]},
            "replicatedJobs": [{"name": SLICE, "replicas": slices, "template": {"spec": template}}]},
    }


def _rules(processes: int) -> list[dict]:
    """The first that matches decides; what none matches fails the job, and the JobSet starts again."""
    final = legal.FINAL + ((legal.REFUSED,) if processes == 1 else ())
    code = lambda values: {"containerName": TRAIN, "operator": "In", "values": sorted(values)}
    return [{"action": "FailJob", "onExitCodes": code(final)},
            {"action": "Ignore", "onExitCodes": code([legal.STOPPED])},
            {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}]


def _pod(job: Job, name: str, processes: int, pool: nodes.Pool, given: dict) -> dict:
    kind = "google.com/tpu" if pool.topology else "nvidia.com/gpu"
    # "$(NAME)" in a command is Kubernetes' own; two dollars are one.
    limit = (*legal.TIMEOUT, str(legal.seconds(job))) if job.minutes else ()
    command, env = [*limit, *(word.replace("$", "$$") for word in job.argv)], []
    if processes > 1 and not pool.topology:
        index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
        env = [{"name": "PROCESS", "valueFrom": {"fieldRef": {"fieldPath": index}}}]
        command += [f"--coordinator={name}-{SLICE}-0-0.{name}:{legal.PORT}", f"--processes={processes}",
                    "--process=$(PROCESS)"]
    amount = {kind: pool.chips}
    mounts = [{"name": "bucket", "mountPath": given["mount"]}, {"name": "shm", "mountPath": "/dev/shm"}]
    container = {"name": TRAIN, "image": given["image"], "command": command, "env": env,
                 "resources": {"requests": amount, "limits": amount}, "volumeMounts": mounts}
    if given["home"]:
        container["workingDir"] = given["home"]
    if given["secret"]:
        container["envFrom"] = [{"secretRef": {"name": given["secret"]}}]
    spec = {"restartPolicy": "Never", "terminationGracePeriodSeconds": legal.GRACE, "containers": [container],
            "volumes": _volumes(given)} | _place(pool, kind, given)
    if given["host_network"]:
        spec |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    for key, field in (("priority", "priorityClassName"), ("service_account", "serviceAccountName")):
        if given[key]:
            spec[field] = given[key]
    return spec


def _place(pool: nodes.Pool, kind: str, given: dict) -> dict:
    """Which nodes, and the taints of theirs that pods bear."""
    selector = {"cloud.google.com/gke-accelerator": pool.accelerator}
    if pool.topology:
        selector = {"cloud.google.com/gke-tpu-accelerator": pool.accelerator,
                    "cloud.google.com/gke-tpu-topology": pool.topology}
    tolerations = [{"key": kind, "operator": "Exists"}]
    if given["spot"]:
        selector["cloud.google.com/gke-spot"] = "true"
        tolerations.append({"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true",
                            "effect": "NoSchedule"})
    if given["reservation"]:
        selector["cloud.google.com/reservation-name"] = given["reservation"]
    return {"nodeSelector": selector, "tolerations": tolerations}


def _volumes(given: dict) -> list[dict]:
    bucket = {"bucketName": given["bucket"].removeprefix("gs://"), "mountOptions": "implicit-dirs"}
    if given["host_network"]:
        bucket["hostNetworkPodKSA"] = "true"  # else the driver finds no identity there
    return [{"name": "bucket", "csi": {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": bucket}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}}]  # NCCL wants more than a container's 64 MB
