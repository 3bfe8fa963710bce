"""Fit scaling laws to runs, say how far they can be believed, and predict a budget.

    python -m lm_jax.fit runs.jsonl --predict 1e24

The table is a runs.jsonl of a sweep or anybody's CSV with params, tokens, loss (flops, unique_tokens, epochs, seed,
run, lr, batch, tokenizer, excluded); a sweep's training curves are read from points/ beside it. In the folder --out,
law.json names every law with its parameters, intervals and warnings, and report.html shows them, with the figures that
are in figures/ too. Exit codes: 0 done, 2 the data cannot carry what was asked, 77 the table is damaged.
"""

import argparse

from lm_jax import devices, errors
from lm_jax.errors import ConfigError
from lm_jax.scaling import fitting, intervals
from lm_jax.scaling.laws import LAWS


def main(argv):
    args = parse(argv)
    settings = {args.law: {"fixed": numbers("fix", args.fix), "start": numbers("start", args.start)}}
    if missing := args.start and [name for name in LAWS[args.law].params if name not in settings[args.law]["start"]]:
        raise ConfigError(f"--start of {args.law} without {', '.join(missing)}: a start has all parameters")
    from lm_jax.scaling import study  # late, as errors.run says

    return study.run(args, delta=ESTIMATORS[args.estimator], settings=settings)


def parse(argv) -> argparse.Namespace:
    pair = lambda text: tuple(text.split("=", 1)) if "=" in text else parser.error(f"{text!r} is not NAME=VALUE")
    parser = argparse.ArgumentParser(prog="python -m lm_jax.fit", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("table", help="runs.jsonl or a CSV")
    add("--predict", type=float, action="append", default=[], metavar="FLOPS", help="a budget; may be given again")
    add("--next", metavar="FLOPS|HOURSh", help="compute to spend on runs that make the last --predict surest")
    add("--law", default="chinchilla", choices=LAWS, help="the law that predicts, and that --fix and --start mean")
    add("--out", default=".", help="folder of law.json and report.html")
    add("--level", type=float, default=intervals.LEVEL, help="of the intervals")
    add("--draws", type=int, default=intervals.DRAWS,
        help="of each resampling (other laws a tenth); 0 leaves profiles and the sandwich")
    add("--estimator", default="huber", choices=ESTIMATORS)
    add("--params", default="total", help="count of parameters to take from records that have several")
    add("--loss", default="loss", choices=("loss", "bits_per_byte"))
    add("--where", type=pair, action="append", default=[], metavar="COLUMN=VALUE", help="keep these rows")
    add("--ignore", action="append", default=[], metavar="COLUMN", help="pass over a column of a CSV")
    add("--fix", type=pair, action="append", default=[], metavar="NAME=VALUE", help="hold a parameter")
    add("--start", type=pair, action="append", default=[], metavar="NAME=VALUE", help="add a start; all parameters")
    add("--chip", default="v5p", choices=[device.name for device in devices.TABLE], help="for chip-hours")
    add("--mfu", type=float, default=0.4, help="share of the chip's peak that training reaches, for chip-hours")
    args = parser.parse_args(argv[1:])
    for flag, values, low, high in (("level", [args.level], 0.5, 0.9999), ("predict", args.predict, 1.0, 1e60),
                                    ("mfu", [args.mfu], 1e-6, 1.0)):
        for value in values:
            if not low <= value <= high:
                raise ConfigError(f"--{flag}={value:g}: a number from {low:g} to {high:g}")
    return args


def numbers(flag: str, pairs) -> dict[str, float]:
    """Parameters by name."""
    found = {}
    for name, value in pairs:
        try:
            found[name] = float(value)
        except ValueError:
            raise ConfigError(f"--{flag}={name}={value}: {value!r} is no number") from None
        if not 1e-300 < found[name] < 1e300 and not (name == "E" and found[name] == 0):
            raise ConfigError(f"--{flag}={name}={value}: parameters are positive, E may be 0")
    return found


ESTIMATORS = {"huber": fitting.HUBER, "least_squares": float("inf")}

if __name__ == "__main__":
    errors.run(main)
