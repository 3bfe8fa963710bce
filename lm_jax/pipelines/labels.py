"""Labels of texts: those that a model was trained for, or any, by whether a model of inference says they follow."""

import numpy as np

from lm_jax.errors import ConfigError
from lm_jax.pipelines.reader import Reader, scores, several, softmax, whole


def classify(by: Reader, inputs, *, top_k: int | None = 0, function_to_apply: str | None = None,
             truncation: bool = True):
    """[{"label", "score"}] of a text, of {"text", "text_pair"}, or of each in a list.

    `top_k` gives a list a text: its k likeliest labels, None: all. `function_to_apply` makes scores of what the head
    gives: "softmax", "sigmoid", "none"; None is what config.json says, else softmax, of one label the sigmoid.
    """
    if top_k is not None:
        whole(least=0, top_k=top_k)
    texts, single = several(inputs, kinds=(str, dict))
    rows = by.beginnings([_pair(text) for text in texts], truncation=truncation)
    scores_BC = _function(by, function_to_apply)(np.array(by.look(rows, scores))[:, 0]) if rows else []
    named = by.labels
    ranked = [[{"label": named[i], "score": float(scores_C[i])} for i in np.argsort(-scores_C, kind="stable")]
              for scores_C in scores_BC]
    if top_k == 0:
        return [found[0] for found in ranked]
    return ranked[0][:top_k] if single else [found[:top_k] for found in ranked]


def zero_shot(by: Reader, inputs, candidate_labels, *, hypothesis_template: str = "This example is {}.",
              multi_label: bool = False, truncation: bool = True):
    """{"sequence", "labels", "scores"}, likeliest first, of a text or of each in a list.

    `candidate_labels` are a list, or a string with commas; each is put into the template, and the model says whether
    the text entails it. With `multi_label` each is likely or not by itself, else their scores add up to one.
    """
    texts, single = several(inputs)
    if isinstance(candidate_labels, str):
        labels = [label.strip() for label in candidate_labels.split(",") if label.strip()]
    else:
        labels = [label.strip() for label in several(candidate_labels, "label of candidate_labels")[0]]
    if not labels:
        raise ConfigError(f"candidate_labels={candidate_labels!r} names no label: pass a list of one or more")
    braces = "".join(one for one in str(hypothesis_template) if one in "{}")
    if not isinstance(hypothesis_template, str) or braces != "{}" or braces not in hypothesis_template:
        raise ConfigError(f"hypothesis_template={hypothesis_template!r}: write {{}} in it once, for the label")
    yes, no = _entailment(by)
    if not texts:
        return []
    pairs = [(text, hypothesis_template.format(label)) for text in texts for label in labels]
    rows = by.beginnings(pairs, truncation=truncation, cut="only_first")
    logits_BCE = np.reshape(by.look(rows, scores), (len(texts), len(labels), -1))
    if multi_label or len(labels) == 1:
        scores_BC = softmax(logits_BCE[..., [no, yes]])[..., 1]
    else:
        scores_BC = softmax(logits_BCE[..., yes])
    ranks = [scores_C.argsort()[::-1] for scores_C in scores_BC]
    found = [{"sequence": text, "labels": [labels[i] for i in rank], "scores": scores_C[rank].tolist()}
             for text, rank, scores_C in zip(texts, ranks, scores_BC)]
    return found[0] if single else found


def _pair(text):
    """A text, or two that are read together."""
    if isinstance(text, str):
        return text
    if text.keys() != {"text", "text_pair"}:
        raise ConfigError(f"a pair with keys {sorted(text)}: pass {{'text': .., 'text_pair': ..}}, or a text by itself")
    return tuple(several([text["text"], text["text_pair"]])[0])


def _function(by: Reader, named: str | None):
    kind = by.settings.get("problem_type")
    by_kind = {"regression": "none", "multi_label_classification": "sigmoid"}
    named = named or by_kind.get(kind) or ("sigmoid" if len(by.labels) == 1 else "softmax")
    if named not in FUNCTIONS:
        raise ConfigError(f"function_to_apply={named!r} is not known, of {', '.join(FUNCTIONS)}")
    return FUNCTIONS[named]


FUNCTIONS = {"softmax": softmax, "sigmoid": lambda x_BC: 1 / (1 + np.exp(-x_BC)), "none": lambda x_BC: x_BC}


def _entailment(by: Reader) -> tuple[int, int]:
    """Which label says that the second text follows from the first, and which that it does not."""
    yes = [i for i, label in enumerate(by.labels) if label.lower().startswith("entail")]
    if not yes or len(by.labels) < 2:
        raise ConfigError(f"zero-shot classification asks whether a label follows from a text, and of this model's "
                          f"labels {by.labels} none is called entailment: name it in config.json's id2label, or take a "
                          "model of natural-language inference")
    return yes[0], -1 if yes[0] == 0 else 0
