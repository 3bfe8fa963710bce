"""Run what a sweep's config varies: points that are done never again, points that broke off from where they were.

    python -m lm_jax.sweep --config=configs/sweeps/tiny.py

A sweep's config is a config whose file also has get_points(c), a list of overrides, one a point. The same command goes
on where the last one ended, and runs what was added since; several at once share the work. The folder (`--out`,
default sweeps/<config name>) gets runs.jsonl, a record a point, which `python -m lm_jax.fit` reads, and points/<id>/,
the folder of each run. Exit codes: 0 every point has a result, 1 some were given up (the same command tries them
again), 2 the sweep cannot run, 74 no room on a disk, 75 stopped, what ran has saved.

On a cluster the points are rendered for its own engine and submitted by its own command, which --dry_run only shows:

    python -m lm_jax.sweep --config=configs/sweeps/chinchilla.py --launcher=jobset --topology=v5e-16 \\
        --out=/bucket/chinchilla --settings='image=... bucket=...'
"""

from lm_jax import command, errors
from lm_jax.devices import STACKED
from lm_jax.preflight.topology import FORMS

FLAGS = {
    "out": "the sweep's folder; default sweeps/<config name>",
    "launcher": "where points run: local (default), or rendered and submitted: jobset (GKE), sky (SkyPilot), slurm",
    "jobs": "local: points at once, which share this machine's cores; default one, or one for each accelerator",
    "retries": "local: further attempts at a point that crashes; default 2",
    "minutes": "time limit of an attempt at a point; points that share a command have it once a length; default none",
    "stacked": "most parameters of points that share a program: those that differ in seed, learning rate, weight decay "
               f"or init alone; default {STACKED}, 0 stacks none",
    "topology": f"hardware that points must fit, and are priced for: {FORMS}",
    "settings": "of a cluster's launcher, with spaces between: 'image=... bucket=...'",
}
SHOWN = {"dry_run": "show the points and what they take, run nothing"}


def main(argv):
    c, values = command.parse(argv, doc=__doc__, switches=SHOWN, **FLAGS)
    from lm_jax.scaling import conduct  # late, as errors.run says

    return conduct.run(c, values, argv)


if __name__ == "__main__":
    errors.run(main)
