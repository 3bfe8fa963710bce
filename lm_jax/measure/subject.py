"""What is measured of a config: its own model, step and loader, over rows that any machine has.

Speed does not ask what a text says: the rows are bytes of the standard library in place of the config's corpus, as
long as its own and made by its objective, and the model keeps the vocabulary that it would have.
"""

import contextlib
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import jax

from lm_jax import parallel
from lm_jax.config import Config, to_dict
from lm_jax.data import store
from lm_jax.meter import Profile
from lm_jax.models import flops
from lm_jax.preflight import room
from lm_jax.recipes import pretrain
from lm_jax.trainer import Recipe, Trainer
from lm_jax.workdir import Workdir

STEPS = 100_000  # more than a benchmark sends: no hook of the run is due in it


@dataclass(frozen=True)
class Subject:
    """A config that is being measured: its recipe, and its trainer, whose steps are sent one by one."""

    config: Config
    pretraining: pretrain.Pretraining
    recipe: Recipe
    trainer: Trainer

    @property
    def flops(self) -> int:
        """Of the model, a step."""
        return self.config.train.batch * flops.train(self.config.model, *pretrain.row_lengths(self.config))


@contextlib.contextmanager
def opened(c: Config):
    """The subject that a config is, in a folder that is gone afterwards. ConfigError where it has no room here."""
    alone = jax.device_count() == 1
    mesh = contextlib.nullcontext() if alone else jax.sharding.set_mesh(parallel.make_mesh(c.mesh))
    with mesh, tempfile.TemporaryDirectory() as place:
        room.refuse(c)
        planned = over_bytes(c, Path(place))
        with opened_in(planned, Path(place)) as subject:
            yield subject


@contextlib.contextmanager
def opened_in(planned: Config, place: Path):
    """The same of a config whose data are prepared, or will be, where it says."""
    recipe = pretrain.Pretraining(planned, store.prepare(planned.data, say=tell))
    plan, workdir = recipe.recipe(), Workdir(place / "run")
    workdir.open(to_dict(planned))
    try:
        with Trainer(planned, recipe.model(), plan, workdir, say=tell, quiet=True) as run:
            yield Subject(replace(planned, model=recipe.model_config), recipe, plan, run)
    finally:
        workdir.close()


def over_bytes(c: Config, place: Path) -> Config:
    """The config with the standard library's bytes as its data, and nothing due but steps."""
    planned = pretrain.planned(c)
    data = replace(c.data, sources="stdlib", tokenizer="byte", root=str(place / "data"), weights=(), epochs=())
    train = replace(c.train, steps=STEPS, log_every=1, eval_every=STEPS, checkpoint_every=STEPS, compare_every=0,
                    watchdog=0.0, loggers="", profile=0)
    return replace(c, model=planned.model, data=data, train=train)


def unwatched(subject: Subject) -> Profile:
    """What a trainer asks for beside batches: a profile, of no step."""
    return Profile(0, subject.trainer.workdir)


def tell(line: str):
    """What is done meanwhile goes to standard error: standard output is for figures."""
    print(line, file=sys.stderr, flush=True)


def told(subject: Subject) -> str:
    """What is measured, for people."""
    c, count = subject.config, flops.parameters(subject.config.model)
    return (f"{count['total']:,} parameters ({count['non_embedding']:,} without embeddings), {c.train.batch} rows of "
            f"{c.data.length} tokens, {c.model.dtype}, attention by {pretrain.attention(c)}, {c.optim.name}")
