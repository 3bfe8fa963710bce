"""Texts that a model writes: what goes on from a prompt, or what becomes of a text."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lm_jax import hub
from lm_jax.errors import ConfigError
from lm_jax.hub.folder import read_json
from lm_jax.inference import beam, text
from lm_jax.inference import load as speakers
from lm_jax.inference.load import Speaker
from lm_jax.inference.sampler import Sampler
from lm_jax.pipelines.reader import ROWS, UNLIMITED, several
from lm_jax.pipelines.wish import Wish, draws, of_folder, strings

LENGTH = 256  # new tokens, where nobody says how many
BEAMS = 4  # side by side in a search for what becomes of a text, where nobody says; as in transformers
KEYS = {"summarization": "summary_text", "translation": "translation_text"}


@dataclass(frozen=True)
class Author:
    """A model that writes, and what its folder says of how it should; a run's says nothing."""

    speaker: Speaker
    task: str
    folder: Wish  # what generation_config.json, and config.json for this task, say
    prefix: str  # and what they put before each text
    limit: int | None  # tokens of a source that it was made for
    say: Callable
    rows: int = ROWS  # prompts of a batch at most

    @property
    def model(self):
        return self.speaker.model


def load(path, *, task: str, say=print) -> Author:
    """The model of a folder, of a run, or of a name in the local hub, for a task."""
    speaker = speakers.load(hub.path(path), say=say)
    wish, prefix = of_folder(speaker.model, task=task, say=say)
    origin = getattr(speaker.model, "origin", None)
    limit = origin and read_json(Path(origin) / "tokenizer_config.json").get("model_max_length") or UNLIMITED
    return Author(speaker, task, wish, prefix, limit if limit < UNLIMITED else None, say)


def go_on(by: Author, inputs, *, return_full_text: bool = True, **wish):
    """[{"generated_text"}] of a prompt, or of a conversation [{"role", "content"}]; of a list of them a list for each.

    With `return_full_text` the prompt is a part of it. `wish` is a `Wish`.
    """
    single = isinstance(inputs, str) or _conversation(inputs)
    prompts = [inputs] if single else list(inputs) if isinstance(inputs, Iterable) else several(inputs, "prompt")[0]
    talks = [i for i, one in enumerate(prompts) if _conversation(one)]
    several([one for i, one in enumerate(prompts) if i not in talks], "prompt")
    template, told = by.speaker.template, _told(by, Wish(**wish), beams=1)
    ids = [template.ids(one) if i in talks else one for i, one in enumerate(prompts)]
    told["stop_strings"] = (*strings(told.get("stop_strings")), *(template.stops if talks else ()))
    found = [[{"generated_text": _joined(prompt, new) if return_full_text else new} for new in texts]
             for prompt, texts in zip(prompts, _written(by, ids, told))]
    return found[0] if single else found


def rewrite(by: Author, inputs, *, prefix: str | None = None, truncation: bool = False, **wish):
    """[{"generated_text"}] ("summary_text", "translation_text") of a text, or of each in a list.

    `prefix` goes before each text: config.json's own for this task where it names one. A text longer than the model was
    made for is read whole, or with `truncation` its beginning; both are said. `wish` is a `Wish`.
    """
    texts, single = several(inputs)
    prefix = by.prefix if prefix is None else prefix
    if by.task == "translation" and not prefix:
        by.say("translation: between which languages? The task translation_en_to_de says it, or prefix=..")
    rows = _sources(by, [prefix + one for one in texts], truncation=truncation)
    key = KEYS.get(by.task.split("_")[0], "generated_text")
    told = _told(by, Wish(**wish), beams=BEAMS)
    found = [[{key: new} for new in texts] for texts in _written(by, rows, told)]
    alone = all(len(texts) == 1 for texts in found)
    return found[0] if single else [texts[0] for texts in found] if alone else found


def _told(by: Author, wish: Wish, *, beams: int) -> dict:
    """What a call and its model's folder ask for, with a search by so many beams where neither says."""
    told = wish.told(by.folder)
    told.setdefault("num_beams", 1 if told.get("do_sample") else beams)
    punished = told.get("repetition_penalty", 1.0)
    if punished != 1 and told["num_beams"] > 1 and wish.repetition_penalty is None and wish.num_beams is None:
        by.say(f"the model's folder asks for repetition_penalty={punished}, which a search does not know: one beam")
        told["num_beams"] = 1
    return told


def _written(by: Author, prompts: list, told: dict) -> list[list[str]]:
    """For each prompt so many texts."""
    beams, count = told["num_beams"], told.get("num_return_sequences", 1)
    drawn = told.get("do_sample", False)
    if drawn and beams > 1:
        raise ConfigError(f"do_sample=True with num_beams={beams}: a search draws nothing; pass do_sample=False "
                          "or num_beams=1")
    punished = told.get("repetition_penalty", 1.0) != 1
    if beams > 1 and punished:
        raise ConfigError(f"repetition_penalty={told['repetition_penalty']} with num_beams={beams}: a search knows no "
                          "penalties; pass num_beams=1")
    if count > (beams if not drawn else count):
        raise ConfigError(f"num_return_sequences={count} of the likeliest alone: pass do_sample=True, or "
                          f"num_beams={count}")
    lasting = told.get("min_new_tokens", 0) or told.get("min_length", 0)
    if lasting and (drawn or punished):
        by.say(f"at least {lasting} tokens: not followed where tokens are drawn or repeated ones made rarer")
    elif lasting and beams == 1:  # the likeliest each time is a search by one beam that ends with it
        told = told | {"early_stopping": True}
    searched = beams > 1 or lasting and not (drawn or punished)
    stop, found = strings(told.get("stop_strings")), []
    for at in range(0, len(prompts), by.rows):
        some = prompts[at:at + by.rows]
        length = _length(by, some, told)
        if searched:
            found += _searched(by.speaker, some, told, count=count, length=length, stop=stop, say=by.say)
            continue
        sampler = Sampler(**({} if drawn else {"temperature": 0.0}) | draws(told))
        every = [one for one in some for _ in range(count)]
        seeds = [told["seed"] + at * count + i for i in range(len(every))]
        written = text.answers(by.speaker, every, sampler, length=length, seed=seeds, stop=stop, say=by.say)
        found += [[one.text for one in written[i:i + count]] for i in range(0, len(every), count)]
    return found


def _searched(by: Speaker, prompts, told: dict, *, count: int, length: int, stop, say):
    """The `count` best texts that a search with beams finds."""
    batch = text.prompted(by, prompts, length=length, say=say)
    least = told.get("min_new_tokens", max(0, told.get("min_length", 0) - _begun(by, prompts)))
    found = beam.search(by.model, batch, beams=told["num_beams"], length=length, stop=by.stops,
                        length_penalty=told.get("length_penalty", 1.0), vocab=by.vocab, least=least,
                        early=told.get("early_stopping") is True,
                        no_repeat_ngram_size=told.get("no_repeat_ngram_size", 0))
    ranks = [text.read(by, prompts, *(np.asarray(a_BW[:, i]) for a_BW in found[:3]), length=length, stop=stop)
             for i in range(count)]
    return [[answers[i].text for answers in ranks] for i in range(len(prompts))]


def _length(by: Author, prompts, told: dict) -> int:
    """New tokens at most."""
    if "max_new_tokens" in told:
        return told["max_new_tokens"]
    begun, cfg = _begun(by.speaker, prompts), by.model.cfg
    if "max_length" not in told:  # nobody says: as many as there is room for
        return max(1, min(LENGTH, cfg.max_length + 1 - begun)) if cfg.positions == "learned" else LENGTH
    if begun >= told["max_length"]:
        raise ConfigError(f"a prompt of {begun} tokens and max_length={told['max_length']}, which counts it: raise it, "
                          "or pass max_new_tokens")
    return told["max_length"] - begun


def _begun(by: Speaker, prompts) -> int:
    """Tokens of the longest prompt; an encoder-decoder's is one to start with."""
    return 1 if by.model.cfg.encoder_depth else max(
        len(by.ids(one) if isinstance(one, str) else one) for one in prompts)


def _sources(by: Author, texts, *, truncation: bool) -> list:
    """Ids that an encoder reads."""
    speaker, limit = by.speaker, by.limit or UNLIMITED
    rows = [speaker.ids(one) for one in texts]
    if long := [i for i, row in enumerate(rows) if len(row) > limit]:
        done = "only their beginnings are read" if truncation else "read whole; truncation=True cuts them"
        by.say(f"{len(long)} of {len(rows)} texts, such as number {long[0]}, pass the {limit} tokens that this model "
               f"was made for: {done}")
    keep = limit - len(speaker.after)
    return [[*row[:keep], *speaker.after] if truncation and len(row) > limit else row for row in rows]


def _conversation(prompt) -> bool:
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict)


def _joined(prompt, new: str):
    return prompt + new if isinstance(prompt, str) else [*prompt, {"role": "assistant", "content": new}]
