"""Pretraining: a store of packed text, one of the objectives made from it, and the one cross-entropy."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial

import jax
import numpy as np

from lm_jax import hosts, losses, parallel, signals, trainer, update
from lm_jax.batch import Loss
from lm_jax.config import Config, ConfigError
from lm_jax.data import examples, tokenizer
from lm_jax.data.loader import Loader, validation
from lm_jax.data.store import Store
from lm_jax.models import flops, kernels, transformer
from lm_jax.trainer import Every, Recipe

AT_ONCE = 2**20  # pairs of tokens in a batch of an evaluation whose rows are few and short
SUMS = jax.jit(losses.row_sums)  # one for all, so that runs of one shape are one program
NAMES = {"D": "width", "F": "hidden units", "N": "query heads", "K": "key heads", "V": "ids", "E": "experts",
         "T": "tokens of a row"}


@dataclass(frozen=True)
class Pretraining:
    """Everything pretraining makes of a config and a store; `recipe()` is what the Trainer wants."""

    config: Config
    store: Store

    @cached_property
    def model_config(self):
        """The model's config with the tokenizer's vocabulary filled in."""
        return sized(self.config, self.store.tokenizer.vocab)

    @cached_property
    def loader(self) -> Loader:
        t = self.config.train
        return Loader(self.store, self.config.data, batch=t.batch, seed=self.config.seed, rows_needed=t.batch * t.steps)

    def model(self) -> transformer.Transformer:
        """A new model, the same for every mesh."""
        return transformer.make(self.model_config, seed=self.config.seed)

    def recipe(self, hooks: tuple[Every, ...] = ()) -> Recipe:
        c, (tokens, source) = self.config, row_lengths(self.config)
        parallel.rows_divide(c.train.batch, c.train.microbatches)
        return Recipe(
            loss=loss(c),
            batches=partial(self.loader.stream, here=hosts.rows_here(c.train.batch)),
            tokens=c.train.batch * (tokens + source),
            flops=c.train.batch * flops.train(self.model_config, tokens, source),
            data=self.store.digest,
            hooks=hooks,
            derived=self._derived)

    def _derived(self, row: dict) -> dict:
        """Bits per byte of a causal step, by the mean length of a token; other objectives compress no text."""
        if self.config.data.objective != "causal":
            return {}
        return {"bits_per_byte": row["loss"] / math.log(2) / self.bytes_per_token}

    @cached_property
    def rows_available(self) -> int:
        """Rows in one pass over all sources."""
        return sum(s["rows"] for s in self.store.manifest["splits"]["train"].values())

    @cached_property
    def bytes_per_token(self) -> float:
        """Bytes of training text a predicted token stands for."""
        splits = self.store.manifest["splits"]["train"].values()
        return sum(s["bytes"] for s in splits) / sum(s["tokens"] for s in splits)


def loss(c: Config) -> Loss:
    """What pretraining minimises, whatever the objective: it is made from data."""
    return partial(losses.next_token, z_loss=c.train.z_loss, smoothing=c.train.smoothing)


class Evaluation:
    """Losses on the fixed validation rows of each source, with standard errors over rows.

    Called with a model and the most rows a source (0: all) it gives {tag: values}: val_loss (nats per predicted token),
    val_loss_stderr, val_bits_per_byte, val_accuracy, val_tokens; of next sentences val_pair_loss and val_pair_accuracy;
    and, where a causal source knows it, true_loss and excess_loss. "all" pools several sources. Raises signals.Halt
    where a loop that it is part of is to stop.
    """

    def __init__(self, pretraining: Pretraining, *, beat: Callable[[], None] = lambda: None):
        """`beat` is called after each batch, for whoever waits for a sign of life."""
        self.store, self.config, self.beat = pretraining.store, pretraining.config, beat

    def __call__(self, model, rows: int) -> dict[str, dict]:
        sums = {tag: self._sum(model, tag, rows) for tag in self.store.tags}
        results = {tag: _result(s) | self._truth(tag, s) for tag, s in sums.items()}
        return results if len(sums) == 1 else results | {"all": _result(_total(sums.values()))}

    def _sum(self, model, tag, rows):
        most = self.config.train.batch // self.config.train.microbatches  # what is known to fit; and more if it is tiny
        most *= max(1, AT_ONCE // (most * self.config.data.length**2))
        here = hosts.rows_here(most)
        lengths = self.store.tokenizer.byte_lengths
        batches = ({**batch, "bytes": lengths[batch["targets"]].astype(np.float32)}
                   for batch in validation(self.store, self.config.data, tag, batch=most, rows=rows, here=here))
        # one program at a time: on CPU devices many at once wait for each other's threads and may never end
        sums = []
        for batch in batches:
            sums.append(jax.device_get(SUMS(model, hosts.put_batch(batch, most))))
            self.beat()
            signals.check()
        return _total({key: float(value) for key, value in one.items()} for one in sums)

    def _truth(self, tag, sums):
        """A perfect model's mean loss on the validation documents, if the source knows it and rows hold them whole."""
        split = self.store.manifest["splits"]["validation"][tag]
        data, each = self.config.data, split["tokens"] / split["docs"]
        whole = each == data.length or (data.strategy == "fit" and each <= data.length)
        if split["nats"] is None or data.objective != "causal" or not whole:
            return {}
        truth = split["nats"] / split["tokens"]
        return {"true_loss": truth, "excess_loss": sums["nll"] / sums["weight"] - truth}


def evaluate_every(config: Config, evaluation: Evaluation) -> Every:
    """The hook that evaluates within a run; the evaluation at its end takes all rows and is the caller's."""

    def do(run: trainer.Trainer):
        if run.done < config.train.steps:
            with run.clock.phase("evaluation"):
                record(run, evaluation(update.evaluated(run.state), config.train.eval_rows))

    return Every(config.train.eval_every, do)


def record(run: trainer.Trainer, results: dict[str, dict]):
    """Write an evaluation's results, a row of metrics.jsonl a tag."""
    for tag, values in results.items():
        run.log.evaluation(run.done, tag, {"tokens": run.done * run.recipe.tokens} | values)


def sized(config: Config, vocab: int):
    """The model's config with a vocabulary: the tokenizer's, or the config's if that is larger."""
    model = config.model
    if model.vocab and model.vocab < vocab:
        raise ConfigError(f"model.vocab={model.vocab} is smaller than the tokenizer's {vocab}: set it to {vocab} or 0")
    return replace(model, vocab=model.vocab or vocab)


def planned(config: Config) -> Config:
    """The config with its model's vocabulary filled in before any text is read: a trained tokenizer will have what
    data.vocab says, one in a file has its own, and where the file is not here the config must say."""
    data, model = config.data, config.model
    if data.tokenizer in tokenizer.TRAINED:
        return replace(config, model=sized(config, data.vocab))
    if data.tokenizer == "byte" or os.path.isfile(data.tokenizer):
        return replace(config, model=sized(config, tokenizer.make(data.tokenizer, (), vocab=0).vocab))
    if not model.vocab:
        raise ConfigError(f"data.tokenizer={data.tokenizer!r} is no file here, so that its vocabulary is not known: "
                          "bring it here, or set model.vocab")
    return config


def replicated(config: Config) -> list[str]:
    """What does not divide its axis of the mesh in use, so that devices along it hold or do the same, for people:
    `K (8 key heads) over model 16`. The model's vocabulary must be known."""
    sizes = [(w.kind.letters, w.shape) for w in flops.weights(config.model) if w.kind.role != "vector"]
    sizes += [("T", (length,)) for length in row_lengths(config) if length]
    found = {one for letters, shape in sizes for one in parallel.undivided(letters, shape)}
    return [f"{a} ({n} {NAMES[a]}) over {axis} {parallel.devices_along((axis,))}" for a, n, axis in sorted(found)]


def row_lengths(config: Config) -> tuple[int, int]:
    """Tokens of a row of the only stack or the decoder, and of the encoder."""
    if config.model.encoder_depth:
        return examples.target_length(config.data), config.data.length
    return config.data.length, 0


def attention(config: Config) -> str:
    """The kernels that attention takes, on this mesh; ConfigError if the one named cannot do what is asked."""
    return kernels.chosen(config.model, *row_lengths(config), prefix=config.data.objective == "prefix")


def _total(sums) -> dict[str, float]:
    total: dict[str, float] = {}
    for one in sums:
        for key, value in one.items():
            total[key] = total.get(key, 0.0) + value
    return total


def _result(s) -> dict[str, float]:
    """Means from sums; the standard error is that of a ratio of row totals (Cochran 1977, 6.4)."""
    loss, n = s["nll"] / s["weight"], s["rows"]
    residual = max(s["nll2"] - 2 * loss * s["nll_weight"] + loss**2 * s["weight2"], 0.0)
    stderr = math.sqrt(residual * n / (n - 1)) / s["weight"] if n > 1 else math.nan
    pairs = {}
    if s.get("pairs"):
        pairs = {"val_pair_loss": s["pair_nll"] / s["pairs"], "val_pair_accuracy": s["pair_right"] / s["pairs"]}
    bits = s["nll"] / math.log(2)
    return pairs | {"val_loss": loss, "val_loss_stderr": stderr, "val_bits_per_byte": bits / max(s["bytes"], 1),
            "val_accuracy": s["right"] / s["weight"], "val_tokens": int(s["weight"])}
