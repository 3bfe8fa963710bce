"""The forms that a loss may take, each one small value: its formula, its parameters, and a rough first guess.

In this package N is a number of parameters, D of training tokens, U of unique ones, C of FLOPs; a fit says by which
convention. Parameters are positive, and amplitudes (A, B) come with an exponent and a column: A N^-alpha. Formulas are
analytic, so that a fit takes exact derivatives by a complex step (Squire & Trapp 1998), and keep their shape when a
column's unit changes, so that a fit can measure N and D in units of their geometric mean, where A and alpha are far
less correlated than at N = 1.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import nnls

Values = dict[str, np.ndarray]  # parameters by name, or columns by name


@dataclass(frozen=True)
class Law:
    """A form of the loss. `loss(p, x)` and `guess(p, x, loss)` take parameters p and columns x by name.

    `guess` fills in the amplitudes, given the parameters of `grid`: what is linear is solved, not searched (variable
    projection, Golub & Pereyra 1973).
    """

    name: str
    formula: str
    source: str
    params: tuple[str, ...]
    reads: tuple[str, ...]  # columns
    loss: Callable[[Values, Values], np.ndarray]
    guess: Callable[[Values, Values, np.ndarray], Values]
    amplitudes: dict[str, tuple[str, str]]  # amplitude -> its exponent and column
    grid: dict[str, tuple[float, ...]] = field(default_factory=dict)  # where starts are sought
    exponents: dict[str, str] = field(default_factory=lambda: {"N": "alpha", "D": "beta"})  # for large N and D


def additive(p: Values, x: Values) -> np.ndarray:
    """L = E + A N^-alpha + B D^-beta (Hoffmann et al. 2022, eq. 2)."""
    return p["E"] + p["A"] * x["N"] ** -p["alpha"] + p["B"] * x["D"] ** -p["beta"]


def tied(p: Values, x: Values) -> np.ndarray:
    """The same with one exponent, which makes it, at any fixed D/N = M, a power law in compute: with eta = alpha / 2,
    L = E + (a M^eta + b M^-eta) C^-eta (Gadre et al. 2024, eq. 4)."""
    return p["E"] + p["A"] * x["N"] ** -p["alpha"] + p["B"] * x["D"] ** -p["alpha"]


def kaplan(p: Values, x: Values) -> np.ndarray:
    """L = ((Nc/N)^(alpha/beta) + Dc/D)^beta (Kaplan et al. 2020, eq. 1.5), with A = Nc^alpha and B = Dc^beta."""
    logs = np.log(p["A"]) - p["alpha"] * np.log(x["N"]), np.log(p["B"]) - p["beta"] * np.log(x["D"])
    return np.exp(p["beta"] * _logsumexp(*(log / p["beta"] for log in logs)))


def kaplan_floor(p: Values, x: Values) -> np.ndarray:
    return p["E"] + kaplan(p, x)


def data_constrained(p: Values, x: Values) -> np.ndarray:
    """L = E + A N'^-alpha + B D'^-beta, where repeated tokens and excess parameters are worth less and less.

    D' = U (1 + R_D (1 - exp(-(D/U - 1) / R_D))), and N' likewise from the N that suits U tokens (Muennighoff et al.
    2023, eq. 5 and 6; R_D and R_N are their R_D* and R_N*).
    """
    suits = (p["alpha"] * p["A"] / (p["beta"] * p["B"]) * x["U"] ** p["beta"]) ** (1 / p["alpha"])
    suits = np.minimum(x["N"] + 0 * suits, suits)
    return additive(p, {"N": _worth(x["N"], suits, p["R_N"]), "D": _worth(x["D"], x["U"], p["R_D"])})


def saturating(column: str) -> Law:
    """L = E + A x^-alpha, for one column x of a table."""
    return Law(
        name=f"power_{column}", formula=f"E + A {column}^-alpha", source="a power law with a floor",
        params=("E", "A", "alpha"), reads=(column,), amplitudes={"A": ("alpha", column)}, grid={"alpha": EXPONENTS},
        loss=lambda p, x: p["E"] + p["A"] * x[column] ** -p["alpha"], exponents={column: "alpha"},
        guess=lambda p, x, loss: p | _linear({"E": 1 + 0 * loss, "A": x[column] ** -p["alpha"]}, loss))


def _logsumexp(a, b):
    top = np.maximum(np.real(a), np.real(b))
    return top + np.log(np.exp(a - top) + np.exp(b - top))


def _worth(amount, unique, decay):
    """What `amount` is worth of which `unique` counts in full and the excess ever less."""
    return unique - unique * decay * np.expm1(-(amount / unique - 1) / decay)


def _linear(columns: Values, loss) -> Values:
    """Coefficients of a sum of columns by least squares in relative error, none of them negative or nothing."""
    matrix = np.stack([column / loss for column in columns.values()], axis=1)
    scale = np.linalg.norm(matrix, axis=0)
    found = nnls(matrix / scale, np.ones(len(loss)))[0]
    return dict(zip(columns, np.maximum(found, 1e-3 * found.max()) / scale))


def _guess_additive(p, x, loss):
    return p | _linear({"E": 1 + 0 * loss, "A": x["N"] ** -p["alpha"], "B": x["D"] ** -p["beta"]}, loss)


def _guess_tied(p, x, loss):
    return p | _linear({"E": 1 + 0 * loss, "A": x["N"] ** -p["alpha"], "B": x["D"] ** -p["alpha"]}, loss)


def _guess_kaplan(p, x, loss):
    """(L - E)^(1/beta) is linear; `floor`, a share of the smallest loss, is E."""
    floor = p.get("floor", 0.0) * loss.min()
    power = 1 / p["beta"]
    found = _linear({"A": x["N"] ** (-p["alpha"] * power), "B": 1 / x["D"]}, (loss - floor) ** power)
    return {key: p[key] for key in ("alpha", "beta")} | {key: v ** p["beta"] for key, v in found.items()} | {"E": floor}


def _guess_constrained(p, x, loss):
    return _guess_additive(p, {"N": x["N"], "D": _worth(x["D"], x["U"], p["R_D"])}, loss)


EXPONENTS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 1.1)
DECAYS = (0.3, 1.5, 5.0, 15.0, 60.0, 300.0)  # epochs
_TWO = {"A": ("alpha", "N"), "B": ("beta", "D")}
_EACH = {"alpha": EXPONENTS, "beta": EXPONENTS}

LAWS = {law.name: law for law in (
    Law(name="chinchilla", formula="E + A N^-alpha + B D^-beta", source="Hoffmann et al. 2022, approach 3",
        params=("E", "A", "B", "alpha", "beta"), reads=("N", "D"), loss=additive, guess=_guess_additive,
        amplitudes=_TWO, grid=_EACH),
    Law(name="overtrained", formula="E + A N^-alpha + B D^-alpha", source="Gadre et al. 2024 (eta = alpha / 2)",
        params=("E", "A", "B", "alpha"), reads=("N", "D"), loss=tied, guess=_guess_tied,
        amplitudes={"A": ("alpha", "N"), "B": ("alpha", "D")}, grid={"alpha": EXPONENTS},
        exponents={"N": "alpha", "D": "alpha"}),
    Law(name="kaplan", formula="(A^(1/beta) N^(-alpha/beta) + B^(1/beta) / D)^beta",
        source="Kaplan et al. 2020, eq. 1.5 (A = Nc^alpha, B = Dc^beta)",
        params=("A", "B", "alpha", "beta"), reads=("N", "D"), loss=kaplan, guess=_guess_kaplan,
        amplitudes=_TWO, grid=_EACH),
    Law(name="kaplan_floor", formula="E + (A^(1/beta) N^(-alpha/beta) + B^(1/beta) / D)^beta",
        source="Kaplan et al. 2020, eq. 1.5, with an irreducible loss",
        params=("E", "A", "B", "alpha", "beta"), reads=("N", "D"), loss=kaplan_floor, guess=_guess_kaplan,
        amplitudes=_TWO, grid=_EACH | {"floor": (0.1, 0.5, 0.8, 0.95)}),
    Law(name="data_constrained", formula="E + A N'^-alpha + B D'^-beta", source="Muennighoff et al. 2023, eq. 5 and 6",
        params=("E", "A", "B", "alpha", "beta", "R_D", "R_N"), reads=("N", "D", "U"), loss=data_constrained,
        guess=_guess_constrained, amplitudes=_TWO,
        grid={"alpha": EXPONENTS[3:8], "beta": EXPONENTS[3:8], "R_D": DECAYS, "R_N": DECAYS}),
    saturating("N"), saturating("D"), saturating("C"),
)}
