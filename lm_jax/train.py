"""Train a model: from text to a run folder that can be stopped and started again at any time.

    python -m lm_jax.train --config=configs/tiny.py

The same command goes on where the last one ended. The folder (`--workdir`, default runs/<config name>) gets
config.json, manifest.json, metrics.jsonl, checkpoints/, plots/loss.png and summary.json. Exit codes: 0 done, 2 the
config cannot run, 74 no room on a disk, 75 stopped by a signal and saved, 77 data are damaged, 78 diverged, 79 no
checkpoint is intact.
"""

import math
import time
from dataclasses import replace

import jax

from lm_jax import config, errors, hosts, parallel, plots, trainer
from lm_jax.data import store
from lm_jax.recipes import pretrain, report
from lm_jax.workdir import Workdir

EXIT = {"ok": 0, "stopped": 75, "diverged": 78}


def main(argv):
    c, values = config.parse(argv, doc=__doc__, **hosts.FLAGS)
    hosts.start(values.coordinator, values.processes, values.process)
    shared = replace(c, data=replace(c.data, root=""))  # each machine may have a folder of its own
    hosts.same(config=config.digest(config.to_dict(shared)))
    mesh = parallel.use(c.mesh)
    workdir = Workdir(values.workdir, writes=jax.process_index() == 0)
    begun, mark = time.time(), hosts.mark()

    def prepared():
        parallel.rows_divide(c.train.batch, c.train.microbatches)
        pretrain.attention(c)  # what cannot be is said before data are prepared
        return store.prepare(c.data, say=hosts.say)

    hosts.together(lambda: workdir.open(config.to_dict(c), mark))
    recipe = pretrain.Pretraining(c, hosts.together(prepared))
    hosts.same(data=recipe.store.digest)
    evaluation = pretrain.Evaluation(recipe)
    plan = recipe.recipe((pretrain.evaluate_every(c, evaluation),))
    with trainer.Trainer(c, recipe.model(), plan, workdir, say=hosts.say) as run:
        workdir.write_json("manifest.json", report.manifest(recipe, mesh, workdir.read_json("manifest.json")))
        run.log.say(report.headline(recipe, mesh))
        status, results = run.fit(), {}
        if status == "ok":
            results = evaluation(trainer.evaluated(run.state), 0)
            pretrain.record(run, results)
            if not all(math.isfinite(values["val_loss"]) for values in results.values()):
                status = "diverged"
    sample = report.sampled(recipe, trainer.evaluated(run.state)) if status == "ok" else ""
    if workdir.writes:
        summary = report.summary(recipe, run, status, results, time.time() - begun)
        workdir.write_json("summary.json", summary)
        plots.loss_curve(workdir)
        print(f"{sample}\n\n{report.closing(summary, workdir, argv)}".strip())
    hosts.exchange("end", status)  # JAX gives up whoever comes to an end long before the others
    return EXIT[status]


if __name__ == "__main__":
    errors.run(main)
