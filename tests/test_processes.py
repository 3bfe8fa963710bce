"""Processes on one machine, joined as the hosts of a pod are: the numbers of one, on any mesh and through restarts."""

import itertools
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import jax
import pytest
import tiny

from lm_jax import cluster, command, hosts, optim, parallel, update
from lm_jax.config import MeshConfig
from lm_jax.data import store
from lm_jax.models.layers import kinds
from lm_jax.recipes import pretrain

ROOT = pathlib.Path(__file__).parent.parent
SETTINGS = ("--config=configs/tiny.py", "--config.model.width=32", "--config.model.heads=2",
            "--config.model.head_size=16",
            "--config.model.hidden=64", "--config.model.depth=1", "--config.data.tokenizer=byte",
            "--config.data.length=32", "--config.data.sources=markov:documents=300,length=31",
            "--config.optim.warmup=2", "--config.optim.name=adamw")
BRIEF = ("--config.train.steps=6", "--config.train.eval_every=3", "--config.train.checkpoint_every=2",
         "--config.train.keep=3")
MESHES = (MeshConfig(fsdp=1, sequence=4), MeshConfig(data=2, fsdp=1, model=2))


def start(folder, processes, *more, faults=""):
    """The processes of one run of `train`."""
    where = (f"--workdir={folder}", f"--config.data.root={folder.parent / 'data'}")
    return launch(processes, "-m", "lm_jax.train", *SETTINGS, *where, *more, faults=faults)


def launch(processes, *argv, own=((), ()), faults=""):
    """Python processes of a device each, that join by flags; some may have flags of their own."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1",
                        "LM_JAX_FAULTS": faults, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    join = [(f"--coordinator=127.0.0.1:{port}", f"--processes={processes}", f"--process={rank}")
            for rank in range(processes)] if processes > 1 else [()]
    join = [flags + more for flags, more in itertools.zip_longest(join, own[:processes], fillvalue=())]
    return [subprocess.Popen([sys.executable, *argv, *flags], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT) for flags in join]


def ended(running):
    """Exit codes and outputs."""
    outputs = [process.communicate(timeout=300)[0] for process in running]
    return [process.returncode for process in running], outputs


def losses(folder):
    return column(folder, "loss") | column(folder, "val_loss")


def column(folder, name):
    """A number of all rows that have it."""
    rows = map(json.loads, (folder / "metrics.jsonl").open())
    return {(row["step"], row.get("tag")): row[name] for row in rows if name in row}


def test_folders_of_their_own_are_refused_on_all_before_data_are_made(tmp_path):
    flags = [(f"--workdir={tmp_path / name}", f"--config.data.root={tmp_path / 'data'}") for name in ("own0", "own1")]
    codes, outputs = ended(launch(2, "-m", "lm_jax.train", *SETTINGS, own=flags))
    assert codes == [2, 2], outputs
    for output in outputs:
        assert f"--workdir={tmp_path / 'own1'} must be a folder that all processes share" in output
    assert not (tmp_path / "data").exists()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with unbroken runs of one and of two processes, and what these said."""
    folder = tmp_path_factory.mktemp("runs")
    codes, alone = ended(start(folder / "one", 1, *BRIEF))
    assert codes == [0], alone
    codes, outputs = ended(start(folder / "two", 2, *BRIEF))
    assert codes == [0, 0], outputs
    return folder, outputs


def test_two_processes_train_as_one_does(runs):
    folder, outputs = runs
    one, two = losses(folder / "one"), losses(folder / "two")
    assert two == pytest.approx(one, rel=1e-5) and len(one) == 8
    assert "2 processes, 2 devices" in outputs[0] and "bits per byte" in outputs[0]
    assert not [line for line in outputs[1].splitlines() if "[Gloo]" not in line], "one process speaks"
    summaries = [json.loads((folder / name / "summary.json").read_text()) for name in ("one", "two")]
    assert summaries[1]["val_bits_per_byte"] == pytest.approx(summaries[0]["val_bits_per_byte"], rel=1e-5)


def broken(old, new, *, after: int):
    """A copy of a run as it was when it was killed after a checkpoint."""
    shutil.copytree(old, new)
    for path in (new / "checkpoints").iterdir():
        if int(path.name) > after:
            shutil.rmtree(path)


def test_a_run_goes_on_with_another_number_of_processes_and_the_same_batches(runs):
    folder, _ = runs
    broken(folder / "one", folder / "on two", after=2)
    codes, outputs = ended(start(folder / "on two", 2, *BRIEF, "--config.mesh.fsdp=1", "--config.mesh.model=2"))
    assert codes == [0, 0] and "resumed at step 2" in outputs[0], outputs
    broken(folder / "on two", folder / "on one", after=4)
    codes, outputs = ended(start(folder / "on one", 1, *BRIEF))
    assert codes == [0] and "resumed at step 4" in outputs[0], outputs
    for name in ("on two", "on one"):
        assert losses(folder / name) == pytest.approx(losses(folder / "one"), rel=1e-5)


def test_the_same_processes_go_on_bit_for_bit(runs):
    folder, _ = runs
    broken(folder / "two", folder / "again", after=4)
    codes, outputs = ended(start(folder / "again", 2, *BRIEF))
    assert codes == [0, 0] and "resumed at step 4" in outputs[0], outputs
    for name in ("loss", "val_loss", "grad_norm", "update_norm", "param_norm"):
        assert column(folder / "again", name) == column(folder / "two", name) != {}


# Where SIGTERM comes to a process of a run, each in a start of its own; the last start ends it.
STOPS = ("term@data=1:process=1", "term@compile=1:process=0", "term@step=2:process=1", "term@evaluation=1:process=0",
         "term@restore=1:process=1", "term@save/arrays=1:process=0")


def test_a_signal_to_one_in_whatever_phase_stops_both_and_what_goes_on_is_the_unbroken_run(runs):
    folder, _ = runs
    for stop in STOPS:
        codes, outputs = ended(start(folder / "stopped", 2, *BRIEF, faults=stop))
        assert codes == [75, 75], (stop, outputs)
        assert sum(f"fault: {stop}" in output for output in outputs) == 1, outputs
    codes, outputs = ended(start(folder / "stopped", 2, *BRIEF))
    assert codes == [0, 0], outputs
    for name in ("loss", "val_loss", "val_loss_stderr", "grad_norm", "update_norm", "param_norm"):
        assert column(folder / "stopped", name) == column(folder / "two", name) != {}
    lines = [[(row["step"], row.get("tag")) for row in map(json.loads, (folder / name / "metrics.jsonl").open())]
             for name in ("stopped", "two")]
    assert lines[0] == lines[1], "no row is missing, and none is there twice"
    assert sorted(path.name for path in (folder / "stopped" / "checkpoints").iterdir())[-1] == "6"
    assert not list((folder / "stopped" / "checkpoints").glob("*-*")), "no half of a checkpoint is left"


def test_four_processes_give_the_numbers_of_one_on_any_mesh(tmp_path):
    """Heads and tokens divided among processes too, which then read the same rows; data in folders of their own."""
    codes, outputs = ended(launch(4, "-c", "import test_processes; test_processes.host()", *SETTINGS,
                                  f"--workdir={tmp_path}"))
    assert codes == [0] * 4, outputs
    expected = numbers(tmp_path / "0")
    for rank in range(4):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert len(found) == len(MESHES)
        for mesh, (_, values) in found.items():
            assert values == pytest.approx(expected, rel=1e-5), mesh
        assert [rows for rows, _ in found.values()] == [8, 4], "of 8, those that the process needs"


def host():
    """One of four processes: trains briefly on each mesh, and writes the numbers that it sees."""
    _, values = command.parse(sys.argv, doc="", **cluster.FLAGS)
    hosts.start(values.coordinator, values.processes, values.process)
    folder, found = pathlib.Path(values.workdir), {}
    for mesh in MESHES:
        with jax.set_mesh(parallel.make_mesh(mesh)):
            rows = len(hosts.rows_here(8))
            found[str(mesh)] = rows, numbers(folder / values.process)
    (folder / f"{values.process}.json").write_text(json.dumps(found))


def numbers(root) -> list[float]:
    """What three steps and an evaluation give under the mesh in use, with a store in a folder."""
    c, _ = command.parse(["", *SETTINGS, f"--config.data.root={root}"], doc="")
    recipe = pretrain.Pretraining(c, store.prepare(c.data, say=lambda line: None))
    plan, model = recipe.recipe(), recipe.model()
    tx, rate = optim.make(c.optim, c.train.steps, kinds(model)), optim.schedule(c.optim, c.train.steps)
    state, found = update.begin(model, tx), []
    step = jax.jit(update.make_step(plan.loss, tx, rate), compiler_options=tiny.QUICK)
    with plan.batches(0) as batches:
        for k in range(3):
            state, metrics = step(state, hosts.put_batch(next(batches), c.train.batch), jax.random.key(k))
            found += [float(metrics[name]) for name in ("loss", "grad_norm")]
    values = pretrain.Evaluation(recipe)(state.model, 20)["markov"]
    return found + [values["val_loss"], values["val_accuracy"], values["val_tokens"]]
