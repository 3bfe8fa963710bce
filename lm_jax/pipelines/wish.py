"""How a model that writes should: what a call wishes, and what the model's folder says where the call does not."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Real
from pathlib import Path

from lm_jax.errors import ConfigError, DataError
from lm_jax.hub.folder import read_json
from lm_jax.pipelines.reader import whole

LENGTHS = ("max_new_tokens", "max_length")  # who says one of them says what the other should be
DRAWS = ("temperature", "top_k", "top_p", "min_p")
AGAIN = ("repetition_penalty", "no_repeat_ngram_size")
LEAST = dict(max_new_tokens=1, max_length=1, min_new_tokens=0, min_length=0, top_k=0, num_beams=1,
             num_return_sequences=1, no_repeat_ngram_size=0)
NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "length_penalty", "seed")
IGNORED = {  # what asks for nothing, by name; null does everywhere
    "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "penalty_alpha": 0.0, "guidance_scale": 1.0,
    "num_beam_groups": 1, "diversity_penalty": 0.0, "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0, "exponential_decay_length_penalty": None, "sequence_bias": None,
    "bad_words_ids": None, "force_words_ids": None, "suppress_tokens": None, "begin_suppress_tokens": None,
    "forced_bos_token_id": None, "forced_eos_token_id": None}


@dataclass(frozen=True)
class Wish:
    """How to write, in the words of transformers. None is what the model's folder says; where it says nothing, up to
    256 tokens: from a prompt the likeliest each time, of a text by a search with 4 beams. With `do_sample` prompt i
    draws by the seed + i.

    Other than in transformers: where nobody says `do_sample` a prompt is gone on with by the likeliest (there text
    generation draws, at a temperature of 0.7, unless its folder says otherwise), a stop string is no part of the text,
    all tokens may be drawn where nobody says top_k (there 50), and a search without `early_stopping` goes on until
    nothing better can come ("never")."""

    max_new_tokens: int | None = None
    max_length: int | None = None  # of a decoder counts the prompt, the longest of a batch
    min_new_tokens: int | None = None  # before so many nothing ends
    min_length: int | None = None  # the same, counting as max_length does
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None  # so many tokens in a row never come a second time
    num_beams: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | str | None = None  # True: a search ends when num_beams texts have ended
    num_return_sequences: int | None = None
    stop_strings: str | Sequence[str] | None = None  # what is written ends before any of them
    seed: int = 0

    def __post_init__(self):
        for name, least in LEAST.items():
            if getattr(self, name) is not None:
                whole(least=least, **{name: getattr(self, name)})
        if self.do_sample not in (None, True, False):
            raise ConfigError(f"do_sample={self.do_sample!r}: pass True or False")
        for name in NUMBERS:
            number = getattr(self, name)
            if number is not None and (isinstance(number, bool) or not isinstance(number, Real)):
                raise ConfigError(f"{name}={number!r}: pass a number")
        if self.early_stopping not in (None, True, False, "never"):
            raise ConfigError(f"early_stopping={self.early_stopping!r}: pass True, False or 'never'")
        if not isinstance(self.stop_strings, Sequence | None):
            raise ConfigError(f"stop_strings={self.stop_strings!r}: pass a string, or a list of them")
        if wrong := [one for one in strings(self.stop_strings) if not isinstance(one, str)]:
            raise ConfigError(f"stop_strings has {wrong[0]!r}: pass a string, or a list of them")

    def told(self, folder: "Wish") -> dict:
        """The names that say something, here or in the model's folder."""
        here, there = ({name: value for name, value in vars(each).items() if value is not None}
                       for each in (self, folder))
        if not here.keys().isdisjoint(LENGTHS):
            there = {name: value for name, value in there.items() if name not in LENGTHS}
        return there | here


def of_folder(model, *, task: str, say=print) -> tuple[Wish, str]:
    """What generation_config.json, and config.json for this task, of the folder that a model is from say of how it
    writes, and what goes before each text; a run's says nothing. What is asked for in vain is said, what cannot be is
    a DataError."""
    origin = getattr(model, "origin", None)
    config, folder = (origin and read_json(Path(origin) / name) or {} for name in (
        "config.json", "generation_config.json"))
    folder |= (config.get("task_specific_params") or {}).get(task, {})
    if missed := [f"{name}={folder[name]}" for name, idle in IGNORED.items() if (folder.get(name) or idle) != idle]:
        say(f"{origin} asks for {', '.join(missed)}: not followed")
    try:
        asked = Wish(**{field.name: folder[field.name] for field in fields(Wish) if field.name in folder})
    except ConfigError as error:
        raise DataError(f"{origin}: generation_config.json, or config.json for {task}, has {error}") from error
    return asked, folder.get("prefix") or ""


def draws(told: dict) -> dict:
    """What is a `Sampler`'s of what is told: how to draw, where drawing is told, and what not to repeat."""
    names = (*(DRAWS if told.get("do_sample") else ()), *AGAIN)
    return {name: told[name] for name in names if name in told}


def strings(stop) -> tuple:
    """The strings of one, of several, or of none."""
    return (stop,) if isinstance(stop, str) else tuple(stop or ())
