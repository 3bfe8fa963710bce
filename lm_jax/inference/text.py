"""Text in, text out: prompts in one batch, answers as they are written, never half a character."""

import dataclasses
import numbers
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax import hosts, hub
from lm_jax.batch import Batch
from lm_jax.errors import ConfigError
from lm_jax.inference.generate import advance, asked, begin
from lm_jax.inference.load import Speaker
from lm_jax.inference.sampler import Sampler
from lm_jax.models.positions import reach

EVERY = 4  # tokens between looks at what was written
WIDTH = 32  # prompts are padded to a multiple, or to a power of two of at least 256, so that few programs serve all
UNDECIDED = 3  # bytes of a character that may still be to come, each shown as U+FFFD until it is whole


@dataclass(frozen=True)
class Answer:
    """What a prompt was continued with. `ended` is "stop" or "length"; `logprobs` are the model's own, see `Generated`.
    `ids` go up to the one that completes a stop; `text` is without it."""

    text: str
    ids: list[int]
    logprobs: list[float]
    ended: str


def answers(speaker: Speaker, prompts: Sequence, sampler: Sampler | Sequence[Sampler] = Sampler(), **knobs
            ) -> list[Answer]:
    """The answers to all prompts, in their order; `knobs` are those of `stream`."""
    found = {row: answer for row, _, answer in stream(speaker, prompts, sampler, **knobs) if answer}
    return [found[row] for row in range(len(prompts))]


def stream(speaker: Speaker, prompts: Sequence, sampler: Sampler | Sequence[Sampler] = Sampler(), *, length: int = 128,
           seed: int | Sequence[int] = 0, stop: str | Sequence[str] = (), say: Callable = print
           ) -> Iterator[tuple[int, str, Answer | None]]:
    """(row, new text, None) as it is written and, when a row has ended, (row, the last of its text, its Answer).

    A prompt is a string, or ids that are taken as they are. `sampler` and `seed` are one a prompt, or one for all, of
    which prompt i takes the seed + i: what a prompt gets depends on its own and not on what shares its batch. An
    answer ends at one of the model's own stop tokens, before a string of `stop`, or after `length` tokens. `say` is
    told of prompts that may pass what the model was made for.
    """
    if not len(prompts):
        return
    batch = prompted(speaker, prompts, length=length, say=say)
    rules, stops_A = asked(speaker.model, batch, sampler, length=length, stop=speaker.stops, vocab=speaker.vocab)
    keys_B = seeded(seed, len(prompts))
    batch, knobs = hosts.put_batch(batch), dict(vocab=speaker.vocab)
    writers = _writers(speaker, prompts, stop, length)
    state, shot = _begin(speaker.model, batch, rules, keys_B, stops_A, length=length, **knobs)
    written = 1
    while any(writer.answer is None for writer in writers):
        ended_B, now = np.array([writer.answer is not None for writer in writers]), shot
        if written < length:  # begun before the last tokens are looked at
            written = min(written + EVERY, length)
            state, shot = _advance(speaker.model, state, rules, keys_B, stops_A, ended_B, written, **knobs)
        tokens_BT, lengths_B, logprobs_BT = jax.device_get(now)
        for row, writer in enumerate(writers):
            if writer.answer is None:
                yield row, writer.read(tokens_BT[row, :lengths_B[row]], logprobs_BT[row]), writer.answer


def read(speaker: Speaker, prompts: Sequence, tokens_BT, lengths_B, logprobs_BT, *, length: int,
         stop: str | Sequence[str] = ()) -> list[Answer]:
    """The answers that tokens are which something else has written, as `beam.search` does."""
    writers = _writers(speaker, prompts, stop, length)
    for writer, ids, count, logprobs in zip(writers, tokens_BT, lengths_B, logprobs_BT):
        writer.read(ids[:count], logprobs)
    return [writer.answer for writer in writers]


class Writer:
    """One answer: ids as they come, text as far as it is certain."""

    def __init__(self, speaker: Speaker, context, stop: list[str], length: int):
        self.speaker, self.stop, self.length = speaker, stop, length
        self.context = [int(id) for id in context][-8:]  # a piece may be spelt otherwise at a text's beginning
        self.base = len(speaker.tokenizer.decode(self.context))
        self.shown, self.seen, self.answer = 0, 0, None

    def read(self, ids, logprobs) -> str:
        """All `ids` of the answer so far; the text that they add for sure, `answer` being set when they end it."""
        own = len(ids) > 0 and int(ids[-1]) in self.speaker.stops
        text = self._decoded(ids[:-1] if own else ids)
        cut, count, ended = len(text), len(ids), own or len(ids) == self.length
        at = min((found for found in map(text.find, self.stop) if found >= 0), default=-1)
        if at >= 0:
            cut, own, ended = at, True, True
            count = next(n for n in range(self.seen, count + 1)
                         if any(word in self._decoded(ids[:n]) for word in self.stop))
        sure = text[:cut] if ended else text[:self._sure(text)]
        self.seen, new = len(ids), sure[self.shown:]
        self.shown = max(self.shown, len(sure))
        if ended:
            self.answer = Answer(sure, [int(id) for id in ids[:count]], [float(one) for one in logprobs[:count]],
                                 "stop" if own else "length")
        return new

    def _decoded(self, ids) -> str:
        return self.speaker.tokenizer.decode([*self.context, *ids])[self.base:]

    def _sure(self, text: str) -> int:
        """How much of a text that goes on no later token changes: not half a character, nor half a stop string."""
        end = len(text)
        while len(text) - end < UNDECIDED and text[:end].endswith("\ufffd"):
            end -= 1
        halves = (n for word in self.stop for n in range(1, len(word)) if text[:end].endswith(word[:n]))
        return end - max(halves, default=0)


def prompted(speaker: Speaker, prompts: Sequence, *, length: int, say=print) -> Batch:
    """The batch of some prompts, texts or ids, padded. One that with `length` new tokens passes what a rotary model was
    made for is said; learned positions refuse it, see `asked`."""
    cfg, rows = speaker.model.cfg, [_ids(speaker, one) for one in prompts]
    for text, ids in zip(prompts, rows):
        if not len(text) or not len(ids):
            begun = f"; ids {[*speaker.before]} in its place go on from nothing" if speaker.before else ""
            raise ConfigError(f"prompt {text!r} is empty: write a word{begun}")
    most, new = reach(cfg), 0 if cfg.encoder_depth else length - 1  # nobody reads the last token
    if cfg.positions == "rope" and (long := [i for i, ids in enumerate(rows) if len(ids) + new > most]):
        say(f"{len(long)} of {len(rows)} prompts, such as number {long[0]} of {len(rows[long[0]])} tokens with up to "
            f"{length} new ones, pass the {most} that this model was made for: it goes on, and may write badly there")
    batch = hub.batch(cfg, rows, width=_width(max(map(len, rows))))
    if cfg.encoder_depth:
        return hub.batch(cfg, [[speaker.start]] * len(rows)) | {"source": batch}
    return batch


def seeded(seed: int | Sequence[int], rows: int):
    """A key a prompt, of a seed each or one for all."""
    seeds = [int(seed) + row for row in range(rows)] if isinstance(seed, numbers.Integral) else list(seed)
    if len(seeds) != rows:
        raise ConfigError(f"{len(seeds)} seeds for {rows} prompts: one for all, or one a prompt")
    return jax.vmap(jax.random.key)(jnp.array([int(one) % 2**32 for one in seeds], jnp.uint32))


def _width(longest: int) -> int:
    """What rows are padded to a multiple of: of a conversation that grows few lengths are new, and each is a program.
    """
    return WIDTH if longest <= 256 else 1 << (longest - 1).bit_length()


def _writers(speaker, prompts, stop, length):
    alone = speaker.model.cfg.encoder_depth > 0
    stop = [word for word in ([stop] if isinstance(stop, str) else stop) if word]
    return [Writer(speaker, [] if alone else _ids(speaker, one), stop, length) for one in prompts]


def _ids(speaker: Speaker, prompt) -> Sequence[int]:
    """Those of a text with what stands around it; ids are taken as they are."""
    return speaker.ids(prompt) if isinstance(prompt, str) else prompt


@partial(jax.jit, static_argnames=("length", "vocab"))
def _begin(model, batch, rules, keys_B, stops_A, *, length, vocab):
    state = begin(model, batch, rules, keys_B, stops_A, length=length, vocab=vocab)
    return state, jax.tree.map(jnp.copy, state.made)


@partial(jax.jit, static_argnames=("vocab",), donate_argnums=1)
def _advance(model, state, rules, keys_B, stops_A, ended_B, until, *, vocab):
    """A state with more tokens, in the place of the one before, and a copy of what was made for the host to look at."""
    state = dataclasses.replace(state, done_B=state.done_B | ended_B)
    state = advance(model, state, rules, keys_B, stops_A, until=until, vocab=vocab)
    return state, jax.tree.map(jnp.copy, state.made)
