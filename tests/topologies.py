"""One tiny run on some topologies, in processes of their own: what determinism is held to, and the golden losses.

    python tests/topologies.py          # writes tests/golden/topologies/losses.json anew: when numbers change and are meant to
"""

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile

import conftest  # noqa: F401  the flags and the cache that all tests have, before JAX is imported

GOLDEN = pathlib.Path(__file__).parent / "golden" / "topologies" / "losses.json"
TOPOLOGIES = {  # processes, CPU devices of each, mesh
    "1 device": (1, 1, {}),
    "8 devices: fsdp 2, model 2, sequence 2": (1, 8, dict(fsdp=2, model=2, sequence=2)),
    "2 processes: fsdp 2": (2, 1, dict(fsdp=2)),
}


def started(name: str, root: pathlib.Path, *folders: str) -> list[subprocess.Popen]:
    """The processes of a topology, which train in one folder after the other."""
    processes, devices, _ = TOPOLOGIES[name]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    paths = (pathlib.Path(__file__).parents[1], pathlib.Path(__file__).parent)
    env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
                        "PYTHONPATH": os.pathsep.join(map(str, paths))}
    join = [(f"127.0.0.1:{port}", str(processes), str(rank)) if processes > 1 else () for rank in range(processes)]
    argv = [sys.executable, __file__, name, str(root), ",".join(folders)]
    return [subprocess.Popen([*argv, *how], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            for how in join]


def ended(running: list[subprocess.Popen]):
    """Wait for processes, all of which must end well."""
    outputs = [process.communicate(timeout=300)[0] for process in running]
    assert not any(process.returncode for process in running), "\n".join(outputs)


def losses(folder: pathlib.Path) -> list[float]:
    """The loss of each step of a run."""
    return [json.loads(row)["loss"] for row in (folder / "metrics.jsonl").open()]


def process(name: str, root: str, folders: str, *join: str):
    """One process of a topology."""
    import jax

    from lm_jax import config, hosts, parallel, peers, trainer
    from lm_jax.data import store
    from lm_jax.recipes import pretrain
    from lm_jax.workdir import Workdir

    hosts.start(*join)
    root, c = pathlib.Path(root), config.default()
    c.model.update(width=32, depth=1, heads=2, dtype="float32", dropout=0.1)
    c.data.update(sources="markov:documents=300,length=31", root=str(root / "data"), tokenizer="byte", length=32)
    c.optim.update(warmup=2)
    c.train.update(steps=12, batch=8, checkpoint_every=12)
    c.mesh.update(TOPOLOGIES[name][2])
    c = config.resolve(c)
    with jax.set_mesh(parallel.make_mesh(c.mesh)):
        recipe = pretrain.Pretraining(c, store.prepare(c.data, say=hosts.say))
        for folder in folders.split(","):
            workdir = Workdir(root / folder, writes=jax.process_index() == 0)
            with contextlib.closing(workdir):
                workdir.open(config.to_dict(c), hosts.mark())
                with trainer.Trainer(c, recipe.model(), recipe.recipe(), workdir, say=hosts.say) as it:
                    assert it.fit() == "ok"
    peers.exchange("end", "")


def main():
    found = {}
    for name in TOPOLOGIES:
        with tempfile.TemporaryDirectory() as root:
            ended(started(name, pathlib.Path(root), "run"))
            found[name] = losses(pathlib.Path(root) / "run")
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{GOLDEN}: {', '.join(found)}")


if __name__ == "__main__":
    process(*sys.argv[1:]) if sys.argv[1:] else main()
