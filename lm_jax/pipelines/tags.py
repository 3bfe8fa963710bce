"""Labels of tokens, of words, and of the names that are made of them."""

from itertools import groupby

import numpy as np

from lm_jax.errors import ConfigError
from lm_jax.pipelines.reader import Reader, scores, several, softmax, whole


def tag(by: Reader, inputs, *, aggregation_strategy: str = "none", ignore_labels=("O",), stride: int | None = None):
    """Of a text, or of each in a list, [{"entity", "score", "index", "word", "start", "end"}], a token each, or, by
    another `aggregation_strategy`, [{"entity_group", "score", "word", "start", "end"}], neighbours together.

    "simple" joins tokens of one label (a B- begins anew), "first", "average" and "max" first make a word's tokens
    agree. What is longer than the model can read is read in windows that share `stride` tokens (default: a quarter).
    """
    if aggregation_strategy not in STRATEGIES:
        raise ConfigError(f"aggregation_strategy={aggregation_strategy!r} is not known, of {', '.join(STRATEGIES)}")
    texts, single = several(inputs)
    overlap = (by.limit or 0) // 4 if stride is None else whole(least=0, stride=stride)
    windows = by.windows(texts, limit=by.limit, overlap=overlap)
    looked = iter(by.look([row for rows in windows for row in rows], scores))
    found = []
    for text, rows in zip(texts, windows):
        at, every = 0, []
        for row in rows:
            tokens = _tokens(by, text, row, softmax(next(looked)), at)
            at += len(tokens) - overlap
            every += [one for one in STRATEGIES[aggregation_strategy](by, tokens)
                      if one.get("entity", one.get("entity_group")) not in ignore_labels]
        found.append(_clearest(every) if len(rows) > 1 else every)
    return found[0] if single else found


def _tokens(by: Reader, text: str, row, scores_TC, at: int) -> list[dict]:
    """What tokens of a text are, without those of the frame; `at` is the number of the first in the whole text."""
    found, unknown = [], by.frame.special("unk_token")
    for i in (i for i, of in enumerate(row.texts) if of is not None):
        start, end = row.spans[i]
        word = by.tokenizer.piece(row.ids[i])
        if by.tokenizer.whole_words:  # a piece inside a word is written longer than what it stands for
            inside = len(word) != end - start
        else:
            inside = start > 0 and " " not in text[start - 1:start + 1]
        if row.ids[i] == unknown:
            word, inside = text[start:end], False
        found.append({"scores_C": scores_TC[i], "index": at + i, "word": word, "start": start, "end": end,
                      "inside": inside})
    return found


def _each(by: Reader, tokens: list[dict]) -> list[dict]:
    """Tokens by themselves."""
    return [_entity(by, one["scores_C"], **{key: one[key] for key in ("index", "word", "start", "end")})
            for one in tokens]


def _words(scores_of_word):
    """Words by themselves: `scores_of_word` makes one row of scores of those of its tokens."""
    def agreed(by, tokens):
        number = np.cumsum([not one["inside"] for one in tokens])
        words = [[one for _, one in run] for _, run in groupby(zip(number, tokens), key=lambda pair: pair[0])]
        return _grouped(by, [
            _entity(by, scores_of_word(np.stack([one["scores_C"] for one in word])), start=word[0]["start"],
                    word=by.tokenizer.joined([one["word"] for one in word]), end=word[-1]["end"]) for word in words])

    return agreed


def _grouped(by: Reader, entities: list[dict]) -> list[dict]:
    """Neighbours of one label together, but for one that begins anew."""
    groups = []
    for one in entities:
        begins, label = one["entity"].startswith("B-"), _plain(one["entity"])
        if groups and not begins and label == _plain(groups[-1][-1]["entity"]):
            groups[-1].append(one)
        else:
            groups.append([one])
    return [{"entity_group": group[0]["entity"].split("-", 1)[-1], "start": group[0]["start"], "end": group[-1]["end"],
             "score": float(np.mean([one["score"] for one in group])),
             "word": by.tokenizer.joined([one["word"] for one in group])} for group in groups]


STRATEGIES = {
    "none": _each,
    "simple": lambda by, tokens: _grouped(by, _each(by, tokens)),
    "first": _words(lambda scores_TC: scores_TC[0]),
    "average": _words(lambda scores_TC: scores_TC.mean(0)),
    "max": _words(lambda scores_TC: scores_TC[scores_TC.max(1).argmax()]),
}


def _entity(by, scores_C, **where) -> dict:
    return {"entity": by.labels[scores_C.argmax()], "score": float(scores_C.max())} | where


def _plain(label: str) -> str:
    return label[2:] if label.startswith(("B-", "I-")) else label


def _clearest(entities: list[dict]) -> list[dict]:
    """Of those that windows share the longest, of equally long ones the surest."""
    kept = []
    for one in sorted(entities, key=lambda one: one["start"]):
        if not kept or one["start"] >= kept[-1]["end"]:
            kept.append(one)
        elif _weight(one) > _weight(kept[-1]):
            kept[-1] = one
    return kept


def _weight(one) -> tuple:
    return one["end"] - one["start"], one["score"]
