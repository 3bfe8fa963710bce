"""The one call that checks a machine with a GPU asks for what its goals name, and tells what became of each job."""

import importlib.util
import json
import os
import pathlib
import sys

import pytest

from lm_jax import bench, command
from lm_jax.measure.figures import Figure
from lm_jax.models import flops
from lm_jax.recipes import pretrain

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def script(monkeypatch):
    monkeypatch.chdir(ROOT)
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "experiments" / "gpu_check.py")
    monkeypatch.setitem(sys.modules, "gpu_check", module := importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    return module


def test_the_gpu_check_asks_for_the_models_that_its_goals_name(script):
    found = {}
    for job in (job for dry in (True, False) for job in script.jobs(dry) if "lm_jax.bench" in job.command):
        asked = bench.parse(["bench", *job.command[2:]])
        found[job.name] = pretrain.planned(command.parse(["bench", *asked.config], doc="")[0])
    big, small = found["1b"], found["125m"]
    assert (big.model.width, big.model.depth, big.data.length, big.model.remat) == (2048, 16, 2048, "none")
    assert (small.model.dtype, small.model.remat, small.train.microbatches) == ("bfloat16", "none", 1)
    assert 0.95e9 < flops.parameters(big.model)["non_embedding"] < 1.05e9
    assert script.GOALS.keys() <= found.keys() and script.MINUTES < 8


def test_the_gpu_check_tells_what_became_of_each_job(script, tmp_path):
    figure = Figure("tokens", 2e6, "tokens/s").record()
    line = json.dumps({"part": "training", "title": "a title", "figures": [figure]})
    jobs = [script.Job("good", ("-c", f"print({line!r})"), 30), script.Job("bad", ("-c", "exit('why')"), 30)]
    done = [script.run(job, 30, dict(os.environ)) for job in jobs] + [script.run(jobs[0], 1, dict(os.environ))]
    assert [one["status"] for one in done] == ["ok", "code 1", "left out: no time"]
    script.written(tmp_path, done)
    page = (tmp_path / "gpu_check.md").read_text()
    assert "| tokens | 2.00 Mtokens/s |" in page and "why" in page
    assert json.loads((tmp_path / "gpu_check.json").read_text())[0]["parts"][0]["figures"] == [figure]
