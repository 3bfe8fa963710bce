"""How the figures of laws look: axes, and colours that everyone tells apart."""

import math

import matplotlib
import numpy as np
from matplotlib import colors
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from lm_jax.plots import MARKERS, SETS
from lm_jax.scaling.table import Table
from lm_jax.scaling.words import name, say

INK, FAINT = "#222222", "#999999"
LAW, OTHER = SETS[0], SETS[1]  # what was fitted; what it is held against
STYLES = tuple(zip(SETS[2:] + (FAINT,), ("--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))))
VIRIDIS = matplotlib.colormaps["viridis"](np.linspace(0, 0.88, 256))  # its end is too light on white
ORDERED = colors.LinearSegmentedColormap.from_list("ordered", VIRIDIS)
MARK = dict(marker="*", markersize=13, color=OTHER, markeredgecolor="white", markeredgewidth=0.7, linestyle="none")
FONTS = ["DejaVu Sans", "Verdana", "sans-serif"]  # Verdana, which browsers have, is as wide as what was measured


def panels(count: int, *, share: bool = False, height: float = 4.8):
    """A figure of `count` panels side by side, on one vertical axis where they share it."""
    figure = Figure(figsize=(7.6 if count == 1 else 11.0, height), layout="constrained", dpi=120)
    figure.get_layout_engine().set(wspace=0.06)
    grid = figure.subplots(1, count, squeeze=False, sharey=share)[0]
    for axes in grid:
        axes.grid(alpha=0.2, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, grid


def log_axis(axis, column: str, table: Table):
    """A logarithmic axis of a column, with numbers at decades, and between them where there are few. Called last."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    subs = (1.0,) if decades > 2.5 else (1.0, 3.0) if decades > 1.5 else (1.0, 2.0, 5.0) if decades > 0.7 else None
    if subs:
        axis.set_major_locator(LogLocator(subs=subs, numticks=9))
    else:
        axis.set_major_locator(FixedLocator(MaxNLocator(5).tick_values(low, high)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: say(column, value)))
    axis.set_label_text(name(column, table))


def loss_axis(axes, table: Table, losses):
    """A logarithmic vertical axis of losses, on which a power law is straight, with the numbers of a plain one."""
    losses = np.concatenate([np.ravel(part) for part in losses])
    low, high = np.log(losses[np.isfinite(losses) & (losses > 0)].min()), np.log(losses[np.isfinite(losses)].max())
    pad = 0.06 * (high - low) or 0.02
    low, high = math.exp(low - pad), math.exp(high + pad)
    axes.set(yscale="log", ylim=(low, high))
    axes.yaxis.set_major_locator(FixedLocator(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axes.set_ylabel(name("loss", table))


def shades(values) -> colors.LogNorm:
    """Which colour of ORDERED a positive value has."""
    low, high = np.min(values), np.max(values)
    return colors.LogNorm(low, high if high > low else 2 * low)


def colour_bar(figure, axes, norm: colors.LogNorm, column: str, table: Table):
    bar = figure.colorbar(matplotlib.cm.ScalarMappable(norm, ORDERED), ax=axes, pad=0.02, aspect=30)
    log_axis(bar.ax.yaxis, column, table)
    bar.outline.set_visible(False)


def legend(axes, **settings):
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize="small", **settings)


def marker(i: int) -> str:
    return MARKERS[i % len(MARKERS)]
