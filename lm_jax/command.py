"""The command line of a main: `--config`, overrides of single keys, and its own flags; all that is wrong at once."""

import ast
import contextlib
import dataclasses
import difflib
import glob
import json
import os
import sys
from functools import partial

import ml_collections
from absl import flags
from ml_collections import config_flags

from lm_jax import checks, config, credentials
from lm_jax.errors import ConfigError

UNREAD = (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, SyntaxError, ImportError)  # of _read


def parse(argv: list[str], *, doc: str, switches: dict[str, str] | None = None, **more
          ) -> tuple[config.Config, flags.FlagValues]:
    """Flags of a main: `--config`, overrides of its keys, `--workdir`, `--print_config`, and those of this main.

    `more` maps the name of a flag that takes a string to its help, `switches` that of one which is on or off. Returns
    the checked config and the flag values; `--help` and `--print_config` print and exit 0.
    """
    read = partial(_read, more=more, switches=switches or {})
    try:
        values, rest = read(argv)
    except UNREAD as e:
        raise ConfigError(_everything(e, argv, read)) from e
    chosen = values["config"].value
    if values.help:
        print(f"{doc}\n\n{values.get_help()}\nEvery key of the config is a flag too: --config.optim.lr=3e-4")
        sys.exit(0)
    if rest:
        raise ConfigError(f"unexpected argument {rest[0]!r}: flags start with --, as in --config.train.steps=100")
    if chosen is None:
        raise ConfigError("which config? Pass --config=configs/tiny.py")
    if not isinstance(chosen, ml_collections.ConfigDict):
        raise ConfigError(f"get_config() returned {type(chosen).__name__}: let it start from lm_jax.config.default()")
    c = config.resolve(chosen)
    if unfit := [*checks.packages(c.train.loggers), *_credentials(config.to_dict(c)), *_credentials({"argv": argv})]:
        raise ConfigError("\n  ".join(unfit))
    if values.print_config:
        print(json.dumps(config.to_dict(c), indent=2))
        sys.exit(0)
    values.workdir = values.workdir or f"runs/{c.name}"
    return c, values


def _read(argv: list[str], *, more: dict[str, str], switches: dict[str, str]) -> tuple[flags.FlagValues, list[str]]:
    """The values of flags, and the arguments that are none; raises one of `UNREAD`."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "file with a get_config()", flag_values=values, sys_argv=argv)
    flags.DEFINE_string("workdir", None, "the run's folder; default runs/<config name>", flag_values=values)
    flags.DEFINE_boolean("print_config", False, "print the resolved config and exit", flag_values=values)
    flags.DEFINE_boolean("help", False, "show this and exit", short_name="h", flag_values=values)
    for name, text in more.items():
        flags.DEFINE_string(name, None, text, flag_values=values)
    for name, text in switches.items():
        flags.DEFINE_boolean(name, False, text, flag_values=values)
    rest = values(argv)[1:]
    if values["config"].value is not None:
        values["config"].value.keys()  # where the file could not be loaded, this is what raises
    return values, rest


def _everything(first: Exception, argv: list[str], read) -> str:
    """What each argument is wrong by itself, and what is wrong with the config that the others make."""
    alone = [argument for argument in argv[1:] if argument.startswith("--") and not argument.startswith("--config=")]
    base, wrong = [argument for argument in argv if argument not in alone], {}
    for argument in alone:
        try:
            read([*base, argument])
        except UNREAD as error:
            wrong[argument] = _unknown(argument) or _explain(error, [*base, argument])
    if not wrong:
        return _explain(first, argv)
    lines = list(wrong.values())
    with contextlib.suppress(*UNREAD):
        try:
            values, _ = read([argument for argument in argv if argument not in wrong])
            config.resolve(values["config"].value)
        except ConfigError as error:
            lines += str(error).splitlines()[1:]
    return "\n  ".join(line.strip() for line in lines)


def _credentials(values: dict):
    """What of a config, or of a command, would be written down and must not be."""
    for key, value in values.items():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, dict):
                yield from _credentials(one)
            elif found := credentials.shown(str(one)):
                yield (f"{key} holds {found[:3]}..., which looks like a credential, and a run's folder is no place for "
                       "one: keep it in the environment")


def _unknown(argument: str) -> str:
    """That there is no such key of the config, and the nearest that there is; nothing of another argument."""
    key, keys = argument.split("=")[0].removeprefix("--config."), _keys(dataclasses.asdict(config.Config()))
    if not argument.startswith("--config.") or key in keys:
        return ""
    near = difflib.get_close_matches(key, keys, n=1)
    return f"unknown key {key}" + (f": did you mean {near[0]}?" if near else "")


def _keys(values: dict, prefix: str = "") -> list[str]:
    """Dotted names of all that a nested dict holds, sections too."""
    return [name for key, value in values.items() for name in (
        f"{prefix}{key}", *(_keys(value, f"{prefix}{key}.") if isinstance(value, dict) else ()))]


def _explain(error: Exception, argv: list[str]) -> str:
    """One line for what a flag parser or a config file raised."""
    for path in (a.split("=", 1)[1].split(":")[0] for a in argv if a.startswith("--config=")):
        if not os.path.exists(path):
            there = ", ".join(sorted(glob.glob("configs/*.py"))) or "none in configs/"
            return f"no config file {path!r}: there are {there}"
    message = str(error.args[0] if error.args and not isinstance(error, SyntaxError) else error)
    with contextlib.suppress(ValueError, SyntaxError):
        message = str(ast.literal_eval(message))  # ml_collections quotes what a KeyError has quoted
    if "Traceback" in message:  # of the config file, whose last line says it all
        message = message.strip().splitlines()[-1]
    message = " ".join(message.split())
    return f"{message} (in {' '.join(argv[1:])})"
