"""The picture of a run: its losses over tokens, drawn from metrics.jsonl alone, so that it can be drawn again."""

import json
import math

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from lm_jax.workdir import Workdir

TRAIN = "#999999"
SETS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe & Ito 2008: told apart by everyone
MARKERS = "osD^vP"


def loss_curve(workdir: Workdir):
    """Draw plots/loss.png: training steps, their moving mean, and every validation set with its standard error."""
    train, sets = _rows(workdir)
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    if train:
        tokens, loss = np.array(train, float).T
        reach = len(loss) // 100
        axes.plot(tokens, loss, "-" if reach else ".-", color=TRAIN, linewidth=0.8, label="training")
        if reach:
            label = f"training, mean over {2 * reach + 1} rows"
            axes.plot(tokens, _smooth(loss, reach), color="black", linewidth=1.4, label=label)
    for i, (tag, points) in enumerate(sorted(sets.items())):
        tokens, loss, error = np.array(points, float).T
        axes.errorbar(tokens, loss, yerr=error, color=SETS[i % len(SETS)], marker=MARKERS[i % len(MARKERS)], zorder=3,
                      markersize=5, linewidth=1.4, capsize=2, label=f"validation, {tag}: {loss[-1]:.3f} at the end")
    axes.set(title=workdir.path.name, xlabel="training tokens", ylabel="loss, nats per token",
             ylim=_limits(train, sets))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.margins(x=0.01)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if train or sets:
        axes.legend(frameon=False)
    path = workdir.path / "plots" / "loss.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)
    return path


def _rows(workdir):
    """[(tokens, loss)] of training, and tag -> [(tokens, loss, standard error)]; NaN where a loss was not finite."""
    train, sets = [], {}
    with open(workdir.metrics) as f:
        for row in map(json.loads, f):
            tokens = row.get("tokens", row["step"])
            if "val_loss" in row:
                point = (tokens, _number(row["val_loss"]), _number(row.get("val_loss_stderr", 0.0)))
                sets.setdefault(row["tag"], []).append(point)
            elif "loss" in row:
                train.append((tokens, _number(row["loss"])))
    return train, sets


def _number(value) -> float:
    return math.nan if value is None else value


def _smooth(loss, reach):
    """Mean over `reach` rows on either side, NaNs left out; at the start, where the slope is steep, on both as few."""
    good = np.isfinite(loss)
    total = np.concatenate([[0.0], np.cumsum(np.where(good, loss, 0.0))])
    count = np.concatenate([[0], np.cumsum(good)])
    here = np.arange(len(loss))
    reach = np.minimum(reach, here)
    start, end = here - reach, np.minimum(here + reach + 1, len(loss))
    return (total[end] - total[start]) / np.where(count[end] > count[start], count[end] - count[start], np.nan)


def _limits(train, sets):
    """Room for every validation loss and for training but its first rows and rarest spikes, which would squeeze it."""
    late = [loss for _, loss in train[len(train) // 50:] if math.isfinite(loss)]
    shown = [loss for points in sets.values() for _, loss, _ in points if math.isfinite(loss)]
    shown += [min(late), np.quantile(late, 0.995)] if late else []
    if not shown:
        return None
    pad = 0.05 * (max(shown) - min(shown)) or 0.1
    return min(shown) - pad, max(shown) + pad
