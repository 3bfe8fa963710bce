"""The parts of a benchmark by name, and the page that they are shown on."""

import dataclasses
import functools
import json
import sys

import jax
from rich.console import Console

from lm_jax import pages
from lm_jax.measure import (
    against_torch,
    against_transformers,
    entropy,
    figures,
    growth,
    limits,
    loader,
    machine,
    packing,
    stacked,
    starts,
    subject,
    training,
)


class Page:
    """Where figures go as soon as a part has them: tables for people, or a line of JSON a part."""

    def __init__(self, as_json: bool, command: str):
        self.as_json, self.command, self.console = as_json, command, Console(highlight=False)

    def head(self, record: dict):
        self._line({"part": "machine", "command": self.command} | record, machine.told(record))

    def show(self, part: str, title: str, found: list[figures.Figure], **more):
        """A part's figures; `more` is for programs alone."""
        if self.as_json:
            self._line({"part": part, "title": title, "figures": [one.record() for one in found]} | more, "")
        else:
            self.console.print(figures.table(title, found))

    def say(self, line: str):
        """What a long part has come to, for who watches or interrupts it: no figure yet."""
        print(line, file=sys.stderr, flush=True)

    def end(self, load: list[float]):
        """Under what load it ended: a figure of a busy machine is one of a busy machine."""
        self._line({"part": "end", "load": load}, "load at the end " + ", ".join(f"{x:.1f}" for x in load))

    def _line(self, record: dict, words: str):
        print(json.dumps(record, ensure_ascii=False) if self.as_json else words, flush=True)


def _limits(page: Page, c, args):
    found = list(known_limits(args.turns).figures)
    if pages.in_use() == "huge" and jax.default_backend() == "cpu":
        found += limits.on_other_pages("plain", turns=args.turns)
    page.show("limits", "limits of this machine", found)


def _training(page: Page, c, args):
    with subject.opened(c) as it:
        found = training.measured(it, known_limits(args.turns), turns=args.turns)
        page.show("training", f"training of {c.name}: {subject.told(it)}", found)


def _packing(page: Page, c, args):
    with subject.opened(c) as it:
        found = packing.measured(it, turns=args.turns)
        page.show("packing", f"packed rows of {c.name}: {subject.told(it)}", found)


def _starts(page: Page, c, args):
    page.show("starts", "before anything is asked for", starts.imports(turns=args.turns))
    page.show("starts", f"before the first step of {c.name}", starts.first_step(c))


def _loader(page: Page, c, args):
    page.show("loader", f"rows of {c.name}", loader.measured(c, turns=args.turns))


def _gap(page: Page, c, args):
    c = stacked.config()
    with subject.opened(dataclasses.replace(c, data=dataclasses.replace(c.data, vocab=c.model.vocab))) as it:
        page.show("gap", f"the host's share of small steps: {subject.told(it)}", training.gap(it, turns=args.turns))


def _growth(page: Page, c, args):
    for axis in growth.AXES:
        page.show("growth", f"growth over {axis}", growth.measured(axis, turns=args.turns))


def _together(page: Page, c, args):
    page.show("together", f"{stacked.POINTS} points of a million parameters", stacked.measured(turns=args.turns))


def _entropy(page: Page, c, args):
    page.show("entropy", "memory of the cross-entropy", entropy.measured())


def _torch(page: Page, args):
    for size in args.sizes:
        for dtype in args.dtypes:
            case = against_torch.CASES[size]
            title = f"({size}) {case.name}, {dtype}"
            say = lambda line: page.say(f"{title}: {line}")
            page.show("torch", title, against_torch.measured(case, dtype, turns=args.turns, say=say))


def _transformers(page: Page, args):
    for dtype in args.dtypes:
        for rows in (1, 8):
            title = f"generation, {rows} at once, {dtype}"
            say = lambda line: page.say(f"{title}: {line}")
            found = against_transformers.generation(rows, dtype, turns=args.turns, say=say)
            page.show("transformers", title, found)
    page.show("transformers", "classification of a sentence", against_transformers.classification(turns=args.turns))


@functools.cache
def known_limits(turns: int) -> limits.Limits:
    """Measured once: what the parts are held against."""
    return limits.measured(turns=turns)


PARTS = {"limits": _limits, "training": _training, "packing": _packing, "starts": _starts, "loader": _loader,
         "growth": _growth, "together": _together, "gap": _gap, "entropy": _entropy}
AGAINST = {"torch": _torch, "transformers": _transformers}
