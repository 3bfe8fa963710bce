"""Sizes by one dial, and how batch, learning rate and weight decay follow a run's size and data.

A base config holds hyperparameters that are right at its own size and number of tokens. `point` carries them to another
size by the rules of its parametrisation: under muP (`model.base_width`) rates stay what they are and the optimizer
scales each matrix's (CompleteP, Dey et al. 2025); under the standard one the learning rate falls as width^-1 (AdamW,
Lion) or width^-1/2 (Muon, Adafactor), whose updates grow so. Weight decay keeps lr * decay * steps, the share of the
run over which AdamW averages its weights, the base's (Wang & Aitchison 2024).
"""

import math
from dataclasses import dataclass

import ml_collections

from lm_jax import config, optim
from lm_jax.config import Config, ConfigError
from lm_jax.models import flops, zoo
from lm_jax.recipes.pretrain import planned, row_lengths


@dataclass(frozen=True)
class Rules:
    """How a run's length moves its batch and rate; 0 leaves either where it is."""

    tokens_per_param: float = 20.0  # of all parameters, where a point says neither tokens nor FLOPs (Hoffmann 2022)
    batch: float = 0.47  # B ~ tokens^0.47: so the critical batch grows, with data and not with size (Zhang et al. 2025)
    horizon: float = 0.32  # lr ~ tokens^-0.32 at one batch size (Bjorck et al. 2025)
    root: float = 0.5  # lr ~ B^0.5 for optimizers that normalise (Malladi et al. 2022)


RULES = Rules()
STILL = Rules(batch=0.0, horizon=0.0)  # the same batch and, at one size, the same rate whatever the number of tokens


def shape(c: ml_collections.ConfigDict, depth: int) -> dict:
    """Model settings of the rung of this depth: `zoo.ladder`'s, and under muP with the base's head size, which that
    parametrisation keeps while the number of heads grows."""
    rung = zoo.ladder(depth=depth)
    if not c.model.base_width:
        return rung
    size = c.model.head_size
    if not size:
        raise ConfigError("model.base_width (muP) with model.head_size=0: name the size that all rungs have")
    heads = math.ceil(rung["width"] / size)
    return rung | {"width": heads * size, "heads": heads, "head_size": size}


def point(c: ml_collections.ConfigDict, model: dict, *, tokens: float = 0, flops: float = 0, rules: Rules = RULES
          ) -> dict:
    """Overrides that make of the base config a run of a model (settings of `model`) on so many tokens or FLOPs.

    Steps are whole and the batch is the base's times a power of two, so that it divides the mesh as the base's does.
    """
    if tokens and flops:
        raise ConfigError(f"a point of tokens={tokens:g} and flops={flops:g}: give one of them, the other follows")
    base, run = config.resolve(c), sized(c, model)
    row = sum(row_lengths(run))
    tokens = tokens or flops / flops_per_token(run) or rules.tokens_per_param * counts(run)["total"]
    longer = tokens / (base.train.steps * base.train.batch * row)
    batch = _batch(base.train.batch, longer**rules.batch)
    steps = max(1, round(tokens / (batch * row)))
    lr = base.optim.lr * (batch / base.train.batch) ** rules.root * longer**-rules.horizon
    if not base.model.base_width:
        lr *= (base.model.width / run.model.width) ** optim.TRANSFER[base.optim.name]
    decay = base.optim.weight_decay * base.optim.lr * base.train.steps / (lr * steps)
    warmup = math.ceil(base.optim.warmup / base.train.steps * steps)  # the same share of the run (Porian et al. 2024)
    return {f"model.{key}": value for key, value in model.items()} | {
        "train.steps": steps, "train.batch": batch, "optim.lr": _short(lr), "optim.weight_decay": _short(decay),
        "optim.warmup": warmup}


def sized(c: ml_collections.ConfigDict, model: dict) -> Config:
    """The base config with another model, its vocabulary filled in."""
    values = c.to_dict()
    return planned(config.resolve(ml_collections.ConfigDict(values | {"model": values["model"] | model})))


def counts(c: Config) -> dict[str, float]:
    """N of a config whose vocabulary is known (`planned`), under three conventions.

    "total" is that of Hoffmann et al. 2022, "non_embedding" that of Kaplan et al. 2020; "effective" is what a token's
    FLOPs amount to, C / 6 D, with the head and attention in them (Porian et al. 2024).
    """
    n = flops.parameters(c.model)
    return {"total": n["total"], "non_embedding": n["non_embedding"], "effective": flops_per_token(c) / 6}


def flops_per_token(c: Config) -> float:
    """Of training: products of the model, attention by its mask."""
    return flops.train(c.model, *row_lengths(c)) / sum(row_lengths(c))


def _batch(base: int, times: float) -> int:
    """The base's rows times the nearest power of two; halved only while that gives whole rows."""
    power = round(math.log2(times))
    while power < 0 and base % 2**-power:
        power += 1
    return int(base * 2.0**power)


def _short(x: float) -> float:
    """Four digits: enough for a rate, and the same on every machine."""
    return float(f"{x:.4g}")
