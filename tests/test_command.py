"""A command line that cannot run ends with code 2 before any device: all that is wrong is said, with its cure."""

import pathlib
import subprocess
import sys

import pytest

from lm_jax import command
from lm_jax.errors import ConfigError

ROOT = pathlib.Path(__file__).parent.parent
TINY = f"--config={ROOT}/configs/tiny.py"
# arguments, of which those that end with a key are --config.<key>=<value>; and what of each must be said
TABLE = [
    # unknown and misspelt
    ("optim.warmpu=5", "unknown key optim.warmpu: did you mean optim.warmup?"), ("model.widht=64", "model.width?"),
    ("data.lenght=64", "data.length?"), ("trian.steps=5", "train.steps?"),
    ("model.rope.tetha=1e4", "model.rope.theta?"),
    ("model.moe.expert=4", "model.moe.experts?"), ("mesh.modle=2", "mesh.model?"),
    ("--workdri=x", "workdir"), ("--confg=x", "config"), ("--strat=runs/x", "start"),
    # of another type
    ("train.steps=many", "many"), ("train.steps=1.5", "1.5"), ("optim.lr=fast", "fast"),
    ("model.causal=maybe", "maybe"),
    ("optim.betas=0.9", "betas"), ("optim.lr=nan", "optim.lr=nan: wanted a finite number"),
    ("optim.eps=inf", "optim.eps=inf: wanted a finite number"),
    # out of range
    ("train.steps=0", "train.steps=0: at least 1"), ("train.steps=-5", "at least 1"),
    ("train.batch=0", "train.batch=0: at least 1"), ("train.microbatches=0", "at least 1"),
    ("data.length=1", "data.length=1: at least 2"), ("model.depth=0", "model.depth=0: at least 1"),
    ("model.heads=0", "model.heads=0: at least 1"), ("optim.lr=0.0", "optim.lr=0.0: above 0"),
    ("optim.lr=-1e-3", "above 0"), ("optim.warmup=-1", "at least 0"), ("model.dropout=1.0", "below 1"),
    ("data.noise=1.5", "a share between 0 and 1"), ("data.vocab=0", "data.vocab=0: at least 1"),
    ("mesh.data=0", "or -1 for the devices that are left"),
    # no such choice
    ("optim.name=adam", "choose one of adamw, adafactor, lion, muon"), ("model.norm=batch", "choose one of rms"),
    ("data.objective=clm", "choose one of causal"), ("model.attention=flash", "choose one of auto"),
    ("model.dtype=fp16", "choose one of float32, bfloat16"), ("optim.schedule=cos", "choose one of cosine"),
    # that contradict each other
    ("model.width=250 model.heads=4 model.head_size=0", "make it a multiple, or set model.head_size"),
    ("model.heads=4 model.kv_heads=3", "model.heads=4 over model.kv_heads=3: make it a multiple"),
    ("train.batch=10 train.microbatches=4", "train.batch=10 in train.microbatches=4: make it a multiple"),
    ("data.length=4096 model.positions=learned model.max_length=64", "longer than model.max_length=64"),
    ("model.moe.experts=4 model.moe.top_k=8", "between 1 and model.moe.experts=4"),
    ("model.moe.experts=4 model.moe.groups=0", "model.moe.groups=0: at least 1"),
    ("model.window_pattern=SF", "model.window=0"), ("data.objective=span", "model.encoder_depth > 0"),
    ("model.causal=False", "wants a decoder"), ("mesh.data=-1 mesh.fsdp=-1", "one axis alone can take"),
    ("train.loggers=tensorboad", "'tensorboard', 'wandb'"), ("data.sources=;", "name one, such as stdlib"),
    ("model.base_width=64 model.head_size=0", "name the size"), ("name=../x", "can name a folder"),
]


def flags(case: str) -> list[str]:
    return [one if one.startswith("--") else f"--config.{one}" for one in case.split()]


def refused(*argv: str) -> str:
    with pytest.raises(ConfigError) as error:
        command.parse(["train", TINY, *argv], doc="", start="")
    return str(error.value)


@pytest.mark.parametrize("case, said", TABLE, ids=[case for case, _ in TABLE])
def test_what_cannot_run_is_refused_with_a_cure(case, said):
    message = refused(*flags(case))
    assert said in message and "Traceback" not in message and "\n  File" not in message


def test_all_that_is_wrong_is_said_at_once_and_nothing_that_is_not():
    """Misspelt, ill-typed, out of range, no choice and contradictory: every one of the table that stands alone."""
    cases = ["optim.warmpu=5", "model.rope.tetha=1e4", "train.steps=many", "optim.lr=-1.0", "optim.name=adam",
             "data.noise=1.5", "model.heads=4 model.kv_heads=3", "train.batch=10 train.microbatches=4", "name=../x",
             "mesh.data=-1 mesh.fsdp=-1"]
    message = refused(*[flag for case in cases for flag in flags(case)])
    for case, said in TABLE:
        if case in cases:
            assert said in message, case
    assert len(message.splitlines()) == len(cases), message


def test_a_key_that_is_wrong_by_itself_is_not_blamed_for_others():
    """Its value is not known: that it contradicts another cannot be either."""
    message = refused("--config.model.norm=batch", "--config.model.heads=0", "--config.model.kv_heads=3")
    assert "model.norm" in message and "model.heads=0: at least 1" in message
    assert "model.width" not in message


@pytest.mark.parametrize("main, argv, said", [
    ("train", ["--config.optim.warmpu=5", "--config.model.norm=batch", "--config.train.batch=10",
               "--config.train.microbatches=4"], ["warmup", "choose one of rms", "make it a multiple"]),
    ("plan", ["--topology=v5q-8", "--config.data.length=64"], ["did you mean"]),
    ("train", ["--config.mesh.model=3"], ["model=3 does not divide 8 devices: use 1, 2, 4, 8"]),
    ("train", ["--config.train.batch=12", "--config.mesh.data=8", "--config.mesh.fsdp=1"], ["use a multiple of 8"]),
    ("sweep", ["--config.optim.lr=fast", "--jobs=many"], ["fast"]),
    ("generate", ["--model=nowhere/at-all", "--temperature=hot"], ["hot"]),
], ids=["train", "plan", "mesh", "batch", "sweep", "generate"])
def test_a_program_ends_with_code_2(main, argv, said, tmp_path):
    config = [] if main == "generate" else [TINY]
    done = subprocess.run([sys.executable, "-m", f"lm_jax.{main}", *config, *argv], cwd=ROOT, text=True,
                          capture_output=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert all(part in done.stderr for part in said), done.stderr
