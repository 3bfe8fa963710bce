"""Figures of a law: its contours, its curves along N and D, what it misses, how far it reaches.

Each takes a Subject and returns (Figure, caption), or raises Refused with the reason why there is nothing to draw.
"""

import numpy as np

from lm_jax.scaling import style
from lm_jax.scaling import subject as numbers
from lm_jax.scaling.checks import Refused
from lm_jax.scaling.style import INK, LAW, OTHER
from lm_jax.scaling.subject import Subject
from lm_jax.scaling.words import TOLD, say, scientific

FARTHER = 100.0  # times the largest budget, where no budget is asked for
FINE = 200


def contours(s: Subject):
    """Loss over N and D, with the best allocation of every budget."""
    if not numbers.allocates(s.fit):
        raise Refused(f"{s.law} is no law of N and D at once, and none such was fitted. {_why_not(s)}")
    figure, (axes,) = style.panels(1, height=5.6)
    N, D = s.ends["N"], s.ends["D"]
    k = numbers.per_product(s.ends)
    targets = [found["compute"] for found in s.budgets]
    C = np.geomspace(s.ends["C"].min(), max([s.ends["C"].max(), *targets]), FINE)
    best = numbers.best_N(s.fit, C, s.level, k)
    along = (C >= k * N.min() * D.min()) & (best.centre < 3 * N.max()) | (C > s.ends["C"].max())
    C, best = C[along], numbers.Band(best.centre[along], best.low[along], best.high[along])
    x = _span(np.append(N, best.centre), pad=0.1)
    y = _span(np.append(D, C / k / best.centre), pad=0.1)
    grid_N, grid_D = (values.ravel() for values in np.meshgrid(x, y))
    loss = s.fit.predict({"N": grid_N, "D": grid_D, "U": grid_D}).reshape(len(y), len(x))
    levels = np.geomspace(loss.min(), min(loss.max(), 1.3 * s.ends.loss.max()), 15)[1:-1]
    axes.contourf(x, y, loss, levels=[loss.min() * 0.99, *levels, loss.max() * 1.01], cmap=style.ORDERED.reversed(),
                  norm=style.shades([levels[0], levels[-1]]), alpha=0.35, extend="both")
    lines = axes.contour(x, y, loss, levels=levels, colors=INK, linewidths=0.5, alpha=0.7)
    axes.set(xlim=(x[0], x[-1]), ylim=(y[0], y[-1]))
    decades = 10.0 ** np.arange(np.floor(np.log10(k * x[0] * y[0])), np.ceil(np.log10(k * x[-1] * y[-1])) + 1)
    for i, budget in enumerate(decades):
        axes.plot(x, budget / k / x, ":", color=INK, linewidth=0.6, alpha=0.45,
                  label=None if i else "equal compute, a decade apart")
    axes.plot(N, D, "o", color="white", markeredgecolor=INK, markersize=4.5, markeredgewidth=0.8, label="runs")
    edges = np.concatenate([best.low, best.high[::-1]]), np.concatenate([C / best.low, (C / best.high)[::-1]]) / k
    axes.fill(*edges, color=OTHER, alpha=0.25, linewidth=0)
    axes.plot(best.centre, C / k / best.centre, color=OTHER, linewidth=2.2,
              label=f"lowest loss at each budget, {100 * s.level:g} % band")
    for found in s.budgets:
        place = found["N"]["value"], found["D"]["value"]
        axes.plot(*place, **style.MARK, zorder=4)
        axes.annotate(f"{scientific(found['compute'])} FLOPs", place, xytext=(-8, 6), ha="right",
                      textcoords="offset points", fontsize="small", weight="bold")
    style.log_axis(axes.xaxis, "N", s.ends)
    style.log_axis(axes.yaxis, "D", s.ends)
    axes.clabel(lines, fmt="%.3g", fontsize=8)
    axes.set_title(f"{s.law}: loss in {s.ends.unit}, over parameters and tokens")
    style.legend(axes, loc="upper left")
    return figure, (f"Lines of equal loss ({s.ends.unit}) by {s.law}, lower towards the upper right. Dotted: equal "
                    f"compute, a decade apart. A run far from the frontier was too large or too small for its compute."
                    + _fresh(s))


def slices(s: Subject):
    """Loss against N at fixed D, and against D at fixed N."""
    columns = [column for column in ("N", "D", "C") if column in s.fit.law.reads]
    figure, grid = style.panels(len(columns), share=True)
    moved, drawn = 0.0, []
    for axes, column in zip(grid, columns):
        found = numbers.slices(s.fit, s.ends, column)
        drawn += found
        axes.plot(s.ends[column], s.ends.loss, ".", color=style.FAINT, markersize=3, alpha=0.5, zorder=1)
        for i, part in enumerate(found):
            colour = style.ORDERED(i / max(len(found) - 1, 1)) if part.held else LAW
            x = np.geomspace(s.ends[column][part.rows].min() / 1.3, s.ends[column][part.rows].max() * 1.3, FINE)
            band = numbers.loss_band(s.fit, s.level, **{column: x}, **{k: v + 0 * x for k, v in part.held.items()})
            axes.fill_between(x, band.low, band.high, color=colour, alpha=0.2, linewidth=0)
            axes.plot(x, band.centre, color=colour, linewidth=1.5)
            axes.plot(s.ends[column][part.rows], part.losses, style.marker(i), color=colour, markersize=5,
                      markeredgecolor="white", markeredgewidth=0.5, zorder=3,
                      label=", ".join(f"{k} = {say(k, v)}" for k, v in part.held.items()) or "runs")
            moved = max(moved, np.abs(np.log(part.losses / s.ends.loss[part.rows])).max())
        style.log_axis(axes.xaxis, column, s.ends)
        style.legend(axes, title=f"{s.law}, at" if len(s.fit.law.reads) > 1 else s.law)
        axes.set_title(f"loss against {TOLD[column]}")
        if not found:
            axes.text(0.5, 0.95, "no three runs differ in it alone", ha="center", va="top", transform=axes.transAxes)
    if not drawn:
        raise Refused("no three runs differ in one column of the law alone: there is no slice to draw")
    style.loss_axis(grid[0], s.ends, [s.ends.loss, *(part.losses for part in drawn)])
    for axes in grid[1:]:
        axes.set_ylabel("")
    shift = f" Runs within {numbers.NEAR:.0%} of a slice are moved onto it along the law." if moved > 1e-3 else ""
    return figure, f"Lines are {s.law}, shaded its {100 * s.level:g} % band." + shift


def residuals(s: Subject):
    """What the law misses, along everything that it knows."""
    columns = list(dict.fromkeys((*s.fit.law.reads, "C")))[:3]
    figure, grid = style.panels(len(columns), share=True, height=4.0)
    percent = 100 * np.expm1(s.fit.residuals)
    for axes, column in zip(grid, columns):
        x = s.ends[column]
        axes.axhline(0, color=LAW, linewidth=1.5)
        axes.plot(x, percent, "o", color=INK, alpha=0.5, markersize=4, markeredgewidth=0)
        axes.plot(*_running(x, percent), color=OTHER, linewidth=2, label="median of neighbours")
        style.log_axis(axes.xaxis, column, s.ends)
    grid[0].set_ylabel("observed loss above the law, %")
    style.legend(grid[0])
    figure.suptitle(f"residuals of {s.law}: half of them within {np.median(np.abs(percent)):.2g} %, "
                    f"R² {s.fit.r2:.4f}")
    return figure, ("A law that suits leaves no trend: the line of medians stays near zero. A bend at one end says "
                    "that the form is wrong there.")


def extrapolation(s: Subject):
    """The best loss far beyond the runs, by every form, and how well the law foretold runs that it had not seen."""
    if not numbers.reaches(s.fit):
        raise Refused(f"{s.law} does not say what a budget can reach, and no law that does was fitted. {_why_not(s)}")
    smaller, held = numbers.hold_out(s.fit, s.ends)
    figure, (left, right) = style.panels(2)
    losses = _reach(s, left, smaller, held)
    left.set_title("the best loss of a budget" if numbers.allocates(s.fit) else "the loss of a budget")
    style.log_axis(left.xaxis, "C", s.ends)
    style.loss_axis(left, s.ends, losses)
    style.legend(left)
    columns = {name: s.ends[name] for name in smaller.law.reads}
    foretold = numbers.loss_band(smaller, s.level, **columns)
    error = 100 * (s.ends.loss / foretold.centre - 1)
    reach = 100 * (foretold.high / foretold.centre - 1)
    right.axhline(0, color=OTHER, linewidth=1.5, linestyle="--")
    right.plot(s.ends["C"][~held], error[~held], "o", color=style.FAINT, markersize=3.5, label="fitted")
    right.errorbar(s.ends["C"][held], error[held], reach[held], fmt="o", color=OTHER, markerfacecolor="white",
                   markersize=5, linewidth=0.7, label="held out, with the band of the prediction")
    low, high = np.quantile(error, (0.01, 0.99))
    right.set(ylabel="observed loss above the prediction, %", title=f"{held.sum()} runs held out: mean error "
              f"{np.abs(smaller.predict(columns)[held] / s.ends.loss[held] - 1).mean():.2%}")
    low, high = min(low, error[held].min()), max(high, error[held].max())
    room = np.clip(reach[held].max(), 0.1 * (high - low), high - low)  # of bands that tell nothing, a part
    right.set_ylim(low - room, high + 1.3 * room)
    style.log_axis(right.xaxis, "C", s.ends)
    style.legend(right, loc="upper left")
    top = s.record["laws"][s.law]["largest_budget"]
    what = ("the loss at the best N and D of each budget by all forms; runs lie on it or above. Where forms part, the "
            "data do not say which to believe" if numbers.allocates(s.fit) else "the loss along compute")
    return figure, (f"Left: {what}; shaded the {100 * s.level:g} % band of {s.law}. Right: {s.law} fitted without the "
                    f"{held.sum()} runs with the most compute, and how far these are from what it foretold."
                    + (f" The largest budget alone is foretold to {top['error']:.2%}." if top else "") + _fresh(s))


def _reach(s, axes, smaller, held) -> list:
    """Frontiers of all forms, of the law without the held-out runs, and the predictions; the losses shown."""
    k, level, ends = numbers.per_product(s.ends), s.level, s.ends
    farthest = max([found["compute"] for found in s.budgets], default=FARTHER * ends["C"].max())
    C = np.geomspace(ends["C"].min(), max(farthest * 1.5, ends["C"].max()), FINE)
    axes.plot(ends["C"][~held], ends.loss[~held], ".", color=style.FAINT, markersize=4, label="runs")
    axes.plot(ends["C"][held], ends.loss[held], "o", color=OTHER, markerfacecolor="white", markersize=4,
              label="runs held out")
    shown = numbers.frontier(s.fit, C, level, k)
    axes.fill_between(C, shown.low, shown.high, color=LAW, alpha=0.25, linewidth=0)
    axes.plot(C, shown.centre, color=LAW, linewidth=2, label=s.law)
    axes.plot(C, numbers.frontier(smaller, C, level, k).centre, "--", color=OTHER, linewidth=1.4,
              label=f"{s.law} without these")
    others = [(name, fit) for name, fit in s.fits.items() if name != s.law and fit.law.reads == ("N", "D")]
    losses = [ends.loss, shown.centre]
    for (name, fit), (colour, dashes) in zip(others, style.STYLES):
        other = numbers.frontier(fit, C, level, k).centre
        axes.plot(C, other, color=colour, linestyle=dashes, linewidth=1.2, label=name)
        losses.append(other)
    axes.axvline(ends["C"].max(), color=INK, linewidth=0.7, linestyle=":", label="largest run")
    for found in s.budgets:
        low, high = (found["loss"]["interval"][0], found["loss"]["interval"][1])
        value = found["loss"]["value"]
        axes.errorbar(found["compute"], value, [[value - low], [min(high or value, 10 * value) - value]], color=OTHER,
                      capsize=3, linewidth=1.2)
        axes.plot(found["compute"], value, **style.MARK, zorder=4)
        axes.annotate(f"{value:.4g}", (found["compute"], value), xytext=(0, 12), ha="center",
                      textcoords="offset points", fontsize="small", weight="bold")
    return losses


def _running(x, y):
    """Medians of y over neighbours in x, values of x that are alike taken together."""
    at = np.unique(np.round(np.log(x), 1))
    near = np.ptp(np.log(x)) / 8
    return np.exp(at), [np.median(y[np.abs(np.log(x) - value) <= near]) for value in at]


def _span(values, *, pad: float):
    low, high = np.log(values.min()), np.log(values.max())
    return np.exp(np.linspace(low - pad * (high - low), high + pad * (high - low), 80))


def _why_not(s: Subject) -> str:
    return s.record["refused"].get("chinchilla", "")


def _fresh(s: Subject) -> str:
    return " The law is drawn for fresh data, U = D." if "U" in s.fit.law.reads else ""
