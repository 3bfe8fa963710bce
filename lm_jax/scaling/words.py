"""Numbers and columns in words: with units, counted by which convention, as short as people say them."""

import math

from lm_jax.scaling.table import Table

TOLD = {"N": "parameters", "D": "training tokens", "U": "unique tokens", "C": "training FLOPs",
        "lr": "learning rate", "batch": "batch, tokens"}


def name(column: str, table: Table) -> str:
    """A column with its unit and how it was counted."""
    if column == "loss":
        return f"loss, {table.unit}"
    counted = {"N": f" ({table.params_convention})", "C": f" ({table.flops_convention})"}.get(column, "")
    letter = f"{column}, " if column in "NDUC" else ""
    return letter + TOLD[column] + counted


def say(column: str, value: float) -> str:
    """A value as a person says it: 1.4B parameters, 10²¹ FLOPs."""
    if column in ("C", "lr"):
        return scientific(value) if column == "C" or value < 1e-3 else f"{value:.3g}"
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size * 0.9995:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def scientific(value: float) -> str:
    """5.76×10²³; the one of 1×10²³ is left out."""
    digits, power = f"{value:.2e}".split("e")
    raised = str(int(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return ("" if float(digits) == 1 else f"{float(digits):g}×") + f"10{raised}"


def number(value: float) -> str:
    """Four digits that count: 22720, 0.5139, 1.994e+16."""
    return f"{float(f'{value:.4g}'):g}"


def between(ends, say=number) -> str:
    """An interval in words; records say infinity as it is or, in JSON, as nothing."""
    low, high = ends
    low = say(low) if low else "nothing"
    return f"{low} to {'anything' if high is None or math.isinf(high) else say(high)}"
