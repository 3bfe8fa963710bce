"""report.html: one page, whole in itself, of what a study of runs found, how far it can be believed, and what not."""

import re
from html import escape
from pathlib import Path

from lm_jax import disk
from lm_jax.scaling import subject as subjects
from lm_jax.scaling.subject import Subject
from lm_jax.scaling.words import between, number, say, scientific

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>{style}</style></head><body><main>
<h1>{title}</h1>
{body}
</main></body></html>
"""
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 0; }
main { max-width: 68rem; margin: 0 auto; padding: 1rem 1.5rem 4rem; }
h1 { font-size: 1.7rem; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; } h3 { margin-bottom: .3rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .88rem; }
th, td { padding: .25rem .7rem; text-align: left; vertical-align: top; border-bottom: 1px solid #e4e4e4; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.drawn { background: #eef5fb; } small, .dim { color: #666; }
figure { margin: 1.5rem 0; } figure svg { max-width: 100%; height: auto; } figcaption { font-size: .92rem; }
.warning { border-left: 4px solid #d55e00; padding: .1rem 0 .1rem .8rem; margin: .4rem 0; }
.missing { border-left: 4px solid #bbb; padding: .1rem 0 .1rem .8rem; margin: .4rem 0; color: #555; }
code { font-size: .9em; overflow-wrap: anywhere; }
@media print { figure, table { break-inside: avoid; } }
"""
BUDGET = {"N": "N, parameters", "D": "D, tokens", "tokens_per_param": "tokens a parameter", "loss": "loss"}
BREAK = "\n("
NUMERIC = re.compile(r"[+-]?\d|unknown|nothing|anything|$")
DIALS = {"batch": "batch, tokens", "steps": "steps", "lr": "learning rate"}


def write(folder, runs, fits, record: dict, *, law: str = "chinchilla") -> Path:
    """Write report.html, and figures/*.svg and *.png that it is made of, into a folder; the page's path.

    `runs`, `fits` and `record` are the Table and what `results.study` made of it; `record["predict"]`, if there is
    one, lists predictions. Drawn is `law`, or where it was refused the best of the others, which the page says.
    """
    from lm_jax.scaling import plot  # matplotlib takes a second to load, which only those who draw need wait for

    folder = Path(folder)
    subject = subjects.subject(runs, fits, record, law=law)
    drawn = plot.write(folder / "figures", subject)
    parts = {"In short": _short(subject, law), "Predictions": _predictions(subject), "Figures": _figures(drawn),
             "Laws side by side": _laws(subject), "Valleys": _valleys(subject), "Refused": _refused(record),
             "Conventions and data": _origin(subject)}
    body = "\n".join(f"<section><h2>{name}</h2>\n{part}\n</section>" for name, part in parts.items())
    title = f"Scaling laws of {escape(Path(record['source']).name)}"
    disk.replace(folder / "report.html", [PAGE.format(title=title, style=STYLE, body=body)])
    return folder / "report.html"


def _short(s: Subject, asked: str) -> str:
    laws, found = s.record["laws"], s.record["laws"][s.law]
    by_aic, by_holdout = _order(laws, "aic"), _order(laws, "holdout_error")
    near = [name for name in by_aic[1:] if laws[name]["aic"] - laws[by_aic[0]]["aic"] < 2]
    lines = [f"{len(s.ends)} runs: {', '.join(f'{name} {_range(name, s.ends[name])}' for name in 'NDC')} "
             f"FLOPs. {s.ends.conventions}.",
             f"The form that suits them best by AIC is {by_aic[0]}"
             + (f"; {', '.join(near)} within 2 of it: the data do not tell them apart." if near else ".")
             + (f" The best at runs larger than those it was fitted on is {by_holdout[0]}, "
                f"{_percent(laws[by_holdout[0]]['holdout_error'])} off." if by_holdout else "")]
    if asked != s.law:
        lines.append(f"{asked} was refused: {s.record['refused'].get(asked, '')}. Shown instead is {s.law}.")
    if "E" in found["interval"]:
        lines.append(f"Irreducible loss by {s.law}: {_value(found, 'E')}.")
    if "allocation_exponent" in found["derived"]:
        lines.append(f"The best N grows as C to the power {_value(found, 'allocation_exponent')} by {s.law}.")
    return _list(lines) + (f"<h3>Read with {s.law}</h3>" + _warnings(found["warnings"]) if found["warnings"] else "")


def _predictions(s: Subject) -> str:
    """A budget in each column."""
    if not s.budgets:
        return "<p>No budget was asked for (<code>--predict=1e24</code>).</p>"
    told = s.budgets[0]
    said = lambda found, key: say(key, found[key]) if key in found else "unknown"
    rows = [[text, *(_measured(found[key], key) for found in s.budgets)] for key, text in BUDGET.items()]
    rows += [[text, *(said(found, key) for found in s.budgets)] for key, text in DIALS.items()]
    rows += [["chip-hours", *(_hours(found.get("chip_hours")) for found in s.budgets)],
             ["times the largest run", *(f"{found['times_largest_run']:.3g}" for found in s.budgets)]]
    rows += [[f"loss by {name}", *(f"{found['loss_by_form'][name]:.4g}" for found in s.budgets)]
             for name in told.get("loss_by_form", ())]
    note = (f"By {told['law']}, with {100 * told['level']:g} % intervals; {told['conventions']}. Batch, steps and "
            "learning rate are known where the table has columns of them and their best follows a law.")
    return (_table(["budget, FLOPs", *(scientific(found["compute"]) for found in s.budgets)], rows)
            + f"<p>{escape(note)}</p>")


def _figures(drawn) -> str:
    """Those that there are, then why there are no others."""
    shown = [f"<figure>{d.svg}<figcaption><b>{escape(d.about)}</b> {escape(d.caption)} "
             f"<small>figures/{d.name}.svg</small></figcaption></figure>" for d in drawn if d.svg]
    missing = [f'<p class="missing"><b>{escape(d.about)}</b> Not drawn: {escape(d.missing)}.</p>'
               for d in drawn if not d.svg]
    return "\n".join(shown + missing)


def _laws(s: Subject) -> str:
    laws = s.record["laws"]
    order = _order(laws, "aic")
    rows = [[name, f"{found['formula']} ({found['source']})", len(found["coordinates"]),
             _number(found["objective"], ".6g"), _number(found["aic"], ".1f"),
             _number(found["aic"] - laws[order[0]]["aic"], ".1f"), _number(found["r2"], ".4f"),
             _percent(found["holdout_error"]), _percent(found["largest_budget"] and found["largest_budget"]["error"])]
            for name, found in ((name, laws[name]) for name in order)]
    head = ["law", "formula", "free", "objective", "AIC", "above the best", "R²", "hold-out", "largest budget"]
    names = list(dict.fromkeys(key for name in order for key in (*laws[name]["params"], *laws[name]["derived"])))
    values = [[key, *(_value(laws[name], key) for name in order)] for key in names]
    told = {}
    for name in order:
        for line in laws[name]["warnings"]:
            told.setdefault(line, []).append(name)
    notes = [f"{'all' if len(names) == len(laws) else ', '.join(names)}: {line}" for line, names in told.items()]
    return (f"<p>Estimator: {escape(s.record['estimator'])}. Hold-out: mean error on the runs just above a cut in "
            "compute by the fit of those below, over several cuts; largest budget: the same, of the largest alone.</p>"
            + _table(head, rows, drawn=s.law)
            + f"<h3>Parameters ± standard error ({100 * s.record['level']:g} % interval by profile likelihood)</h3>"
            + _table(["", *order], values) + _resampled(s)
            + ("<h3>Warnings</h3>" + _warnings(notes) if notes else ""))


def _resampled(s: Subject) -> str:
    """The drawn law's intervals by every way that they were made."""
    ways = s.record["laws"][s.law]["intervals"]
    if len(ways) < 2:
        return ""
    told = {"profile": "profile likelihood", "rows": "rows drawn anew", "sizes": "model sizes drawn anew",
            "seeds": "seeds drawn anew"}
    rows = [[key, *(between(way[key]) for way in ways.values())] for key in ways["profile"]]
    return f"<h3>Intervals of {s.law}</h3>" + _table(["", *(told.get(way, way) for way in ways)], rows)


def _valleys(s: Subject) -> str:
    found = s.record["approaches"]
    if not found:
        return "<p>None was found; the reasons are below.</p>"
    left_out = lambda said: "; ".join(said[:3]) + (f"; and {len(said) - 3} more" if len(said) > 3 else "")
    rows = [[name, way["method"], _number(way["exponent"], ".4f"), between(way["interval"]), len(way["valleys"]),
             left_out(way["warnings"])] for name, way in found.items()]
    cut = sorted({way["curves"] for way in found.values() if "curves" in way})
    return "".join(f"<p>Approach 1 is of {escape(said)}.</p>" for said in cut) + _table(
        ["", "curve", "exponent", f"{100 * s.record['level']:g} % interval", "valleys", "left out"], rows)


def _refused(record: dict) -> str:
    if not record["refused"]:
        return "<p>Nothing.</p>"
    reasons = {}
    for name, reason in record["refused"].items():
        reasons.setdefault(reason, []).append(name)
    return _table(["what", "why"], [[", ".join(names), reason] for reason, names in reasons.items()])


def _origin(s: Subject) -> str:
    record = s.record
    facts = [["table", record["source"]], ["its SHA-256", record["digest"] or "none: it was not read from a file"],
             ["rows", record["rows"]], *(["", note] for note in record["notes"]),
             *([name, value] for name, value in record["conventions"].items()), ["estimator", record["estimator"]],
             ["intervals", f"{100 * record['level']:g} %; bands in figures by the delta method, all others as said"]]
    facts += [[name, ", ".join(sorted(set(s.ends[name])))] for name in ("tokenizer", "code_revision", "data_digest")
              if name in s.ends]
    columns = [name for name in ("run", "seed", "N", "D", "U", "C", "lr", "batch", "loss") if name in s.ends]
    text = lambda value: f"{value:.6g}" if isinstance(value, float) else value
    rows = [[s.ends.lines[i], *(text(s.ends[name][i]) for name in columns), f"{100 * s.fit.residuals[i]:+.2f}"]
            for i in range(len(s.ends))]
    return _table(["", ""], facts) + (f"<details><summary>{len(rows)} runs</summary>" + _table(
        ["line", *columns, f"% above {s.law}"], rows) + "</details>")


def _table(head, rows, *, drawn: str | None = None) -> str:
    """Columns of numbers stand to the right; an interval has a line of its own."""
    sides = [' class="n"' if all(NUMERIC.match(str(row[i])) for row in rows) else "" for i in range(len(head))]
    cell = lambda value, side: f'<td{side}>{escape(str(value)).replace(BREAK, "<br>(")}</td>'
    lines = [f'<tr{" class=drawn" if row[0] == drawn else ""}>{"".join(map(cell, row, sides))}</tr>' for row in rows]
    top = "".join(f"<th{side}>{escape(str(name))}</th>" for name, side in zip(head, sides))
    head = f"<thead><tr>{top}</tr></thead>" if any(head) else ""
    return f'<div class="wide"><table>{head}<tbody>{"".join(lines)}</tbody></table></div>'


def _warnings(lines) -> str:
    return "".join(f'<p class="warning">{escape(line)}</p>' for line in lines)


def _measured(found: dict, key: str) -> str:
    form = (lambda value: say(key, value)) if key in ("N", "D") else number
    return f"{form(found['value'])} ({between(found['interval'], form)})"


def _list(lines) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _order(laws: dict, key: str) -> list[str]:
    """Names of laws, best first, without those that have no such number."""
    return sorted((name for name in laws if laws[name][key] is not None), key=lambda name: laws[name][key])


def _value(found: dict, key: str) -> str:
    value = (found["params"] | found["derived"]).get(key)
    if value is None:
        return ""
    if key in found["fixed"]:
        return f"{number(value)} held"
    error = found["stderr"][key]
    error = " ± anything" if error in (None, float("inf")) else f" ± {float(f'{error:.2g}'):g}"
    return f"{number(value)}{error}{BREAK}{between(found['interval'][key])})"


def _hours(found) -> str:
    if not found:
        return "unknown"
    return f"{say('hours', found['value'])} of {found['chip']} at {found['mfu']:.0%} of its peak"


def _range(name: str, column) -> str:
    return f"{say(name, column.min())} to {say(name, column.max())}"


def _number(value, form: str) -> str:
    return "" if value is None else format(value, form)


def _percent(value) -> str:
    return "" if value is None else f"{100 * value:.2f} %"
