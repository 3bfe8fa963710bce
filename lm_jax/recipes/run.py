"""One pretraining run, from its config to its summary: a run of `python -m lm_jax.train`, or a point of a sweep."""

import math
import time

from lm_jax import hosts, parallel, peers, trainer, update
from lm_jax.clock import Clock
from lm_jax.config import Config, to_dict
from lm_jax.data import store
from lm_jax.recipes import pretrain, report
from lm_jax.workdir import Workdir

EXIT = {"ok": 0, "stopped": 75, "diverged": 78}  # codes of a program, by how its run ended


def opened(c: Config, workdir: Workdir, clock: Clock, mark: str = "") -> pretrain.Pretraining:
    """Claim the folder and prepare the data; what cannot be is said before that."""

    def prepared():
        parallel.rows_divide(c.train.batch, c.train.microbatches)
        pretrain.attention(c)
        return store.prepare(c.data, say=hosts.say)

    hosts.together(lambda: workdir.open(to_dict(c), mark), "folder")
    clock.watch(workdir.path, writes=workdir.writes, patience=c.train.watchdog)
    with clock.phase("data"):
        recipe = pretrain.Pretraining(c, hosts.together(prepared, "data", limit=peers.ENDLESS))
    hosts.same(data=recipe.store.digest)
    return recipe


def train(recipe: pretrain.Pretraining, workdir: Workdir, clock: Clock, mesh: dict, *, start=None) -> tuple[dict, str]:
    """Train to the end or a signal; the run's summary, and what its model makes of a held-out text.

    `start` is the folder of a run that this one begins as.
    """
    c, begun, evaluation = recipe.config, time.monotonic(), pretrain.Evaluation(recipe, beat=clock.beat)
    plan = recipe.recipe((pretrain.evaluate_every(c, evaluation),))
    with trainer.Trainer(c, recipe.model(), plan, workdir, start=start, clock=clock, say=hosts.say) as run:
        manifest(recipe, workdir, mesh)
        run.log.say(report.headline(recipe, mesh))
        summary = ended(recipe, run, run.fit(), evaluation, begun)
    with clock.phase("end"):
        sample = report.sampled(recipe, update.evaluated(run.state)) if summary["status"] == "ok" else ""
        if workdir.writes:
            from lm_jax import plots  # matplotlib takes a third of a second to load, which no start need wait for

            plots.loss_curve(workdir)
    return summary, sample


def manifest(recipe: pretrain.Pretraining, workdir: Workdir, mesh: dict):
    """Write the run's manifest."""
    workdir.write_json("manifest.json", report.manifest(recipe, mesh, workdir.read_json("manifest.json")))


def ended(recipe: pretrain.Pretraining, run: trainer.Trainer, status: str, evaluation, begun: float) -> dict:
    """Evaluate a run that ended well, and write its summary."""
    results = {}
    if status == "ok":
        with run.clock.phase("evaluation"):
            results = evaluation(update.evaluated(run.state), 0)
            pretrain.record(run, results)
        if not all(math.isfinite(values["val_loss"]) for values in results.values()):
            status = "diverged"
    summary = report.summary(recipe, run, status, results, time.monotonic() - begun)
    run.workdir.write_json("summary.json", summary)
    return summary
