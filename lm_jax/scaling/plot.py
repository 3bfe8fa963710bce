"""All figures of a study, drawn where the data carry them and explained where not, as SVG and PNG."""

import io
import re
from dataclasses import dataclass
from html import escape
from pathlib import Path

import matplotlib

from lm_jax import disk
from lm_jax.scaling import figures, profiles, style
from lm_jax.scaling.checks import Refused
from lm_jax.scaling.subject import Subject

FIGURES = {
    "compute": profiles.compute,
    "contours": figures.contours,
    "slices": figures.slices,
    "extrapolation": figures.extrapolation,
    "residuals": figures.residuals,
    "isoflop": profiles.isoflop,
    "curves": profiles.curves,
    "best_lr": profiles.best_lr,
    "best_batch": profiles.best_batch,
}
PLAIN = {"Date": None, "Creator": None, "Format": None, "Type": None}  # the same bytes every time, no address in them


@dataclass(frozen=True)
class Drawn:
    """A figure as SVG, that may stand inside a page, and what to say under it; or why there is none."""

    name: str
    about: str
    svg: str = ""
    caption: str = ""
    missing: str = ""


def write(folder: Path, subject: Subject) -> list[Drawn]:
    """Draw every figure to <folder>/<name>.svg and .png; those that the data do not carry say why."""
    folder.mkdir(parents=True, exist_ok=True)
    return [_draw(name, figure, folder, subject) for name, figure in FIGURES.items()]


def _draw(name, figure, folder, subject) -> Drawn:
    about = figure.__doc__.strip()
    try:
        made, caption = figure(subject)
    except Refused as reason:
        for old in (folder / f"{name}.svg", folder / f"{name}.png"):
            old.unlink(missing_ok=True)  # of a table that carried it
        return Drawn(name, about, missing=str(reason))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.sans-serif": style.FONTS}):
        made.savefig(folder / f"{name}.png")
        text = io.StringIO()
        made.savefig(text, format="svg", metadata=PLAIN)
    svg = text.getvalue()
    svg = svg[svg.index("<svg"):].replace(">", f"><title>{escape(about)}</title>", 1)  # without a document type
    svg = re.sub(r'( id="|url\(#|href="#)', rf"\1{name}-", svg)  # names that are its own among others on a page
    disk.replace(folder / f"{name}.svg", [svg])
    return Drawn(name, about, svg, caption)
