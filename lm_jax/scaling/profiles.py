"""Figures of the runs themselves: loss against compute, training curves, valleys and what joins their minima.

Each takes a Subject and returns (Figure, caption), or raises Refused with the reason why there is nothing to draw.
"""

import numpy as np

from lm_jax.scaling import style
from lm_jax.scaling import subject as numbers
from lm_jax.scaling.checks import Refused
from lm_jax.scaling.curves import CURVE, LATE, NEAR
from lm_jax.scaling.style import INK, LAW, OTHER
from lm_jax.scaling.subject import Subject
from lm_jax.scaling.words import TOLD, between

EARLIEST = 30  # a figure of curves begins at the tokens of the shortest run, over this


def compute(s: Subject):
    """Loss against compute, the lowest reached so far, and the law's best."""
    figure, (axes,) = style.panels(1)
    shades = style.shades(s.runs["N"])
    curves = s.runs.curves
    for curve in curves:
        axes.plot(curve.C, curve.loss, color=style.ORDERED(shades(curve.N)), linewidth=0.8, alpha=0.8)
    axes.scatter(s.ends["C"], s.ends.loss, c=s.ends["N"], cmap=style.ORDERED, norm=shades, s=18, zorder=3)
    order = np.argsort(s.runs["C"])
    lowest = np.minimum.accumulate(s.runs.loss[order])
    axes.step(s.runs["C"][order], lowest, where="post", color=INK, linewidth=1.3, label="lowest loss reached so far")
    losses = [s.ends.loss]
    C = np.geomspace(s.ends["C"].min(), s.ends["C"].max(), 200)
    if numbers.reaches(s.fit):
        best = numbers.frontier(s.fit, C, s.level, numbers.per_product(s.ends))
        axes.fill_between(C, best.low, best.high, color=OTHER, alpha=0.25, linewidth=0)
        axes.plot(C, best.centre, color=OTHER, linewidth=2,
                  label=f"{s.law}{', best N and D' if numbers.allocates(s.fit) else ''}, {100 * s.level:g} % band")
        losses.append(best.centre)
    if found := s.record["approaches"].get("approach_1_parabola"):
        at, low = np.array([[valley["at"], valley["loss"]] for valley in found["valleys"]]).T
        axes.plot(at, low, **style.MARK, label="minima over N of the curves (approach 1)")
    axes.set(xscale="log", xlim=(C[0] / 2, C[-1] * 2))  # curves begin far to the left, above what is shown
    style.log_axis(axes.xaxis, "C", s.ends)
    style.loss_axis(axes, s.ends, losses)
    style.colour_bar(figure, axes, shades, "N", s.ends)
    style.legend(axes)
    axes.set_title("loss against compute")
    return figure, (f"{len(s.ends)} runs, coloured by size" + (f", {len(curves)} with their training curves"
                    if curves else "") + ". The step line is the envelope: no run does better with as little compute.")


def curves(s: Subject):
    """Training curves: loss against tokens."""
    found = s.runs.curves
    if not found:
        raise Refused(f"no run has {CURVE} rows or more in the table (a column run, a row for each evaluation), nor "
                      "points/<run>/metrics.jsonl beside it: a record says how a run ended, not how it came there")
    figure, (axes,) = style.panels(1)
    shades = style.shades([curve.N for curve in found])
    for curve in sorted(found, key=lambda curve: -curve.N):
        colour = style.ORDERED(shades(curve.N))
        axes.plot(curve.D, curve.loss, color=colour, linewidth=1.2 if len(found) < 20 else 0.8)
    axes.scatter(s.ends["D"], s.ends.loss, c=s.ends["N"], cmap=style.ORDERED, norm=shades, s=22, zorder=3,
                 edgecolors="white", linewidths=0.6, label="loss at a run's end, as the laws are fitted to")
    axes.set(xscale="log", xlim=(s.ends["D"].min() / EARLIEST, s.ends["D"].max() * 1.3))
    style.log_axis(axes.xaxis, "D", s.runs)
    late = [curve.loss[curve.D > s.ends["D"].min() / EARLIEST] for curve in found]
    style.loss_axis(axes, s.runs, [s.ends.loss, *late])
    style.colour_bar(figure, axes, shades, "N", s.runs)
    style.legend(axes)
    axes.set_title(f"training curves of {len(found)} runs")
    smoothed = (", its loss on validation data. Lines are losses on the training batches: each of their points is the "
                f"mean of the steps in {NEAR:.0%} of the tokens so far, or {LATE:.0%} of the run if that is less. "
                "Before its learning rate is down, the loss of a run is above what its tokens can reach. Runs with one "
                "trunk begin where they left it.")
    return figure, "Loss along training, coloured by size; a dot is the end of a run" + (
        smoothed if any(curve.smoothed for curve in found) else ".")


def isoflop(s: Subject):
    """Valleys of loss over N at each budget, and the law of their minima."""
    return _valleys(s, "N", {"C": "approach_2_parabola"}, "IsoFLOP valleys")


def best_lr(s: Subject):
    """Valleys of loss over the learning rate at each size."""
    return _valleys(s, "lr", {"N": "lr_along_N", "D": "lr_along_D"}, "learning rate")


def best_batch(s: Subject):
    """Valleys of loss over the batch at each number of tokens."""
    return _valleys(s, "batch", {"D": "batch_along_D", "N": "batch_along_N"}, "batch")


def _valleys(s, dial: str, records: dict, title: str):
    """The first of the records ({column along which: name of the approach}) that there is."""
    along = next((column for column, name in records.items() if name in s.record["approaches"]), None)
    if along is None:
        name = next(iter(records.values()))
        raise Refused(s.record["refused"].get(name, f"the record has no {name}"))
    found = s.record["approaches"][records[along]]
    figure, (left, right) = style.panels(2)
    shades = style.shades([valley["at"] for valley in found["valleys"]])
    ends = s.runs.finals()
    losses = []
    for valley in found["valleys"]:
        rows = np.flatnonzero(np.isin(ends.lines, valley["lines"]))
        x, colour = ends[dial][rows], style.ORDERED(shades(valley["at"]))
        fine = np.geomspace(x.min(), x.max(), 100)
        curve = np.polynomial.Polynomial.fit(np.log(x), ends.loss[rows], 2)(np.log(fine))
        left.plot(x, ends.loss[rows], "o", color=colour, markersize=4)
        left.plot(fine, curve, color=colour, linewidth=1.3)
        left.plot(valley["best"], valley["loss"], **style.MARK, zorder=4)
        losses += [ends.loss[rows], [valley["loss"]]]
    style.log_axis(left.xaxis, dial, s.ends)
    style.loss_axis(left, s.ends, losses)
    style.colour_bar(figure, left, shades, along, s.ends)
    left.set_title(f"{title}: parabolas and their minima")
    _joined(s, right, found, records[along], dial, along)
    return figure, (f"Left: loss over {TOLD[dial]}, a colour for each {'budget' if along == 'C' else along}, its "
                    f"lowest starred. Right: where the lowest is. {len(found['valleys'])} valleys are used, "
                    f"{len(found['warnings'])} refused" + (f", the first {found['warnings'][0]}."
                                                           if found["warnings"] else "."))


def _joined(s, axes, found, name, dial, along):
    """Minima and the power laws that join them, by every curve that was laid through the valleys."""
    ways = {key: other for key, other in s.record["approaches"].items()
            if key.rpartition("_")[0] == name.rpartition("_")[0] and name.startswith("approach")} or {name: found}
    looks = ((LAW, "-"), *style.STYLES)
    for (colour, dashes), (key, way) in zip(looks, ways.items()):
        at, best = np.array([[valley["at"], valley["best"]] for valley in way["valleys"]]).T
        x = np.geomspace(at.min() / 1.5, at.max() * 1.5, 2)
        axes.plot(x, way["factor"] * x ** way["exponent"], color=colour, linestyle=dashes, zorder=2,
                  label=f"{way['method']}: exponent {way['exponent']:.3f} ({between(way['interval'])})")
        axes.plot(at, best, **(style.MARK if key == name else dict(marker=".", color=colour, linestyle="none")))
    style.log_axis(axes.xaxis, along, s.ends)
    style.log_axis(axes.yaxis, dial, s.ends)
    axes.set_title(f"best {TOLD[dial]} along {TOLD[along]}")
    style.legend(axes, title=f"power laws, {100 * s.level:g} % intervals")
