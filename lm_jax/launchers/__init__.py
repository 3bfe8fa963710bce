"""Ways to run the points of a sweep: on this machine, or rendered for a cluster's own engine, which submits them."""

from lm_jax.launchers import jobset, sky, slurm
from lm_jax.launchers.submit import Submission, submit

LAUNCHERS = {"jobset": jobset.render, "sky": sky.render, "slurm": slurm.render}
