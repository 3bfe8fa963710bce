"""Train several points of a sweep in one process, where that is cheaper and their numbers stay what they are alone.

    python -m lm_jax.together --config=configs/sweeps/tiny.py --out=sweeps/tiny --points=0123456789ab,ba9876543210

Points that differ in length alone share a trunk: the shortest is trained first, and each longer one begins as the one
before it was when its cool-down began. Small points that differ in seed, learning rate, weight decay or initial
weights are trained side by side on one device: as one program, or on a CPU one a core. `python -m lm_jax.sweep` starts
this; what has a result is left as it is. Exit codes as of lm_jax.train, 78 if any diverged.
"""

from lm_jax import cluster, command, errors, pages
from lm_jax.devices import STACKED

FLAGS = {"out": "the sweep's folder", "points": "ids, with commas between",
         "stacked": f"most parameters of points that are trained side by side; default {STACKED}"}


def main(argv):
    c, values = command.parse(argv, doc=__doc__, **FLAGS, **cluster.FLAGS)
    from lm_jax.scaling import points  # late, as errors.run says

    return points.run(c, values)


if __name__ == "__main__":
    pages.settle()
    errors.run(main)
