"""Do the fits find what was published? Hoffmann et al.'s points by approach 3, Muennighoff et al.'s by repeated data.

    python experiments/published_laws.py --chinchilla=chinchilla_points.csv --muennighoff=muennighoff_points.csv

The points: 245 runs of Hoffmann et al. (2022) as recovered by Besiroglu et al. (2024, arXiv:2404.10102; repository
epoch-research/analyzing-chinchilla), columns params, tokens, flops, loss, excluded; and 296 runs of Muennighoff et al.
(2023; repository huggingface/datablations, Apache-2.0), columns run, params, tokens, unique_tokens, epochs, loss,
in_182_fit. Writes law.json of both under --out.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np

from lm_jax import disk, errors
from lm_jax.scaling import checks, compare, fitting, results, table
from lm_jax.scaling.laws import LAWS
from lm_jax.workdir import plain

HOFFMANN = {"E": 1.6934, "A": 406.4, "B": 410.7, "alpha": 0.3392, "beta": 0.2849}
BESIROGLU = {"E": (1.8169, 0.0257), "A": (482.0, 124.5), "B": (2085.0, 1293.0), "alpha": (0.3478, 0.0154),
             "beta": (0.3659, 0.0206)}  # estimate, standard error
BUDGET = 5.76e23  # FLOPs of Gopher and Chinchilla
HELD = {"E": math.exp(0.6254804), "A": math.exp(6.255414), "B": math.exp(7.3049974), "alpha": 0.3526596,
        "beta": 0.3526596}
DECAYS = {"R_D": 15.387756, "R_N": 5.309743}
SOUGHT = {"R_D": (0.0, 20.0), "R_N": (0.0, 20.0)}  # the box of Muennighoff et al.'s starts


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chinchilla", help="CSV")
    parser.add_argument("--muennighoff", help="CSV")
    parser.add_argument("--draws", type=int, default=1000, help="of each resampling")
    parser.add_argument("--out", default="runs/published_laws")
    args = parser.parse_args(argv[1:])
    found = {}
    if args.chinchilla:
        found["chinchilla"] = chinchilla(table.read(args.chinchilla), args.draws)
    if args.muennighoff:
        found["data_constrained"] = muennighoff(table.read(args.muennighoff, where={"in_182_fit": "1"}), args.draws)
    if not found:
        parser.error("pass --chinchilla, --muennighoff or both")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    disk.replace(out / "law.json", [json.dumps(plain({"laws": found}), indent=2), "\n"])
    print(f"everything is in {out / 'law.json'}")
    return 0


def chinchilla(runs: table.Table, draws: int) -> dict:
    law = LAWS["chinchilla"]
    checks.comparable(runs)
    best = fitting.fit(law, runs.columns, runs.loss)
    alone = fitting.fit(law, runs.columns, runs.loss, start=HOFFMANN, grid=False)
    squares = fitting.fit(law, runs.columns, runs.loss, delta=math.inf)
    found = results.describe(best, runs, np.random.default_rng(0), level=0.95, draws=draws, settings={})
    print(f"chinchilla, {len(runs)} points ({runs.conventions}): objective {best.objective:.11f}, from "
          f"Hoffmann et al.'s values alone {alone.objective:.11f}")
    for name, (value, error) in BESIROGLU.items():
        low, high = found["interval"][name]
        print(f"  {name:6} {best.params[name]:9.4f} ± {found['stderr'][name]:8.4f}   95 % {low:.4g} to {high:.4g}   "
              f"(published {value} ± {error}; least squares {squares.params[name]:.4g})")
    for unit, ends in found["intervals"].items():
        low, high = ends["allocation_exponent"]
        print(f"  allocation exponent {found['derived']['allocation_exponent']:.4f}, 95 % by {unit}: "
              f"{low:.3f} to {high:.3f}")
    prediction = results.predict(best, runs, BUDGET, level=0.95)
    low, high = prediction["tokens_per_param"]["interval"]
    print(f"  at {BUDGET:g} FLOPs {prediction['tokens_per_param']['value']:.1f} tokens per parameter, 95 % {low:.1f} "
          f"to {high:.1f}; N {prediction['N']['value']:.3g}")
    held = compare.beyond(law, runs, 1e20)
    print(f"  fitted on the {held['fitted']} points up to 1e20 FLOPs, the {held['predicted']} above are predicted with "
          f"a mean absolute error of {held['error']:.2%}")
    return found | {"predict": prediction, "beyond_1e20": held, "from_hoffmann": alone.objective,
                    "least_squares": squares.params}


def muennighoff(runs: table.Table, draws: int) -> dict:
    law, settings = LAWS["data_constrained"], {"fixed": HELD, "within": SOUGHT}
    checks.comparable(runs)
    best = fitting.fit(law, runs.columns, runs.loss, start=HELD | DECAYS, **settings)
    found = results.describe(best, runs, np.random.default_rng(0), level=0.95, draws=draws, settings=settings)
    print(f"data-constrained, {len(runs)} points ({runs.conventions}): objective {best.objective:.9f}, R² "
          f"{best.r2:.3f}; without decay R² {without_decay(runs):.3f}")
    for name, value in DECAYS.items():
        low, high = found["interval"][name]
        print(f"  {name} {best.params[name]:.4f}   95 % {low:.3g} to {high:.3g}   (published {value})")
    for line in found["warnings"]:
        print(f"  warning: {line}")
    return found


def without_decay(runs: table.Table) -> float:
    """R² where every repeated token counts in full."""
    predicted = LAWS["chinchilla"].loss(HELD, runs.columns)
    return float(1 - np.sum((predicted - runs.loss) ** 2) / np.sum((runs.loss - runs.loss.mean()) ** 2))


if __name__ == "__main__":
    errors.run(main)
