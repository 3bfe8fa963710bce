"""What `python -m lm_jax.fit` does once its flags are right: laws of a table, told on a console and in a folder."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table as Shown

from lm_jax import devices, disk
from lm_jax.errors import ConfigError
from lm_jax.scaling import planner, report, results, table
from lm_jax.workdir import plain


def run(args, *, delta: float, settings: dict) -> int:
    """Fit, predict and recommend as the flags say; `delta` and `settings` as of `results.study`."""
    console = Console(highlight=False, soft_wrap=True)
    runs = table.read(args.table, where=dict(args.where), ignore=tuple(args.ignore), params=args.params, loss=args.loss)
    console.print(f"{runs.source}: {len(runs)} rows. {runs.conventions}")
    for note in runs.notes:
        console.print(f"  {note}")
    fits, record = results.study(runs, level=args.level, draws=args.draws, delta=delta, chosen=args.law,
                                 settings=settings)
    show(console, record, args.law)
    record["predict"] = [predictions(fits, runs.finals().tuned(), record, budget, args) for budget in args.predict]
    for prediction in record["predict"]:
        show_prediction(console, prediction)
    if args.next:
        record["next"] = dataclasses.asdict(plan := recommended(fits, runs.finals().tuned(), args))
        show_plan(console, plan)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    disk.replace(out / "law.json", [json.dumps(plain(record), indent=2), "\n"])
    page = report.write(out, runs, fits, record, law=args.law)
    console.print(f"\neverything is in {out / 'law.json'} and {page}")
    return 0


def predictions(fits, runs, record: dict, budget: float, args) -> dict:
    """A budget under the law asked for, the losses that the other forms give it, and what a run of it would take."""
    able = {name: fit for name, fit in fits.items() if results.carries_allocation(fit.law)}
    if args.law not in able:
        raise ConfigError(f"--law={args.law} predicts no allocation: " + record["refused"].get(
            args.law, f"it is not a law of N and D at once; take one of {', '.join(able) or 'none: see the refusals'}"))
    found = results.predict(able[args.law], runs, budget, level=args.level)
    found["loss_by_form"] = {name: results.best_loss(fit, runs, budget) for name, fit in able.items()}
    found["chip_hours"] = {"value": budget / per_hour(args), "chip": args.chip, "mfu": args.mfu}
    for dial, along in (("lr", "N"), ("batch", "D")):
        if law := record["approaches"].get(f"{dial}_along_{along}"):
            found[dial] = law["factor"] * found[along]["value"] ** law["exponent"]
    if "batch" in found:
        found["steps"] = found["D"]["value"] / found["batch"]
    return found


def recommended(fits, runs, args) -> planner.Plan:
    """Runs for the budget of --next, in FLOPs or chip-hours (100h), that leave the last --predict least in doubt."""
    if not args.predict or args.law not in fits or not results.carries_allocation(fits[args.law].law):
        raise ConfigError(f"--next={args.next} plans runs for a prediction: pass --predict, and a --law of N and D "
                          "that the table carries")
    try:
        budget = float(args.next[:-1]) * per_hour(args) if args.next.endswith("h") else float(args.next)
    except ValueError:
        raise ConfigError(f"--next={args.next}: FLOPs as in 1e20, or chip-hours as in 100h") from None
    return planner.plan(fits[args.law], runs, target=args.predict[-1], budget=budget)


def per_hour(args) -> float:
    """FLOPs of a chip-hour."""
    return devices.DEVICES[args.chip].flops * args.mfu * 3600


def show(console: Console, record: dict, law: str):
    """Forms beside each other, the one asked for in full, what valleys say, what was refused."""
    forms = _shown(f"forms, by {record['estimator']}", "form", "params", "objective", "AIC", "R²", "hold-out",
                   "largest budget")
    for name, found in sorted(record["laws"].items(), key=lambda pair: pair[1]["aic"]):
        top = found["largest_budget"]
        forms.add_row(name, str(len(found["coordinates"])), f"{found['objective']:.8g}", f"{found['aic']:.1f}",
                      f"{found['r2']:.4f}", _percent(found["holdout_error"]), _percent(top and top["error"]))
    console.print(forms)
    if found := record["laws"].get(law):
        console.print(f"{law}: {found['formula']}   ({found['conventions']})")
        for name, value in (found["params"] | found["derived"]).items():
            if name in found["fixed"]:
                console.print(f"  {name:20} {value:<12.6g} held")
            else:
                low, high = found["interval"][name]
                console.print(f"  {name:20} {value:<12.6g} ± {_error(found['stderr'][name]):10} "
                              f"{100 * record['level']:g} % {_end(low)} to {_end(high)}")
        for line in found["warnings"]:
            console.print(f"  warning: {line}")
    for name, found in record["approaches"].items():
        low, high = found["interval"]
        console.print(f"{name}: exponent {found['exponent']:.4f}, {_end(low)} to {_end(high)}, "
                      f"of {len(found['valleys'])} valleys, {len(found['warnings'])} refused")
    for reason in dict.fromkeys(record["refused"].values()):
        names = ", ".join(name for name, said in record["refused"].items() if said == reason)
        console.print(f"refused: {names}: {reason}")


def show_prediction(console: Console, found: dict):
    between = lambda key: f"{_end(found[key]['interval'][0])} to {_end(found[key]['interval'][1])}"
    console.print(f"\n{found['compute']:.3g} FLOPs, {found['times_largest_run']:.3g} times the largest run, by "
                  f"{found['law']} ({found['conventions']}), {100 * found['level']:g} % intervals:")
    for key, text in PREDICTED.items():
        console.print(f"  {text:20} {found[key]['value']:<12.5g} {between(key)}")
    for key, text in (("batch", "batch"), ("steps", "steps"), ("lr", "learning rate")):
        console.print(f"  {text:20} {found[key]:<12.4g}" if key in found else
                      f"  {text:20} unknown: the table has no law of it (columns lr and batch that vary)")
    hours = found["chip_hours"]
    console.print(f"  {'chip-hours':20} {hours['value']:<12.4g} of {hours['chip']} at {hours['mfu']:.0%} of its peak")
    others = ", ".join(f"{name} {loss:.4f}" for name, loss in found["loss_by_form"].items())
    console.print(f"  {'loss by other forms':20} {others}")


def show_plan(console: Console, plan: planner.Plan):
    title = (f"runs to make next: {plan.flops:.3g} FLOPs, after which the loss at {plan.target:.3g} is known to "
             f"±{_percent(plan.after)} (now ±{_percent(plan.before)}; the noise of a run is {_percent(plan.noise)})")
    shown = _shown(title, "N", "D", "FLOPs each", "seeds")
    for run, seeds in Counter((run.N, run.D, run.flops) for run in plan.runs).items():
        shown.add_row(*(f"{value:.3g}" for value in run), f"{seeds}")
    console.print(shown)
    more = plan.next
    console.print(f"one more, N {more.N:.3g} and D {more.D:.3g} for {more.flops:.3g} FLOPs, is worth "
                  f"{100 * (plan.after - more.stderr):.3f} of a percent: ±{_percent(more.stderr)}")


def _shown(title, first, *numbers) -> Shown:
    shown = Shown(title=title, box=SIMPLE, padding=(0, 1, 0, 0), title_justify="left")
    shown.add_column(first)
    for name in numbers:
        shown.add_column(name, justify="right")
    return shown


def _percent(value) -> str:
    return "" if value is None else f"{100 * value:.2f} %"


def _error(value: float) -> str:
    return "anything" if value == float("inf") else f"{value:.3g}"


def _end(value: float) -> str:
    return "nothing" if value == 0 else "anything" if value == float("inf") else f"{value:.4g}"


PREDICTED = {"N": "parameters", "D": "tokens", "tokens_per_param": "tokens a parameter", "loss": "loss"}
