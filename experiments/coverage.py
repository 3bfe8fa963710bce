"""Do intervals hold the truth as often as they say? For every law and approach, on tables whose truth is known.

    python experiments/coverage.py --draws=200

Each draw makes a table from a law's own parameters and log-normal noise, fits it as `python -m lm_jax.fit` does, and
asks of each parameter, of the allocation and of the best loss of a budget that is a hundred times the largest run,
whether its nominal 90 % interval (profile likelihood; approaches 1 and 2 and the dials: wild bootstrap) holds what the
table was made from. Draws are kept in <out>/draws.jsonl, so that the same command goes on where it was stopped.
"""

import argparse
import json
import math
import zlib
from pathlib import Path

import numpy as np

from lm_jax import disk, errors
from lm_jax.errors import ConfigError
from lm_jax.scaling import compare, envelope, fitting, intervals, results, table, valleys
from lm_jax.scaling.laws import LAWS, additive

LEVEL = 0.9
BOUNDS = (0.85, 0.95)
NOISE = 0.003  # of log loss: of one run to the next
FIVE = {"E": 1.8, "A": 480.0, "B": 2100.0, "alpha": 0.35, "beta": 0.37}
TRUE = {
    "chinchilla": FIVE,
    "overtrained": {"E": 1.8, "A": 480.0, "B": 2100.0, "alpha": 0.36},
    "kaplan": {"A": (8.8e13) ** 0.076, "B": (5.4e13) ** 0.095, "alpha": 0.076, "beta": 0.095},  # Kaplan et al. 2020
    "kaplan_floor": FIVE,
    "data_constrained": FIVE | {"R_D": 10.0, "R_N": 5.0},
    "power_N": {"E": 1.8, "A": 20.0, "alpha": 0.15}, "power_D": {"E": 1.8, "A": 20.0, "alpha": 0.15},
    "power_C": {"E": 1.8, "A": 1100.0, "alpha": 0.16},
}
SLOPES = {"lr_along_N": -0.4, "batch_along_D": 0.47}


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--only", default="", help="a few of the cases, by commas")
    parser.add_argument("--estimator", default="huber", choices=ESTIMATORS)
    parser.add_argument("--out", default="runs/coverage")
    args = parser.parse_args(argv[1:])
    only = args.only.split(",") if args.only else list(CASES)
    if unknown := set(only) - CASES.keys():
        raise ConfigError(f"--only={args.only}: no case {unknown.pop()!r}; there are {', '.join(CASES)}")
    Path(args.out).mkdir(parents=True, exist_ok=True)
    kept = Path(args.out) / f"{args.estimator}.jsonl"
    done = {(row["case"], row["draw"]): row["held"] for row in map(json.loads, whole(kept))}
    with open(kept, "a") as file:
        for name in only:
            for draw in range(args.draws):
                if (name, draw) not in done:
                    rng = np.random.default_rng([zlib.crc32(name.encode()), draw])
                    done[name, draw] = CASES[name](name, rng, ESTIMATORS[args.estimator])
                    file.write(json.dumps({"case": name, "draw": draw, "held": done[name, draw]}) + "\n")
                    file.flush()
            show(name, [done[name, draw] for draw in range(args.draws)])
    return 0


def whole(path: Path) -> list[str]:
    """The file's whole lines; a half-written last one is cut off."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    if lines and not lines[-1].endswith("\n"):
        disk.replace(path, lines := lines[:-1])
    return lines


def show(name: str, rows: list[dict]):
    """Share of the draws whose interval held the truth, by quantity; those out of bounds are marked."""
    told = {key: np.mean([row[key] for row in rows if key in row]) for key in dict.fromkeys(k for r in rows for k in r)}
    cells = (f"{key} {share:.3f}{'' if BOUNDS[0] <= share <= BOUNDS[1] else ' !'}" for key, share in told.items())
    print(f"{name:18} {len(rows)} draws: {', '.join(cells)}", flush=True)


def of_law(name: str, rng, delta: float) -> dict[str, bool]:
    """One table of a law's own making."""
    law, true = LAWS[name], TRUE[name]
    x = TABLES.get(name, sizes_by_tokens)()
    loss = law.loss(true, x) * np.exp(NOISE * rng.standard_normal(len(x["N"])))
    found = fitting.fit(law, x, loss, delta=delta)
    asked = {key: (lambda p, key=key: p[key]) for key in law.params}
    if results.carries_allocation(law):
        far = 100 * x["C"].max()
        asked["allocation at 100 C"] = lambda p: compare.allocation(law, p, far)[0]
        asked["loss at 100 C"] = lambda p: law.loss(p, dict(zip("ND", compare.allocation(law, p, far))))
    return {key: inside(q(true), intervals.profile(found, q, level=LEVEL)) for key, q in asked.items()}


def approach_1(name: str, rng, _) -> dict[str, bool]:
    """Training curves of 11 sizes, each with one error from its first point to its last."""
    N, points = np.geomspace(3e7, 3e10, 11), 25
    run = np.repeat(np.arange(11), points)
    x = {"N": N[run], "D": np.tile(np.geomspace(1, 300, points), 11) * N[run]}
    loss = additive(FIVE, x) * np.exp(NOISE * rng.standard_normal(11))[run]
    runs = table.from_rows(list(enumerate({"N": n, "D": d, "loss": l, "run": r}
                                          for n, d, l, r in zip(x["N"], x["D"], loss, run))))
    return by_curve(lambda method: envelope.envelope(runs, rng, method=method), 0.37 / 0.72)


def approach_2(name: str, rng, _) -> dict[str, bool]:
    """Seven sizes around the best of each of five budgets."""
    C = np.repeat(np.geomspace(1e18, 1e21, 5), 7)
    N = compare.allocation(LAWS["chinchilla"], FIVE, C)[0] * np.tile(np.geomspace(0.25, 4, 7), 5)
    loss = additive(FIVE, {"N": N, "D": C / 6 / N}) * np.exp(NOISE * rng.standard_normal(len(N)))
    return by_curve(lambda method: valleys.trace(C, N, loss, rng, method=method), 0.37 / 0.72)


def of_dial(name: str, rng, _) -> dict[str, bool]:
    """Seven values of a dial around its best, at each of four sizes or lengths of run."""
    along = np.repeat(np.geomspace(1e7, 1e9, 4), 7)
    best = along ** SLOPES[name]
    values = best * np.tile(np.geomspace(0.2, 5, 7), 4)
    loss = 20 * along**-0.1 + 0.03 * np.log(values / best) ** 2
    loss *= np.exp(NOISE * rng.standard_normal(len(loss)))
    return by_curve(lambda method: valleys.trace(along, values, loss, rng, method=method), SLOPES[name])


def by_curve(trace, true: float) -> dict[str, bool]:
    """The exponent by every curve; one that is refused holds nothing and claims nothing, and is not counted."""
    held = {}
    for method in valleys.METHODS:
        try:
            held[f"exponent, {method}"] = inside(true, trace(method).interval(level=LEVEL))
        except ConfigError:
            continue
    return held


def inside(value: float, ends) -> bool:
    return bool(ends[0] <= value <= ends[1])


def sizes_by_tokens() -> dict:
    N, D = (column.ravel() for column in np.meshgrid(np.geomspace(2e7, 2e9, 6), np.geomspace(4e8, 4e10, 5)))
    return {"N": N, "D": D, "C": 6 * N * D}


def fixed_ratios() -> dict:
    """Six sizes at 20, 80, 320 and 640 tokens a parameter (Gadre et al. 2024)."""
    N, ratio = (column.ravel() for column in np.meshgrid(np.geomspace(1e7, 1e9, 6), (20.0, 80.0, 320.0, 640.0)))
    return {"N": N, "D": ratio * N, "C": 6 * ratio * N**2}


def one_ratio() -> dict:
    N = np.geomspace(1e7, 3e9, 9)
    return {"N": N, "D": 20 * N, "C": 120 * N**2}


def epochs() -> dict:
    """Six sizes by three corpora, each once, eight and sixty times."""
    x = {name: np.tile(column, 3) for name, column in sizes_by_tokens().items()}
    return x | {"U": x["D"] / np.repeat([1.0, 8.0, 60.0], len(x["D"]) // 3)}


TABLES = {"overtrained": fixed_ratios, "data_constrained": epochs, "power_C": one_ratio}
ESTIMATORS = {"huber": fitting.HUBER, "least_squares": math.inf}
CASES = dict.fromkeys(LAWS, of_law) | {"approach_1": approach_1, "approach_2": approach_2} | dict.fromkeys(
    SLOPES, of_dial)

if __name__ == "__main__":
    errors.run(main)
