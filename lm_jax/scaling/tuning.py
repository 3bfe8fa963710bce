"""The critical batch size, from the noise of gradients at two batch sizes (McCandlish et al. 2018, appendix A.1)."""

from dataclasses import dataclass

import numpy as np

from lm_jax.scaling import intervals
from lm_jax.scaling.checks import Refused


@dataclass(frozen=True)
class NoiseScale:
    """B_simple = tr(Sigma) / |G|^2, in units of the batch sizes: where doubling the batch stops to halve the steps."""

    batch: float
    interval: tuple[float, float]
    level: float
    signal: float  # |G|^2
    noise: float  # tr(Sigma), of a batch of 1
    measurements: int


def noise_scale(small: int, big: int, squares_small, squares_big, rng: np.random.Generator, *,
                level: float = intervals.LEVEL, draws: int = 1000) -> NoiseScale:
    """The simple noise scale from squared gradient norms, measured at one point of training at two batch sizes.

    E|G_B|^2 = |G|^2 + tr(Sigma) / B is solved for both, from means: a ratio of means, since a mean of ratios is biased.
    The interval draws measurements anew. Refused where the means leave no signal, as where they were too few.
    """
    squares_small, squares_big = np.asarray(squares_small, float), np.asarray(squares_big, float)
    if not 0 < small < big:
        raise Refused(f"batch sizes {small} and {big}: pass the smaller first; two different ones are needed")
    if min(len(squares_small), len(squares_big)) < 2 or not np.isfinite([*squares_small, *squares_big]).all():
        raise Refused("squared gradient norms must be finite, and two or more at each batch size")

    def solved(mean_small, mean_big):
        return (big * mean_big - small * mean_small) / (big - small), (mean_small - mean_big) / (1 / small - 1 / big)

    signal, noise = solved(squares_small.mean(), squares_big.mean())
    if signal <= 0 or noise <= 0:
        raise Refused(f"|G|^2 comes out as {signal:.3g} and tr(Sigma) as {noise:.3g}, both must be positive: measure "
                      f"more often than {len(squares_small)} times, or with batches farther apart than {small}, {big}")
    again = lambda values: rng.choice(values, (draws, len(values))).mean(1)
    signals, noises = solved(again(squares_small), again(squares_big))
    scales = np.where(signals > 0, np.maximum(noises, 0) / np.where(signals > 0, signals, 1), np.inf)
    order = np.sort(scales)
    ends = (order[int((1 - level) / 2 * draws)], order[min(int((1 + level) / 2 * draws), draws - 1)])
    return NoiseScale(noise / signal, (float(ends[0]), float(ends[1])), level, signal, noise,
                      min(len(squares_small), len(squares_big)))
