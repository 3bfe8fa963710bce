"""What a model puts in the place of a mask, and what it makes of each token."""

import jax
import numpy as np

from lm_jax.errors import ConfigError
from lm_jax.pipelines.reader import ROWS, Reader, hidden, several, softmax, whole


def fill(by: Reader, inputs, *, top_k: int = 5, targets=None, truncation: bool = True):
    """[{"score", "token", "token_str", "sequence"}], likeliest first, of a text with a mask; of one with several
    masks a list for each; of a list of texts a list for each. `targets` are the only words that may be put there.
    """
    mask = by.frame.special("mask_token")
    if mask is None:
        raise ConfigError("fill-mask needs a token that stands for what is missing, and this tokenizer has none: name "
                          "it as mask_token in tokenizer_config.json, or take a model with one")
    whole(top_k=top_k)
    texts, single = several(inputs)
    rows = by.beginnings(texts, truncation=truncation)
    for i, row in enumerate(rows):
        if mask not in row.ids:
            raise ConfigError(f"text {i} has no {by.tokenizer.piece(mask)} in what is read of it: {texts[i][:60]!r}; "
                              "write one where a word is missing")
    allowed = _allowed(by, [targets] if isinstance(targets, str) else targets)
    found = []
    for row, hidden_TD in zip(rows, by.look(rows, hidden)):
        at = [i for i, id in enumerate(row.ids) if id == mask]
        scores_AV = softmax(_logits(by, hidden_TD[at]))[:, allowed]
        single_mask = len(at) == 1
        guesses = [[_guess(by, row, i, int(allowed[best]), float(scores_V[best]),
                           specials="drop" if single_mask else "keep") for best in np.argsort(-scores_V)[:top_k]]
                   for i, scores_V in zip(at, scores_AV)]
        found.append(guesses[0] if single_mask else guesses)
    return found[0] if single else found


def features(by: Reader, inputs, *, pooling: str = "none", truncation: bool = True):
    """Hidden states as nested lists: [1, T, D] of a text, special tokens included, or [D] with `pooling`: "mean" of all
    tokens, or "cls", the first. Of a list of texts one for each."""
    if pooling not in POOLINGS:
        raise ConfigError(f"pooling={pooling!r} is not known, of {', '.join(POOLINGS)}")
    texts, single = several(inputs)
    rows = by.beginnings(texts, truncation=truncation)
    found = [POOLINGS[pooling](x_TD).tolist() for x_TD in by.look(rows, hidden)]
    return found[0] if single else found


POOLINGS = {"none": lambda x_TD: x_TD[None], "mean": lambda x_TD: x_TD.mean(0), "cls": lambda x_TD: x_TD[0]}


def _allowed(by: Reader, targets) -> np.ndarray:
    """Ids that may be put in; a target that is no token gives its first, which is said."""
    if targets is None:
        return np.arange(min(by.frame.vocab, by.model.cfg.vocab))  # the rest of the table is padding
    ids = []
    for word in several(targets, "target")[0]:
        id = by.tokenizer.id(word)
        if id is None:
            row = by.frame.windows([word], limit=None)[0][0]
            inner = [id for id, of in zip(row.ids, row.texts) if of is not None]
            if not inner:
                raise ConfigError(f"target {word!r} gives no token: leave it out")
            id = inner[0]
            by.say(f"target {word!r} is no token of this model: {by.tokenizer.piece(id)!r} is taken")
        ids.append(id)
    if not ids:
        raise ConfigError("targets=[] leaves nothing to put in: name a word, or pass no targets")
    return np.array(sorted(set(ids)))


def _guess(by: Reader, row, at: int, id: int, score: float, *, specials: str) -> dict:
    ids = [*row.ids[:at], id, *row.ids[at + 1:]]
    return {"score": score, "token": id, "token_str": by.tokenizer.decode([id], specials="keep"),
            "sequence": by.tokenizer.decode(ids, specials=specials)}


def _logits(by: Reader, hidden_AD) -> np.ndarray:
    """Of so many tokens, ROWS at a time: those of all tokens of long texts would fill the memory."""
    parts = [hidden_AD[i:i + ROWS] for i in range(0, len(hidden_AD), ROWS)]
    wide = [np.pad(part, ((0, 2 ** (len(part) - 1).bit_length() - len(part)), (0, 0))) for part in parts]
    with jax.default_matmul_precision("highest"):
        logits = [np.asarray(_unembedded(by.model, x_AD[:, None]), np.float32)[:len(part), 0]
                  for x_AD, part in zip(wide, parts)]
    return np.concatenate(logits)


_unembedded = jax.jit(lambda model, x_B1D: model.logits(x_B1D.astype(model.cfg.dtype)))
