"""Figures of laws show what the fits say, and the page names every law, warning and refusal, by itself."""

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as xml
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest
from test_laws import TRUE, grid
from test_tables import curves, isoflop, rows

from lm_jax.scaling import compare, fitting, plot, report, results, subject, table, words
from lm_jax.scaling.checks import Refused
from lm_jax.scaling.laws import LAWS, additive
from lm_jax.workdir import plain

LEVEL = 0.9
UNITS = re.compile(r"\(6 N D\)|\(as the table gives it\)|tokens|nats per token|%")


def studied(runs, *, budgets=(), law="chinchilla") -> subject.Subject:
    fits, record = results.study(runs, level=LEVEL, draws=0)
    if law in fits:
        record["predict"] = [results.predict(fits[law], runs.finals(), budget, level=LEVEL) for budget in budgets]
    return subject.subject(runs, fits, record, law=law)


@pytest.fixture(scope="module")
def gridded() -> subject.Subject:
    x, rng = grid(), np.random.default_rng(0)
    loss = additive(TRUE, x) * np.exp(0.003 * rng.standard_normal(len(x["N"])))
    return studied(table.from_rows(rows(x, loss), source="<grid> & co"), budgets=(1e22, 1e24))


@pytest.fixture(scope="module")
def budgeted() -> subject.Subject:
    return studied(isoflop(np.random.default_rng(0), 0.002))


@pytest.fixture(scope="module")
def trained() -> subject.Subject:
    return studied(curves(np.random.default_rng(0), 0.002))


def line(axes, label: str):
    """(x, y) of the one line whose label begins so."""
    found = [line for line in axes.get_lines() if line.get_label().startswith(label)]
    assert len(found) == 1, [line.get_label() for line in axes.get_lines()]
    return found[0].get_xdata(), found[0].get_ydata()


def curved(axes, points: int):
    return [line.get_xydata().T for line in axes.get_lines() if len(line.get_xdata()) == points]


def test_slices_pass_through_what_the_fit_predicts(gridded):
    figure, _ = plot.FIGURES["slices"](gridded)
    held = np.unique(gridded.ends["D"])
    drawn = curved(figure.axes[0], 200)
    assert len(drawn) == len(held)
    for D, (N, loss) in zip(held, drawn):
        assert loss == pytest.approx(gridded.fit.predict({"N": N, "D": np.full_like(N, D)}), rel=1e-6)


def test_runs_near_a_slice_stand_as_far_from_its_curve_as_their_residual(budgeted):
    found = [part for column in "ND" for part in subject.slices(budgeted.fit, budgeted.ends, column)]
    assert found
    for part in found:
        x = {name: part.held.get(name, budgeted.ends[name][part.rows]) for name in "ND"}
        residuals = np.log(part.losses / additive(budgeted.fit.params, x))
        assert residuals == pytest.approx(budgeted.fit.residuals[part.rows], abs=1e-9)


def test_frontiers_lie_where_the_law_allocates(gridded):
    figure, _ = plot.FIGURES["contours"](gridded)
    N, D = line(figure.axes[0], "lowest loss")
    for n, d in zip(N[::20], D[::20]):
        assert (n, d) == pytest.approx(compare.allocation(gridded.fit.law, gridded.fit.params, 6 * n * d), rel=1e-6)
    C, loss = line(plot.FIGURES["compute"](gridded)[0].axes[0], "chinchilla")
    for c, value in zip(C[::20], loss[::20]):
        assert value == pytest.approx(results.best_loss(gridded.fit, gridded.ends, c))


def test_the_envelope_is_the_lowest_loss_of_as_little_compute(trained):
    C, loss = line(plot.FIGURES["compute"](trained)[0].axes[0], "lowest loss")
    for c, value in zip(C[::25], loss[::25]):
        assert value == trained.runs.loss[trained.runs["C"] <= c].min()


def test_extrapolation_shows_every_form_and_holds_out_runs_that_the_fit_never_saw(gridded):
    figure, _ = plot.FIGURES["extrapolation"](gridded)
    left, right = figure.axes
    for name in ("chinchilla without", "kaplan_floor", "overtrained"):
        assert line(left, name)[0][-1] > 1e24, "every form reaches the largest budget asked for"
    C, loss = line(left, "kaplan_floor")
    assert loss[-1] == pytest.approx(results.best_loss(gridded.fits["kaplan_floor"], gridded.ends, C[-1]))
    smaller, held = subject.hold_out(gridded.fit, gridded.ends)
    assert gridded.ends["C"][held].min() > gridded.ends["C"][~held].max() and smaller.n == (~held).sum()
    below = gridded.ends.take(~held)
    again = fitting.fit(LAWS["chinchilla"], below.columns, below.loss)
    there = gridded.ends.take(held)
    error = np.abs(again.predict(there.columns) / there.loss - 1).mean()
    assert f"mean error {error:.2%}" in right.get_title()


def test_bands_hold_the_truth_and_open_beyond_the_data(gridded):
    C = np.array([1e18, 1e20, 1e24])
    band = subject.frontier(gridded.fit, C, 0.99, 6.0)
    N, D = compare.allocation(LAWS["chinchilla"], TRUE, C)
    assert (band.low < additive(TRUE, {"N": N, "D": D})).all() and (additive(TRUE, {"N": N, "D": D}) < band.high).all()
    width = np.log(band.high / band.low)
    assert width[2] > 2 * width[1]
    low, high = gridded.budgets[1]["loss"]["interval"]  # by profile, of 1e24
    near = subject.frontier(gridded.fit, np.array([1e24]), LEVEL, 6.0)
    assert (near.low[0], near.high[0]) == pytest.approx((low, high), rel=0.02)


def test_valleys_have_their_minima_on_their_parabolas(budgeted):
    left = plot.FIGURES["isoflop"](budgeted)[0].axes[0]
    stars = [line for line in left.get_lines() if line.get_marker() == "*"]
    parabolas = curved(left, 100)
    assert len(stars) == len(parabolas) == 5
    for star, (N, loss) in zip(stars, parabolas):
        (x,), (y,) = star.get_data()
        assert np.interp(np.log(x), np.log(N), loss) == pytest.approx(y, rel=1e-4) and y <= loss.min() * (1 + 1e-6)


def test_a_law_of_the_learning_rate_is_drawn_where_the_table_has_it(rng):
    N = np.repeat(np.geomspace(1e6, 1e8, 4), 7)
    lr = 3.0 * N**-0.4 * np.tile(np.geomspace(0.2, 5, 7), 4)
    loss = 3 + (N / 1e6) ** -0.3 + 0.05 * np.log(lr / (3.0 * N**-0.4)) ** 2 + 0.002 * rng.standard_normal(28)
    s = studied(table.from_rows(rows({"N": N, "D": 20 * N, "C": 120 * N**2}, loss, lr=lr)))
    x, best = line(plot.FIGURES["best_lr"](s)[0].axes[1], "parabola")
    assert best == pytest.approx(3.0 * x**-0.4, rel=0.1)


def test_every_axis_says_its_unit_and_how_it_is_counted(gridded, budgeted, trained):
    said = set()
    for s in (gridded, budgeted, trained):
        for name, figure in plot.FIGURES.items():
            try:
                axes = figure(s)[0].axes
            except Refused:
                continue
            said.add(name)
            for a in axes:
                assert a.get_xlabel() or a.get_ylabel(), name
                for label in filter(None, (a.get_xlabel(), a.get_ylabel())):
                    assert UNITS.search(label), (name, label)
    assert said == plot.FIGURES.keys() - {"best_lr", "best_batch"}


class Addresses(HTMLParser):
    """Whatever a page would load or run."""

    def __init__(self, text: str):
        super().__init__()
        self.found, self.tags = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "srcset", "action") and not value.startswith(("#", "data:")):
                self.found.append((tag, value))
            self.found += [(tag, other) for other in re.findall(r"url\(([^#)][^)]*)\)", value or "")]


def test_a_page_is_whole_in_itself_and_names_every_law_warning_and_refusal(gridded, tmp_path):
    record = gridded.record | {"notes": ["3 rows <left> out"]}
    record["laws"]["power_N"]["warnings"].append("E < 0 is \"told\"")
    page = report.write(tmp_path, gridded.runs, gridded.fits, record).read_text()
    addresses = Addresses(page)
    assert not addresses.found and "@import" not in page
    assert not {"script", "link", "iframe", "img"} & set(addresses.tags)
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids)) and {name for name in re.findall(r'(?:href="|url\()#([^")]+)', page)} <= set(ids)
    text = unescape(re.sub(r"<[^>]+>", "", re.sub(r"<svg.*?</svg>", "", page, flags=re.S)))
    said = [line for law in record["laws"].values() for line in law["warnings"]] + list(record["refused"].values())
    said += [law["formula"] for law in record["laws"].values()] + record["notes"]
    said += [*record["laws"], *record["refused"], record["source"]]
    said += ["10²²", f"{gridded.budgets[0]['loss']['value']:.4g}"]
    for line in said:
        assert line in text, line
    for name in ("isoflop", "curves", "best_lr"):
        with pytest.raises(Refused) as reason:
            plot.FIGURES[name](gridded)
        assert str(reason.value) in text, "a figure that is missing says why"


def test_svgs_are_xml_without_addresses(gridded, tmp_path):
    (tmp_path / "curves.png").touch()
    drawn = [d for d in plot.write(tmp_path, gridded) if d.svg]
    assert {d.name for d in drawn} == {"compute", "contours", "slices", "extrapolation", "residuals"}
    for d in drawn:
        assert (tmp_path / f"{d.name}.png").read_bytes().startswith(b"\x89PNG")
        text = (tmp_path / f"{d.name}.svg").read_text()
        xml.fromstring(text)
        names = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # of the format: nobody loads them
        assert set(re.findall(r"https?://[^\"' ]+", text)) == names
        assert "nats per token" in text or "%" in text, "words are text, that may be found and read out"
    assert not (tmp_path / "curves.png").exists(), "a figure of an earlier table, that this one does not carry"


def test_a_refused_law_is_replaced_by_one_that_the_page_names(trained, tmp_path):
    assert trained.law == "power_C", "N and D rise together: no law of both"
    page = report.write(tmp_path, trained.runs, trained.fits, trained.record).read_text()
    assert "chinchilla was refused: chinchilla cannot tell N from D" in page and "Shown instead is power_C" in page
    again = report.write(tmp_path, trained.runs, trained.fits, json.loads(json.dumps(plain(trained.record))))
    assert again.read_text() == page, "a record read back from law.json makes the same page"


def test_matplotlib_waits_until_something_is_drawn():
    program = "import sys, lm_jax.scaling.study, lm_jax.recipes.run; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("column, value, said", [
    ("N", 7.3191e10, "73.2B"), ("D", 999.9e9, "1T"), ("C", 5.76e23, "5.76×10²³"), ("C", 9.999e20, "10²¹"),
    ("lr", 2e-4, "2×10⁻⁴"), ("lr", 0.02, "0.02")])
def test_numbers_are_said_as_people_say_them(column, value, said):
    assert words.say(column, value) == said
