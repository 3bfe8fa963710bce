"""Can a scaling law from minutes of training be trusted? It is predicted before it is measured, and held to a truth.

    python experiments/scaling_law.py                          # both sources, 7 sizes x 5 amounts
    python experiments/scaling_law.py --quick                  # 5 sizes x 4 amounts, shorter
    python experiments/scaling_law.py --source='my/*.txt'      # files of your own

Sizes x amounts of data, each amount a cool-down of the one trunk of its size. First all but the largest size and the
largest amount are trained; from them the rest is predicted, then trained too. On `text`, the interpreter's own library,
a law is what describes it. On `zipf` (lm_jax/data/synthetic.py, Facts) exponents and floor follow from the source's own
numbers, and the fit must find them. The same command goes on where it was stopped. Under --out, a folder a source:
runs.jsonl, prediction.json (made before the runs that it predicts), findings.json, law.json, report.html.

It is the sweeps' config file as well: python -m lm_jax.sweep --config=experiments/scaling_law.py:zipf-quick
"""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from lm_jax import config, disk, errors, fit
from lm_jax.data import store, synthetic
from lm_jax.errors import ConfigError
from lm_jax.scaling import fitting, grid, intervals, ladder, table
from lm_jax.scaling import sweep as sweeps
from lm_jax.scaling.ladder import STILL
from lm_jax.scaling.laws import LAWS
from lm_jax.workdir import plain

LEVEL = 0.9
TEXT = {"widths": (8, 12, 16, 24, 32, 48, 64), "steps": (512, 1024, 2048, 4096, 8192)}
ZIPF = {"widths": (6, 8, 10, 12, 16, 20, 24), "steps": (512, 862, 1448, 2436, 4096)}  # up to 23 the source is exact
QUICK = {"text": {"widths": (8, 12, 16, 24, 32), "steps": (512, 768, 1152, 1728)},
         "zipf": {"widths": (6, 8, 12, 16, 24), "steps": (512, 1024, 2048, 4096)}}
COUNT = {"text": "total", "zipf": "non_embedding"}  # of the parameters that decide the loss
BOTH = ("chinchilla", "kaplan_floor", "kaplan")  # laws of N and D


def get_config(name: str = "text"):
    """`text` or `zipf`, then -quick, then -first for the points from which the others are predicted."""
    c = config.default()
    c.name = name
    c.model.dtype = "float32"  # CPUs compute bfloat16 in slow motion
    c.model.heads = 2  # at every width: a family has one shape
    c.data.tokenizer = "byte"
    c.data.length = 64
    c.optim.schedule = "wsd"
    c.optim.floor = 0.0
    c.train.eval_every = c.train.checkpoint_every = 10**6  # at the ends only
    {"text": _text, "zipf": _zipf}[_source(name)](c)
    c.train.steps = max(_plan(name)["steps"])
    if _plan(name) is QUICK["text"]:
        c.data.validation = 0.01  # which a third of the time would go to
    return c


def get_points(c):
    source, plan = _source(c.name), _plan(c.name)
    depth = c.model.depth
    models = [{"width": width, "hidden": 3 * width, "depth": depth} for width in plan["widths"]]
    row = c.train.batch * c.data.length
    points = grid.branches(c, models, [steps * row for steps in plan["steps"]], rules=STILL)
    if "first" in c.name.split("-"):
        points = [point for point in points if point["model.width"] < models[-1]["width"]
                  and point["train.steps"] < plan["steps"][-1]]
    return [{"seed": seed} | point for point in points
            for seed in range(_seeds(source, plan["widths"].index(point["model.width"]), point["train.steps"]))]


def main(argv):
    args = _parse(argv)
    for source in ("text", "zipf") if args.source == "both" else (args.source,):
        own = source not in QUICK
        name = ("text" if own else source) + "-quick" * args.quick
        folder = name + f"-{config.digest(os.path.abspath(source))}" * own  # what was found there is of these files
        more = [f"--config.data.sources=text:{os.path.abspath(source)}"] * own
        study(name, Path(args.out) / folder, args.data, [*more, f"--jobs={args.jobs}"])
    return 0


def study(name: str, out: Path, root: str, more: list[str]):
    """Train, predict, train the rest, judge; what has been done is not done again."""
    more = [*more, f"--config.data.root={root}"]
    sweep(name + "-first", out, more)
    foreseen = disk.read_json(out / "prediction.json")
    if not foreseen:
        foreseen = predict(read(name, out), name)
        disk.replace(out / "prediction.json", [json.dumps(foreseen, indent=1), "\n"])
    print(f"\n{name}: the largest size and amount, by {foreseen['law']} of {foreseen['points']} smaller runs:")
    for one in foreseen["runs"]:
        print("  N {N:9,.0f}  D {D:9,.0f}   {loss:.4f}   90 % {low:.4f} to {high:.4f}".format(**one))
    sweep(name, out, more)
    runs = read(name, out)
    found = {"held_out": held_out(foreseen, runs), "along": along(runs)}
    law = "kaplan_floor" if _source(name) == "zipf" else foreseen["law"]
    if _source(name) == "zipf":
        found["known"] = known(synthetic.make((c := get_config(name)).data.sources), floor(c, root), runs)
    disk.replace(out / "findings.json", [json.dumps(plain(found), indent=1), "\n"])
    show(name, found)
    fit.main(["fit", str(out / "runs.jsonl"), f"--law={law}", f"--params={COUNT[_source(name)]}", f"--level={LEVEL}",
              "--draws=200", f"--out={out}"])


def sweep(name: str, out: Path, more: list[str]):
    """The points of a plan, in processes of their own; this one ends as they do, if they fail or are stopped."""
    one_thread = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false"  # a job has a core
    done = subprocess.run([sys.executable, "-m", "lm_jax.sweep", f"--config={__file__}:{name}", f"--out={out}", *more],
                          env=os.environ | {"XLA_FLAGS": one_thread})
    if done.returncode:
        sys.exit(done.returncode)


def read(name: str, out: Path) -> table.Table:
    return table.read(out / "runs.jsonl", params=COUNT[_source(name)]).finals()


def predict(runs: table.Table, name: str) -> dict:
    """The runs still to come by the law that suits these best, with an interval of the law and a run's own noise."""
    laws = BOTH if _source(name) == "text" else ("kaplan_floor",)
    best = min((fitting.fit(LAWS[law], runs.columns, runs.loss) for law in laws), key=lambda found: found.aic)
    noise = intervals.percentiles(best.residuals, level=LEVEL)
    every = {(ladder.counts(point.planned)[COUNT[_source(name)]], point.tokens)
             for point in sweeps.points(__file__, get_config(name))}
    found = []
    for N, D in sorted(every - set(zip(runs["N"], runs["D"]))):
        loss = lambda p: best.law.loss(p, {"N": N, "D": D})
        value, ends = float(loss(best.params)), intervals.profile(best, loss, level=LEVEL)  # open ones are 0 and inf
        with np.errstate(divide="ignore"):
            below, above = np.hypot(np.log(np.divide(ends, value)), noise)
        found.append({"N": N, "D": D, "loss": value, "low": float(value * np.exp(-below)),
                      "high": float(value * np.exp(above))})
    return {"law": best.law.name, "points": len(runs), "params": best.params, "runs": found}


def held_out(foreseen: dict, runs: table.Table) -> list[dict]:
    """What was predicted beside what was measured."""
    measured = dict(_means(runs))
    return [one | {"measured": measured[one["N"], one["D"]], "error": one["loss"] / measured[one["N"], one["D"]] - 1}
            for one in foreseen["runs"]]


def along(runs: table.Table) -> dict[str, list[dict]]:
    """A power law with a floor along each size, and along each amount of data: R² and exponent."""
    found = {"N": [], "D": []}
    N, D, loss = np.array([(*place, value) for place, value in _means(runs)]).T
    for letter, x, fixed in (("N", N, D), ("D", D, N)):
        for value in np.unique(fixed):
            here = fixed == value
            one = fitting.fit(LAWS[f"power_{letter}"], {letter: x[here]}, loss[here], delta=math.inf, tries=2)
            found[letter].append({"at": value, "r2": one.r2, "exponent": one.params["alpha"]})
    return found


def known(law: synthetic.Facts, floor: float, runs: table.Table) -> list[dict]:
    """The exponents and the floor that follow from the source, beside those of the fit."""
    best = fitting.fit(LAWS["kaplan_floor"], runs.columns, runs.loss)
    truth = {"alpha": law.exponent / 2, "beta": law.exponent / (1 + law.exponent), "E": floor}  # N ~ D²
    found = []
    for key, value in truth.items():
        low, high = intervals.profile(best, lambda p, key=key: p[key], level=LEVEL)
        found.append({"name": key, "truth": value, "found": best.params[key], "low": low, "high": high,
                      "inside": low <= value <= high})
    return found


def floor(c, root: str) -> float:
    """What a perfect model pays for the very documents that losses are of, in nats a token."""
    c.data.root = root
    held = next(iter(store.prepare(config.resolve(c).data).manifest["splits"]["validation"].values()))
    return held["nats"] / held["tokens"]


def show(name: str, found: dict):
    print(f"\n{name}: predicted and then measured")
    for one in found["held_out"]:
        print("  N {N:9,.0f}  D {D:9,.0f}   {loss:.4f} predicted, {measured:.4f} measured   {error:+.2%}".format(**one))
    missed = [abs(one["error"]) for one in found["held_out"]]
    print(f"  mean error {np.mean(missed):.2%}, largest {max(missed):.2%}")
    for letter, other in (("N", "D"), ("D", "N")):
        print(f"R² of a power law of {letter} at each {other}: "
              + ", ".join(f"{one['r2']:.4f}" for one in found["along"][letter]))
    for one in found.get("known", ()):
        where = "inside" if one["inside"] else "OUTSIDE"
        print("{name:6} truth {truth:.4f}   found {found:.4f}   90 % {low:.4f} to {high:.4f}   ".format(**one) + where)
    print()


def _text(c):
    c.data.sources = "stdlib"
    c.data.validation = 0.04  # half a million bytes, all of them read after each run
    c.model.width, c.model.depth = 32, 2
    c.model.qk_norm = True  # steadier at high rates (Wortsman et al. 2023)
    c.optim.lr = 8e-3  # at 32 wide, falling as 1/width; found on 0.25M bytes at 8 and 48
    c.optim.warmup = 100
    c.train.batch = 8


def _zipf(c):
    """One layer without positions: only the key before a value tells anything of it. No norm has weights, and outside
    the tables N = 13 D² exactly. Tables of their own start small, so that a fact unknown costs what it should."""
    c.data.sources = "zipf:documents=450,pairs=10000"
    c.data.validation = 0.06
    c.model.width, c.model.depth, c.model.heads = 8, 1, 1
    c.model.norm, c.model.positions, c.model.tied, c.model.init_std = "none", "none", False, 0.02
    c.optim.lr = 8.5e-3  # slow: a fact takes thousands of pairs, so that noise of the steps is no part of the loss
    c.optim.warmup = 1
    c.optim.weight_decay = c.optim.clip = 0.0
    c.train.batch = 16


def _seeds(source: str, rung: int, steps: int) -> int:
    """Runs of a point: on text two short ones differ by a percent, and cost little; two of the smallest show it."""
    if source == "zipf":
        return 1
    return 8 if steps <= 512 else 4 if steps <= 1024 else 2 if rung == 0 else 1


def _source(name: str) -> str:
    source, *words = name.split("-")
    if source not in QUICK or set(words) - {"quick", "first"}:
        raise ConfigError(f"no sweep {name!r}: text or zipf, then -quick, then -first")
    return source


def _plan(name: str) -> dict:
    source = _source(name)
    return QUICK[source] if "quick" in name.split("-") else {"text": TEXT, "zipf": ZIPF}[source]


def _means(runs: table.Table) -> list[tuple]:
    """((N, D), mean loss over seeds)."""
    places = list(zip(runs["N"], runs["D"]))
    return [(place, float(runs.loss[[other == place for other in places]].mean())) for place in sorted(set(places))]


def _parse(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="both", help="text, zipf, both, or a pattern of files: '/my/**/*.txt'")
    parser.add_argument("--quick", action="store_true", help="5 sizes x 4 amounts")
    parser.add_argument("--out", default="runs/scaling_law", help="results, a folder a source")
    parser.add_argument("--data", default="data", help="folder of the prepared data")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    return parser.parse_args(argv[1:])


if __name__ == "__main__":
    errors.run(main)
