"""A model to speak with: out of a run's folder, be it still training, or a folder as transformers saves it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
from flax import nnx

from lm_jax import config, hub, parallel
from lm_jax.checkpoint import Checkpoints, NoCheckpointError
from lm_jax.data import build
from lm_jax.data import tokenizer as tokenizers
from lm_jax.errors import ConfigError, DataError
from lm_jax.hub import frame as frames
from lm_jax.hub.folder import read_json
from lm_jax.inference.chat import Template
from lm_jax.inference.generate import ready
from lm_jax.models.transformer import Transformer
from lm_jax.workdir import Workdir

TRIES = 3  # at a checkpoint that a trainer may replace while it is read


@dataclass(frozen=True)
class Speaker:
    """A model with its tokenizer, and what text needs to become a prompt of it."""

    model: Transformer  # as it decodes best here
    tokenizer: tokenizers.Tokenizer
    encode: Callable[[str], Sequence[int]]  # a text's own ids; in a folder's a text may spell special tokens
    before: tuple[int, ...]  # ids that begin a text
    after: tuple[int, ...]  # and those that end it
    start: int  # what a decoder that has an encoder begins with
    stops: tuple[int, ...]
    template: Template
    said: str  # what was loaded, for people
    vocab: int  # only ids below are drawn: those that its tokenizer has; the rest of the model's table is padding

    def ids(self, text: str) -> list[int]:
        """What a model of this kind reads of a text."""
        return [*self.before, *map(int, self.encode(text)), *self.after]


def load(path, *, say=print) -> Speaker:
    """The model of a folder, or of a name in the local hub, on the mesh in use: of a run its newest intact checkpoint,
    with the average of its weights where one is kept. On CPUs it computes in float32, faster there and no less exact.

    ConfigError names what is missing; of a run that has saved nothing yet, when it will.
    """
    folder = Path(path)
    record = read_json(folder / "config.json") if folder.is_dir() else {}
    if "train" in record:
        return _of_run(folder, config.from_dict(record), say)
    return _of_folder(hub.path(path), say)


def run(folder: Path, c: config.Config, *, say=print):
    """(step, model, tokenizer) of a run: its newest intact checkpoint, as `load` takes it."""
    tokenizer = _run_tokenizer(folder, c)
    if c.model.vocab and c.model.vocab < tokenizer.vocab:
        raise ConfigError(f"{folder} has a model of {c.model.vocab} tokens and a tokenizer of {tokenizer.vocab}: its "
                          "data are another run's; bring back those that it was trained on")
    cfg = replace(c.model, vocab=c.model.vocab or tokenizer.vocab)
    cfg = replace(cfg, dtype="float32") if parallel.on_cpu() else cfg
    return *_newest(folder, c, cfg, say), tokenizer


def _of_run(folder: Path, c: config.Config, say) -> Speaker:
    step, model, tokenizer = run(folder, c, say=say)
    cfg = model.cfg
    before = () if cfg.encoder_depth else (tokenizer.bos,)
    before = tokenizer.modes[-1:] if c.data.objective == "ul2" else before  # the denoiser that goes on with a text
    after = (tokenizer.eos,) if cfg.encoder_depth else ()
    stops = tokenizer.eos, tokenizer.chat["end"]
    return Speaker(ready(model), tokenizer, tokenizer.encode, before, after, tokenizer.pad, stops,
                   Template.of_roles(tokenizer), f"{folder}, step {step:,} of {c.train.steps:,}", tokenizer.vocab)


def _newest(folder: Path, c: config.Config, cfg, say):
    """(step, model) of the newest intact checkpoint."""
    blank = jax.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(blank)
    params = nnx.to_pure_dict(state)
    like = {"opt": {"ema": params}} if c.optim.ema else {"params": params}
    for last in (False,) * (TRIES - 1) + (True,):
        try:
            found = Checkpoints(folder / "checkpoints", say=say).restore(like, partial=True)
            break
        except (FileNotFoundError, NoCheckpointError):  # a trainer has put a newer one in its place, or none is whole
            if last:
                raise
            time.sleep(1)
    if found is None:
        raise ConfigError(f"{folder} has no checkpoint yet: a run saves its first after train.checkpoint_every="
                          f"{c.train.checkpoint_every} steps, or when it is stopped")
    step, tree, _ = found
    nnx.replace_by_pure_dict(state, tree["opt"]["ema"] if c.optim.ema else tree["params"])
    return step, nnx.merge(graph, state)


def _run_tokenizer(folder: Path, c: config.Config):
    """The tokenizer of the store that a run's manifest names."""
    manifest = Workdir(folder, writes=False).read_json("manifest.json")
    if manifest is None:
        raise ConfigError(f"{folder} has no manifest.json: is it a run that prepares its data still? Try again later")
    place = Path(manifest["data"]) / build.tokenizer_name(c.data)
    if not place.is_dir():
        raise ConfigError(f"{folder} was trained on {manifest['data']}, whose tokenizer is not there: bring it back, "
                          "or call this where data.root leads to it")
    tokenizer = tokenizers.load(str(place))
    if tokenizer.digest != manifest["tokenizer"]:
        raise ConfigError(f"the tokenizer in {place} is {tokenizer.digest} and the run's is {manifest['tokenizer']}: "
                          "bring back the data that it was trained on")
    return tokenizer


def _of_folder(folder: Path, say) -> Speaker:
    kinds = {"dtype": "float32", "weights": "float32"} if parallel.on_cpu() else {}
    model = hub.load(folder, say=say, **kinds)
    frame = frames.of_folder(folder)
    tokenizer = frame.tokenizer
    stops = _told(folder, "eos_token_id", tokenizer.eos, tokenizer)
    start = _told(folder, "decoder_start_token_id", tokenizer.pad, tokenizer)
    if model.cfg.encoder_depth and not start:
        raise ConfigError(f"{folder} does not say what its decoder begins with: put decoder_start_token_id into its "
                          "config.json")
    template = Template.of_folder(folder, frame.settings, tokenizer)
    vocab = min(max([frame.vocab, *(1 + id for id in stops)]), model.cfg.vocab)
    return Speaker(ready(model), tokenizer, frame.encode, frame.before, frame.after, (*start, 0)[0], stops, template,
                   str(folder), vocab)


def _told(folder: Path, key: str, default: int, tokenizer) -> tuple[int, ...]:
    """The ids, or the one, of a key in generation_config.json or else in config.json; without it the tokenizer's, where
    its file has one."""
    told = (read_json(folder / "config.json") | read_json(folder / "generation_config.json")).get(key)
    if told is None:
        return _in_file(tokenizer, default)
    ids = told if isinstance(told, list) else [told]
    if not ids or not all(type(i) is int and i >= 0 for i in ids):
        raise DataError(f"{folder}: {key}={told!r} in generation_config.json or config.json: an id is wanted, or a "
                        "list of them")
    return tuple(ids)


def _in_file(tokenizer, *ids: int) -> tuple[int, ...]:
    """Those of some specials that the tokenizer's file has; a model from elsewhere knows no others."""
    return tuple(id for id in ids if id < tokenizer.own)
