"""Train a model: from text to a run folder that can be stopped and started again at any time.

    python -m lm_jax.train --config=configs/tiny.py

The same command goes on where the last one ended. The folder (`--workdir`, default runs/<config name>) gets
config.json, manifest.json, metrics.jsonl, checkpoints/, plots/loss.png and summary.json. With `--start` a run begins as
another that differs in its length alone, and is bit for bit what it would be by itself. `--doctor=RUN`, alone, says
what a run's folder is, whether it is whole, and what a restart would do. Exit codes: 0 done, 2 the config cannot run,
74 no room on a disk, 75 stopped by a signal and saved, 76 hung, 77 data are damaged or devices disagree, 78 diverged,
79 no checkpoint is intact.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

from lm_jax import cluster, command, config, errors, pages
from lm_jax.errors import ConfigError

START = "folder of a run to begin as: one that differs in its length alone, before either cools down (wsd)"


def main(argv):
    if any(argument.startswith("--doctor") for argument in argv):
        return examined(argv)
    c, values = command.parse(argv, doc=__doc__, start=START, **cluster.FLAGS)
    import jax  # late, as errors.run says

    from lm_jax import faults, hosts, parallel, peers, signals
    from lm_jax.clock import Clock, age
    from lm_jax.preflight import room
    from lm_jax.recipes import report, run
    from lm_jax.workdir import Workdir

    faults.planned()  # what is wrong with them is said before anything is done
    hosts.start(values.coordinator, values.processes, values.process, deterministic=c.train.deterministic)
    with signals.ending(), Clock(age()) as clock:
        shared = replace(c, data=replace(c.data, root=""))  # each machine may have a folder of its own
        hosts.same(config=config.digest(config.to_dict(shared)))
        mesh = parallel.use(c.mesh)
        hosts.together(partial(room.refuse, c), "room")
        workdir = Workdir(values.workdir, writes=jax.process_index() == 0)
        recipe = run.opened(c, workdir, clock, hosts.mark())
        summary, sample = run.train(recipe, workdir, clock, mesh, start=values.start)
        if workdir.writes:
            print(f"{sample}\n\n{report.closing(summary, workdir, argv)}".strip())
        peers.exchange("end", summary["status"])  # JAX gives up whoever comes to an end long before the others
    return run.EXIT[summary["status"]]


def examined(argv) -> int:
    """Say what there is to say of a run's folder; the code that a restart would end with at once, or 0."""
    flag, _, folder = argv[1].partition("=")
    if len(argv) != 2 or flag != "--doctor" or not folder:
        raise ConfigError("--doctor=RUN stands alone: it reads a run's folder and changes nothing")
    from lm_jax.recipes import doctor  # as above

    lines, code = doctor.report(Path(folder))
    print("\n".join(lines))
    return code


if __name__ == "__main__":
    pages.settle()
    errors.run(main)
