"""A config that cannot run says everything that is wrong with it, and how to cure it, before anything starts."""

import dataclasses
import functools
import json
import pathlib
import subprocess
import sys

import ml_collections
import pytest

from lm_jax import command, config
from lm_jax.config import ConfigError

ROOT = pathlib.Path(__file__).parent.parent


def wrong(**leaves) -> str:
    """The message about the default config with some leaves set, dots written as two underscores."""
    values = config.default().unlock().to_dict()
    for key, value in leaves.items():
        *path, last = key.split("__")
        section = values
        for name in path:
            section = section[name]
        section[last] = value
    with pytest.raises(ConfigError) as error:
        config.resolve(ml_collections.ConfigDict(values))
    return str(error.value)


def test_an_unknown_key_is_told_the_nearest():
    assert "unknown key optim.learning: did you mean" not in wrong(optim__learning=1.0)
    assert "unknown key optim.warmups: did you mean optim.warmup?" in wrong(optim__warmups=5)
    assert "unknown key model.rope.tetha: did you mean model.rope.theta?" in wrong(model__rope__tetha=5.0)
    with pytest.raises(AttributeError, match="warmup"):  # in a config file, on the line itself
        config.default().optim.warmups = 5


@pytest.mark.parametrize("key, value, wanted", [
    ("train__steps", 1.5, "int"), ("train__steps", "10", "int"), ("train__steps", True, "int"),
    ("optim__lr", "fast", "float"),
    ("model__causal", 1, "bool"), ("name", 3, "str"), ("optim__betas", 0.9, "tuple"), ("model__rope", 3, "section")])
def test_a_wrong_type_is_named_with_the_one_wanted(key, value, wanted):
    message = wrong(**{key: value})
    assert key.replace("__", ".") in message and repr(value) in message and wanted in message


def test_a_whole_number_is_a_float_and_a_list_a_tuple():
    values = config.to_dict(config.Config())
    values["optim"] |= dict(lr=1, betas=[0.8, 0.9])
    optim = config.from_dict(values).optim
    assert type(optim.lr) is float and optim.betas == (0.8, 0.9)


def test_everything_wrong_is_said_at_once():
    message = wrong(optim__warmups=5, train__steps="ten", model__widht=64)
    assert all(part in message for part in ("optim.warmups", "train.steps", "model.widht"))
    message = wrong(model__heads=3, data__noise=2.0, train__batch=0, optim__lr=-1.0)
    assert all(part in message for part in ("model.heads", "data.noise", "train.batch", "optim.lr"))


TWO = dict(data__sources="stdlib; text:corpus/*.txt")


@pytest.mark.parametrize("leaves, cure", [
    (dict(model__norm="batch"), "choose one of rms, layer, none"),
    (dict(model__width=250, model__heads=4), "model.head_size"),
    (dict(model__heads=4, model__kv_heads=3), "multiple"),
    (dict(model__positions="learned", model__max_length=128), "longer than model.max_length=128"),
    (dict(model__window_pattern="SX"), "S (sliding)"),
    (dict(model__moe=dict(experts=2, top_k=3)), "between 1 and model.moe.experts=2"),
    (dict(model__encoder_depth=2, model__causal=False, data__objective="span"), "the decoder of"),
    (dict(data__objective="masked"), "model.causal=False"),
    (dict(model__causal=False), "wants a decoder"),
    (dict(data__objective="span"), "model.encoder_depth > 0"),
    (dict(data__objective="span", model__encoder_depth=2, data__strategy="fit"), "'concat'"),
    (dict(model__head="mlm_pairs"), "'masked_pairs' go together"),
    (dict(data__objective="masked_pairs", model__causal=False, model__head="mlm_pairs"), "model.types=2"),
    (dict(model__base_width=64, model__norm_place="post"), "'pre' or 'sandwich'"),
    (dict(train__batch=10, train__microbatches=4), "multiple"),
    (dict(train__loggers="wandb,comet"), "tensorboard"),
    (dict(mesh__data=0), "mesh.data=0: at least 1, or -1"),
    (dict(mesh__data=-2), "mesh.data=-2: at least 1, or -1"),
    (dict(mesh__data=-1), "mesh.data and mesh.fsdp are -1"),
    (dict(optim__betas=(0.9,)), "two numbers"),
    (dict(optim__betas=(0.9, 1.0)), "two numbers"),
    (dict(optim__betas=(0.9, "high")), "two numbers"),
    (dict(optim__betas=((0.9, 0.95),)), "two numbers"),
    (dict(name=""), "name=''"),
    (dict(name="../run"), "without /"),
    (dict(name=".."), "name a folder"),
    (dict(seed=-1), "seed=-1: at least 0"),
    (dict(data__span=0.0), "data.span=0.0: at least 1"),
    (dict(data__sources=" ; "), "name one, such as stdlib"),
    (dict(data__weights=(1.0, 2.0)), "each of the 1 sources"),
    (dict(data__weights=(1.0, "all"), **TWO), "data.weights=(1.0, 'all'): a number for each"),
    (dict(data__weights=(1.0, -1.0), **TWO), "a weight >= 0"),
    (dict(data__weights=(0.0, 0.0), **TWO), "not all 0"),
    (dict(data__weights=((0.0, 1.0, 1.0), (0.5, 1.0)), **TWO), "each of the 2 sources"),
    (dict(data__weights=((0.0, 1.0, 1.0), 0.5), **TWO), "or rows (start fraction"),
    (dict(data__weights=((0.1, 1.0, 1.0),), **TWO), "the first at 0"),
    (dict(data__weights=((0.0, 1.0, 1.0), (0.5, 1.0, 0.0), (0.5, 0.0, 1.0)), **TWO), "rising"),
    (dict(data__epochs=(1.0, 1.0, 1.0), **TWO), "each of 2 sources"),
    (dict(data__epochs=(-1.0,)), "a number >= 0"),
    (dict(data__epochs=("all",)), "a number >= 0"),
    (dict(model__vocab=-1), "model.vocab=-1: at least 0"),
    (dict(model__hidden=-1), "model.hidden=-1: at least 0"),
    (dict(model__head_size=-16), "model.head_size=-16: at least 0"),
    (dict(model__kv_heads=-1), "model.kv_heads=-1: at least 0"),
    (dict(model__dtype="float16"), "choose one of float32, bfloat16"),
    (dict(model__moe=dict(shared=1)), "model.moe.experts=0: set experts"),
    (dict(model__moe=dict(experts=4, pattern="EX")), "E (experts) and D (dense)"),
    (dict(model__moe=dict(experts=8, groups=3)), "divide the experts"),
    (dict(model__moe=dict(experts=8, groups=4, top_k=4)), "more experts than"),
    (dict(model__value_size=8), "model.latent=0"),
    (dict(model__latent=8, model__qk_norm=True), "leave those at their defaults"),
    (dict(model__head="tags"), "pretraining wants"),
    (dict(model__positions="learned", model__rope=dict(local_theta=1e4)), "of sliding layers"),
    (dict(model__pooler="tanh"), "model.head='classes'"),
    (dict(model__base_depth=2), "switched on by model.base_width"),
    (dict(model__window_pattern="SF"), "model.window=0: say how many"),
    (dict(model__rope=dict(scaling="linear", factor=0.0)), "model.rope.factor=0.0: above 0"),
    (dict(model__rope=dict(fraction=1.5)), "a share between 0 and 1"),
    (dict(model__rope=dict(scaling="yarn", factor=2.0), model__positions="alibi"), "only 'rope' can be scaled"),
    (dict(model__types=2), "set model.types=0"),
    (dict(model__dropout=1.0), "below 1"),
    (dict(optim__ema=1.0), "below 1"),
], ids=lambda value: None if isinstance(value, str) else "-".join(value))
def test_an_impossible_combination_comes_with_its_cure(leaves, cure):
    assert cure in wrong(**leaves)


def test_weights_and_caps_that_fit_their_sources_are_taken():
    values = config.to_dict(config.Config())
    values["data"] |= dict(sources="stdlib; text:corpus/*.txt;", weights=[[0, 1, 0], [0.5, 0, 3]], epochs=[0, 4])
    assert config.from_dict(values).data.weights == ((0, 1, 0), (0.5, 0, 3))
    values["data"] |= dict(weights=[1, 2.5], epochs=[4.0])
    assert config.from_dict(values).data.epochs == (4.0,)


def test_a_logger_without_its_package_stops_a_command_and_spoils_no_record(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(ConfigError, match=r"pip install 'lm_jax\[wandb\]'"):
        parse(f"--config={ROOT}/configs/tiny.py", "--config.train.loggers=wandb")
    run = config.to_dict(config.Config(train=config.TrainConfig(loggers="wandb")))
    assert config.from_dict(run).train.loggers == "wandb", "where it is read, nothing is logged"


def test_a_config_goes_through_json_and_back():
    c = dataclasses.replace(config.Config(), name="there", data=config.DataConfig(weights=((0.0, 1.0), (0.5, 2.0))))
    assert config.from_dict(json.loads(json.dumps(config.to_dict(c)))) == c
    assert config.digest(config.to_dict(c)) == config.digest(config.to_dict(config.from_dict(config.to_dict(c))))
    assert config.digest(config.to_dict(c)) != config.digest(config.to_dict(config.Config()))


def test_a_difference_names_the_leaves():
    old, new = config.to_dict(config.Config()), config.to_dict(config.Config(seed=1, optim=config.OptimConfig(lr=0.5)))
    assert config.difference(old, new) == ["optim.lr: 0.003 -> 0.5", "seed: 0 -> 1"]
    assert config.difference(old, old) == []


def test_the_knobs_stay_countable():
    def leaves(cls):
        kinds = [field.default_factory for field in dataclasses.fields(cls)]
        return sum(leaves(kind) if dataclasses.is_dataclass(kind) else 1 for kind in kinds)

    assert leaves(config.Config) <= 118, "about 80 are meant, and what published models need: can one go?"


def test_every_choice_names_its_default():
    for key, choices in config.CHOICES.items():
        assert functools.reduce(getattr, key.split("."), config.Config()) in choices, key


def parse(*argv: str, workdir=None):
    return command.parse(["train.py", *argv], doc="Trains.")


def test_the_command_line_overrides_single_keys():
    c, flags = parse(f"--config={ROOT}/configs/tiny.py", "--config.optim.lr=0.5", "--config.train.steps=7",
                     "--config.optim.warmup=0", "--config.model.rope.theta=3",
                     "--config.optim.betas=(0.8, 0.9)", "--config.data.sources=text:a;text:b")
    assert (c.optim.lr, c.train.steps, c.model.rope.theta, c.optim.betas) == (0.5, 7, 3.0, (0.8, 0.9))
    assert c.data.sources == "text:a;text:b" and c.name == "tiny"
    assert flags.workdir == "runs/tiny"
    assert parse(f"--config={ROOT}/configs/tiny.py", "--workdir=elsewhere")[1].workdir == "elsewhere"


@pytest.mark.parametrize("argv, said", [
    ((), "--config=configs/tiny.py"),
    (("--config=configs/none.py",), "no config file 'configs/none.py'"),
    (("--config=configs/tiny.py", "--config.optim.lrs=1"), "lr"),
    (("--config=configs/tiny.py", "--config.optim.lr=fast"), "fast"),
    (("--config=configs/tiny.py", "--confg.optim.lr=1"), "confg"),
    (("--config=configs/tiny.py", "config.optim.lr=1"), "flags start with --"),
    (("--config=configs/tiny.py", "--config.train.steps=1.5"), "1.5"),
], ids=str)
def test_a_command_line_that_is_wrong_is_a_config_error(argv, said, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match=".") as error:
        parse(*argv)
    assert said in str(error.value) and "\n  File" not in str(error.value)


def test_a_program_ends_with_code_2_and_one_message_before_any_device():
    program = """
import sys
from lm_jax import command, errors
def main(argv):
    command.parse(argv, doc="Trains.")
    return 0
try:
    errors.run(main)
finally:
    assert "jax" not in sys.modules, "a device may have been touched"
"""
    def run(*argv):
        return subprocess.run([sys.executable, "-c", program, *argv], capture_output=True, text=True, cwd=ROOT)

    bad = run("--config=configs/tiny.py", "--config.data.noise=7.0", "--config.train.batch=0")
    assert bad.returncode == 2 and bad.stdout == ""
    assert bad.stderr.startswith("error: ") and "data.noise" in bad.stderr and "train.batch" in bad.stderr
    assert "Traceback" not in bad.stderr
    printed = run("--config=configs/tiny.py", "--config.seed=5", "--print_config")
    assert printed.returncode == 0
    assert config.from_dict(json.loads(printed.stdout)).seed == 5
