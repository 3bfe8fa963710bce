"""Tasks on texts by name, as users of transformers know them.

    tell = lm_jax.pipeline("text-classification", model="folder")
    tell("What a film!")                   # [{"label": "POSITIVE", "score": 0.9998}]

A task is a function of a model and texts in the table below; a model's head says which tasks it can do.
"""

import difflib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

from lm_jax.config import TransformerConfig
from lm_jax.errors import ConfigError
from lm_jax.pipelines import answers, labels, reader, tags, words, writing
from lm_jax.pipelines.reader import whole
from lm_jax.pipelines.wish import Wish


def pipeline(task: str, model, *, say=print, **knobs) -> "Pipeline":
    """A task by name with the model of a folder as transformers saves it, or of a name in the local hub; those that
    write also with a run's folder. `knobs` are those of the task's function, and `batch_size`, how many texts are
    computed at once at most; they hold where a call says no other.

    `say` is told what should be known of a model or of texts, such as that some are too long. ConfigError where the
    task is unknown, the model's head cannot do it, or the folder lacks what it needs.
    """
    named = task
    if re.fullmatch(r"translation_\w+_to_\w+", task):
        task = "translation"
    task = ALIASES.get(task, task)
    if task not in TASKS:
        near = difflib.get_close_matches(task, [*TASKS, *ALIASES], n=1, cutoff=0)[0]
        raise ConfigError(f"task {task!r} is not known: nearest is {near!r}, of {', '.join(TASKS)}")
    found = TASKS[task]
    _check(task, found.run, knobs)
    by = found.load(model, say=say, **{"task": named} if found.load is writing.load else {})
    kind = _kind(by.model.cfg)
    if found.heads and kind not in found.heads:
        able = [name for name, other in TASKS.items() if not other.heads or kind in other.heads]
        raise ConfigError(f"{task} needs {' or '.join(HEADS[head] for head in found.heads)}, and {model} has "
                          f"{HEADS[kind]}: it can do {', '.join(able)}")
    return Pipeline(task, by, found.run, knobs)


@dataclass(frozen=True)
class Pipeline:
    """A task with its model: called with a text, or a list of them."""

    task: str
    by: reader.Reader | writing.Author = field(repr=False)
    run: Callable = field(repr=False)
    knobs: dict

    def __call__(self, *inputs, **knobs):
        _check(self.task, self.run, knobs)
        knobs = self.knobs | knobs
        by = replace(self.by, rows=whole(batch_size=knobs.pop("batch_size", self.by.rows)))
        return self.run(by, *inputs, **knobs)


@dataclass(frozen=True)
class Task:
    """What a task calls, the kinds of model (`_kind`) that can do it, none meaning all, and how one is loaded."""

    run: Callable
    heads: tuple[str, ...] = ()
    load: Callable = reader.load


TASKS = {
    "text-generation": Task(writing.go_on, ("writes",), writing.load),
    "text2text-generation": Task(writing.rewrite, ("rewrites",), writing.load),
    "summarization": Task(writing.rewrite, ("rewrites",), writing.load),
    "translation": Task(writing.rewrite, ("rewrites",), writing.load),
    "text-classification": Task(labels.classify, ("classes",)),
    "token-classification": Task(tags.tag, ("tags",)),
    "question-answering": Task(answers.answer, ("span",)),
    "fill-mask": Task(words.fill, ("mlm", "mlm_pairs")),
    "feature-extraction": Task(words.features),
    "zero-shot-classification": Task(labels.zero_shot, ("classes",)),
}
ALIASES = {"sentiment-analysis": "text-classification", "ner": "token-classification"}
HEADS = {
    "writes": "a decoder with a head over its vocabulary", "rewrites": "an encoder and a decoder",
    "classes": "a head of labels of a text", "tags": "a head of labels of tokens",
    "span": "a head of beginnings and ends of answers", "mlm": "a head that fills in masks",
    "mlm_pairs": "a head that fills in masks and compares sentences", "none": "no head",
}


def _kind(cfg: TransformerConfig) -> str:
    """What a model's head is for, a key of HEADS."""
    return cfg.head if cfg.head != "lm" else "rewrites" if cfg.encoder_depth else "writes"


def _check(task: str, run: Callable, knobs: dict):
    """Refuse a knob that a task has not."""
    known = [*list(inspect.signature(run).parameters)[1:], "batch_size"]
    if "wish" in known:
        known = [*(name for name in known if name != "wish"), *(each.name for each in fields(Wish))]
    for name in knobs.keys() - {*known}:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
        raise ConfigError(f"{task} has no knob {name!r}: nearest is {near!r}, of {', '.join(known)}")
