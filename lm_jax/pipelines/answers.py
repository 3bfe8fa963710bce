"""Answers to questions, found in a text."""

import numpy as np

from lm_jax.errors import ConfigError
from lm_jax.pipelines.reader import Reader, scores, several, softmax, whole

WINDOW, SHARED = 384, 128  # tokens that are read at once, and that neighbours share: what such models were trained on
OUT = -1e4  # the score of what cannot be in an answer


def answer(by: Reader, inputs=None, *, question=None, context=None, top_k: int = 1, max_answer_len: int = 15,
           max_seq_len: int | None = None, doc_stride: int | None = None, handle_impossible_answer: bool = False,
           align_to_words: bool = True):
    """{"score", "start", "end", "answer"}: which characters of `context` answer `question`; a list of the best with a
    `top_k` above 1; of lists of both, or of `inputs` [{"question", "context"}], one for each.

    A long context is read in windows of `max_seq_len` tokens that share `doc_stride`; what they agree on adds up.
    `max_answer_len` is in tokens; with `handle_impossible_answer` the answer may be empty.
    """
    whole(top_k=top_k)
    whole(max_answer_len=max_answer_len)
    pairs, single = _asked(inputs, question, context)
    asked = WINDOW if max_seq_len is None else whole(max_seq_len=max_seq_len)
    limit = min(asked, by.limit or asked)
    if max_seq_len is not None and limit < asked:
        by.say(f"max_seq_len={asked} passes the model's {limit} tokens: {limit} are read at once")
    overlap = min(limit // 2, SHARED) if doc_stride is None else whole(least=0, doc_stride=doc_stride)
    windows = by.windows(pairs, limit=limit, overlap=overlap, cut="only_second")
    looked = iter(by.look([row for rows in windows for row in rows], scores))
    found = []
    for (_, text), rows in zip(pairs, windows):
        answers, nothing = {}, 1.0
        for row in rows:
            spans, empty = _likeliest(by, row, next(looked), count=2 * top_k + 10 if align_to_words else top_k,
                                      longest=max_answer_len)
            nothing = min(nothing, empty)
            for first, last, score in spans:
                start, end = _characters(row, first, last, align=align_to_words)
                one = answers.setdefault(text[start:end].lower(), {
                    "score": 0.0, "start": start, "end": end, "answer": text[start:end]})
                one["score"] += score
        empty = [{"score": nothing, "start": 0, "end": 0, "answer": ""}] * handle_impossible_answer
        best = sorted([*answers.values(), *empty], key=lambda one: -one["score"])[:top_k]
        found.append(best[0] if len(best) == 1 else best)
    return found[0] if single else found


def _asked(inputs, question, context) -> tuple[list, bool]:
    """(question, context) pairs, and whether there was a single one."""
    if inputs is not None:
        several(inputs, "question with its context", kinds=(dict,))
        given = [inputs] if isinstance(inputs, dict) else list(inputs)
        if wrong := [one for one in given if not {"question", "context"} <= one.keys()]:
            raise ConfigError(f"a question with keys {sorted(wrong[0])}: pass {{'question': .., 'context': ..}}")
        questions, contexts = [one["question"] for one in given], [one["context"] for one in given]
        return list(zip(several(questions, "question")[0], several(contexts, "context")[0])), isinstance(inputs, dict)
    if question is None or context is None:
        raise ConfigError("a question is answered from a text: pass question=.. and context=..")
    (questions, single), (contexts, _) = several(question, "question"), several(context, "context")
    if not single and isinstance(context, str):
        contexts *= len(questions)  # several questions about one text
    if len(questions) != len(contexts):
        raise ConfigError(f"{len(questions)} questions and {len(contexts)} contexts: one context for all, or one each")
    return list(zip(questions, contexts)), single


def _likeliest(by: Reader, row, logits_T2, *, count: int, longest: int):
    """(first token, last token, score) of the likeliest answers in a window, and the score of there being none."""
    inside_T = np.array([of == 1 for of in row.texts])
    inside_T |= np.array(row.ids) == by.frame.special("cls_token")  # which models point at to say: no answer
    begin_T, end_T = softmax(np.where(inside_T, logits_T2.T, OUT))
    empty = float(begin_T[0] * end_T[0])
    begin_T[0] = end_T[0] = 0
    T = len(row)
    far_TS = np.arange(T) - np.arange(T)[:, None]
    scores_TS = np.where((far_TS >= 0) & (far_TS < longest), np.outer(begin_T, end_T), 0)
    order = np.argsort(-scores_TS, axis=None, kind="stable")[:count]
    spans = [(int(i), int(j)) for i, j in zip(*np.unravel_index(order, scores_TS.shape))]
    return [(i, j, float(scores_TS[i, j])) for i, j in spans if inside_T[i] and inside_T[j]], empty


def _characters(row, first: int, last: int, *, align: bool) -> tuple[int, int]:
    """Where an answer stands in its text; with `align`, up to the ends of words."""
    words = row.words[first], row.words[last]
    if not align or None in words:
        return row.spans[first][0], row.spans[last][1]
    spans = [[span for span, word, of in zip(row.spans, row.words, row.texts) if (word, of) == (each, 1)]
             for each in words]
    return spans[0][0][0], spans[1][-1][1]
