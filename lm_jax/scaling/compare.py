"""Which form to believe: Akaike's criterion, and how well each predicts runs with more compute than it saw."""

import itertools
import math

import numpy as np

from lm_jax.errors import ConfigError
from lm_jax.scaling import checks, fitting
from lm_jax.scaling.laws import Law
from lm_jax.scaling.table import Table

CUTS = (0.5, 0.6, 0.7, 0.8, 0.9)  # shares of the rows, by compute, that a rolling hold-out fits on
LARGEST = 0.8  # runs with this share of the largest budget or more are of it


def rolling(law: Law, table: Table, **settings) -> dict:
    """Mean absolute relative error of rows just above a cut in compute, fitted on those below it, over CUTS."""
    order = np.argsort(table["C"], kind="stable")
    edges = [round(share * len(table)) for share in (*CUTS, 1.0)]
    cuts = [_predicted(law, table, order[:a], order[a:b], settings) for a, b in itertools.pairwise(edges) if b > a]
    cuts = [cut for cut in cuts if cut]
    return {"error": float(np.mean([cut["error"] for cut in cuts])) if cuts else None, "cuts": cuts}


def beyond(law: Law, table: Table, compute: float, **settings) -> dict | None:
    """The error on rows above `compute`, fitted on the others; None where they carry no fit."""
    above = table["C"] > compute
    return _predicted(law, table, np.flatnonzero(~above), np.flatnonzero(above), settings)


def largest(law: Law, table: Table, **settings) -> dict | None:
    """The error on the largest budget, fitted on all smaller ones."""
    return beyond(law, table, LARGEST * table["C"].max(), **settings)


def allocation(law: Law, p: dict, compute, per_product: float = 6.0):
    """(N, D) that a law makes the best of C = per_product N D, for laws of the two; unlimited data.

    Where alpha A N^-alpha = beta B D^-beta (Hoffmann et al. 2022, eq. 4), with Kaplan's exponents and amplitudes
    taken to 1 / beta.
    """
    kappa = p["beta"] if law.name.startswith("kaplan") else 1.0
    alpha, beta = p["alpha"] / kappa, p.get("beta", p["alpha"]) / kappa
    log_ratio = np.log(alpha / beta) + (np.log(p["A"]) - np.log(p["B"])) / kappa
    log_N = (log_ratio + beta * np.log(compute / per_product)) / (alpha + beta)
    return np.exp(log_N), compute / per_product / np.exp(log_N)


def allocation_exponent(law: Law, p: dict):
    """a of N ~ C^a."""
    beta = p.get("beta", p["alpha"])
    return beta / (p["alpha"] + beta)


def per_product(table: Table) -> float:
    """C / (N D), as the table counts: 6 where C is 6 N D."""
    return float(np.exp(np.median(np.log(table["C"] / (table["N"] * table["D"])))))


def _predicted(law, table, fitted, predicted, settings):
    if not len(predicted):
        return None
    try:
        below = table.take(fitted)
        checks.enough(law, below, settings.get("fixed") or ())
        fit = fitting.fit(law, below.columns, below.loss, tries=2, **settings)
    except ConfigError:
        return None
    there = table.take(predicted)
    relative = fit.predict(there.columns) / there.loss - 1
    return {"compute": float(below["C"].max()), "fitted": len(fitted), "predicted": len(predicted),
            "error": float(np.abs(relative).mean()), "bias": float(relative.mean()),
            "worst": float(relative[np.argmax(np.abs(relative))])} if math.isfinite(relative.sum()) else None
