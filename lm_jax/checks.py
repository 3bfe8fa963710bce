"""What no run can be made of: values out of range and combinations that contradict each other, each with its cure.

Every function takes a built `config.Config`, or parts of it, and yields lines `key=value: what would do`. Types,
unknown keys and choices from a list are settled before; what hangs on the data or the devices is checked where they
are known.
"""

import importlib.util
import math
from types import SimpleNamespace

LOGGERS = {"tensorboard": "tensorboardX", "wandb": "wandb"}  # name in train.loggers -> the package it needs


def impossible(c):
    """Everything about a config that cannot run."""
    yield from _ranges({name: section for name, section in vars(c).items() if name != "model"})
    yield from _name(c.name)
    yield from model(c.model)
    yield from _data(c.data)
    yield from _objective(c.model, c.data)
    yield from _optim(c.optim)
    yield from _train(c.train)
    yield from _mesh(vars(c.mesh))


def weights(given: tuple, sources: int):
    """What is wrong with `data.weights` for so many sources: a weight each, or rows of a start and a weight each."""
    if not given:
        return
    stages = given if isinstance(given[0], tuple) else ((0.0, *given),)
    if not all(isinstance(stage, tuple) and stage and all(map(_is_number, stage)) for stage in stages):
        yield f"data.weights={given!r}: a number for each source, or rows (start fraction, number for each source)"
        return
    if any(len(stage) != sources + 1 or min(stage[1:]) < 0 or not any(stage[1:]) for stage in stages):
        yield f"data.weights={given!r}: a weight >= 0 for each of the {sources} sources, not all 0"
    starts = [stage[0] for stage in stages]
    if starts[0] != 0 or starts != sorted(set(starts)) or starts[-1] >= 1:
        yield f"data.weights={given!r}: stages begin at rising fractions of the run, the first at 0"


def epochs(given: tuple, sources: int):
    """What is wrong with `data.epochs` for so many sources."""
    if len(given) not in (0, 1, sources) or not all(_is_number(most) and most >= 0 for most in given):
        yield f"data.epochs={given!r}: () for no cap, (4.0,) for all, or a number >= 0 for each of {sources} sources"


def packages(loggers: str):
    """What `train.loggers` needs and this machine lacks; a run's config stays valid where nothing is logged."""
    for name in filter(None, loggers.split(",")):
        if importlib.util.find_spec(LOGGERS[name]) is None:
            yield (f"train.loggers has {name!r}, which needs {LOGGERS[name]}: pip install 'lm_jax[{name}]', or leave "
                   "it out of train.loggers")


def value(config, key: str):
    """The leaf of nested dataclasses at a dotted key."""
    for part in key.split("."):
        config = getattr(config, part)
    return config


AT_LEAST = {
    "model.width": 1, "model.depth": 1, "model.heads": 1, "model.max_length": 1, "data.length": 2, "data.span": 1,
    "model.moe.groups": 1, "model.moe.top_groups": 1, "model.buckets": 2, "model.farthest": 2,
    "data.vocab": 1, "train.batch": 1, "train.steps": 1, "train.microbatches": 1, "train.log_every": 1, "train.keep": 1,
    "train.eval_every": 1, "train.checkpoint_every": 1,
} | dict.fromkeys(("seed", "model.vocab", "model.encoder_depth", "model.kv_heads", "model.head_size", "model.hidden",
                   "model.window", "model.types", "model.labels", "model.latent",
                   "model.query_latent", "model.value_size", "model.rope.original", "model.rope.fast",
                   "model.rope.mscale", "model.rope.mscale_all", "model.rope.local_theta", "model.moe.hidden",
                   "model.base_width", "model.base_depth", "model.attention_scale",
                   "model.attention_softcap", "model.logit_softcap", "model.init_std", "model.norm_eps",
                   "model.moe.experts", "model.moe.shared", "model.moe.balance", "model.moe.router_z",
                   "optim.warmup", "optim.eps", "optim.weight_decay", "optim.clip", "optim.spike",
                   "train.eval_rows", "train.z_loss", "train.profile", "train.watchdog"), 0)
ABOVE_0 = ("model.rope.theta", "model.rope.factor", "model.rope.fraction", "model.rope.slow", "model.moe.scale",
           "optim.lr")
SHARES = ("model.rope.fraction", "data.noise", "data.validation", "optim.decay", "optim.floor", "train.smoothing")
BELOW_1 = ("model.dropout", "optim.ema")


def _ranges(sections: dict):
    """Numbers out of range in these sections of a config, by name."""
    c, ours = SimpleNamespace(**sections), lambda keys: [key for key in keys if key.split(".")[0] in sections]
    for key in ours(AT_LEAST):
        if not value(c, key) >= AT_LEAST[key]:
            yield f"{key}={value(c, key)}: at least {AT_LEAST[key]}"
    for key in ours(ABOVE_0):
        if not value(c, key) > 0:
            yield f"{key}={value(c, key)}: above 0"
    for key in ours(SHARES):
        if not 0 <= value(c, key) <= 1:
            yield f"{key}={value(c, key)}: a share between 0 and 1"
    for key in ours(BELOW_1):
        if not 0 <= value(c, key) < 1:
            yield f"{key}={value(c, key)}: at least 0 and below 1"


def _name(name):
    if name in ("", ".", "..") or set(name) & set("/\\"):
        yield f"name={name!r}: a word that can name a folder in runs/, without / or \\"


def model(m):
    """What is wrong with a model by itself, whatever it is trained on."""
    yield from _ranges({"model": m})
    if m.heads > 0 and m.width % m.heads and not m.head_size:
        yield f"model.width={m.width} over model.heads={m.heads}: make it a multiple, or set model.head_size"
    if m.kv_heads > 0 and m.heads % m.kv_heads:
        yield f"model.heads={m.heads} over model.kv_heads={m.kv_heads}: make it a multiple"
    if m.encoder_depth and not m.causal:
        yield "model.encoder_depth > 0 with model.causal=False: the decoder of an encoder-decoder is causal"
    if m.moe.experts:
        yield from _experts(m.moe)
    elif m.moe.shared:
        yield f"model.moe.shared={m.moe.shared} with model.moe.experts=0: set experts, or leave shared at 0"
    if not m.window_pattern or set(m.window_pattern) - set("SF"):
        yield f"model.window_pattern={m.window_pattern!r}: letters S (sliding) and F (full)"
    elif m.window_pattern != "S" and not m.window:
        yield (f"model.window_pattern={m.window_pattern!r} with model.window=0: say how many tokens a sliding layer "
               "sees, or leave the pattern at 'S'")
    if m.pooler != "none" and m.head != "classes" and (m.causal or m.head != "none"):
        yield (f"model.pooler={m.pooler!r} with model.head={m.head!r}: it stands before model.head='classes', or alone "
               "in a model with model.causal=False")
    yield from _positions(m)
    yield from _latent(m)
    yield from _mup(m)


def _experts(moe):
    if not 1 <= moe.top_k <= moe.experts:
        yield f"model.moe.top_k={moe.top_k}: between 1 and model.moe.experts={moe.experts}"
    if not moe.pattern or set(moe.pattern) - set("DE"):
        yield f"model.moe.pattern={moe.pattern!r}: letters E (experts) and D (dense)"
    if moe.experts % max(moe.groups, 1) or not 1 <= moe.top_groups <= moe.groups:
        yield (f"model.moe.groups={moe.groups} and top_groups={moe.top_groups} with experts={moe.experts}: groups "
               "divide the experts, and some of them are chosen")
    elif moe.groups > 1 and moe.top_k > moe.experts // moe.groups * moe.top_groups:
        yield f"model.moe.top_k={moe.top_k}: more experts than model.moe.top_groups={moe.top_groups} groups have"


def _latent(m):
    if not m.latent:
        wrong = [key for key in ("query_latent", "value_size") if getattr(m, key)]
        yield from (f"model.{key}={getattr(m, key)} with model.latent=0: set the latter" for key in wrong)
    elif m.encoder_depth or m.qk_norm or m.sinks or m.positions != "rope" or m.bias != "none" or m.kv_heads:
        yield (f"model.latent={m.latent} is of decoders with positions='rope', bias='none', kv_heads=0 and without "
               "qk_norm and sinks: leave those at their defaults, or latent at 0")


def _positions(m):
    if m.positions == "sinusoidal" and m.width % 2:
        yield f"model.width={m.width} with model.positions='sinusoidal': sines and cosines want an even width"
    if m.rope.scaling != "none" and m.positions != "rope":
        yield (f"model.rope.scaling={m.rope.scaling!r} with model.positions={m.positions!r}: only 'rope' can be "
               "scaled, leave it at 'none'")
    if m.rope.local_theta and (m.positions != "rope" or not m.window):
        yield (f"model.rope.local_theta={m.rope.local_theta} is of sliding layers with rotary positions: set "
               "model.window and model.positions='rope', or leave it at 0")
    if m.rope.factor != 1 and m.rope.scaling == "none":
        yield (f"model.rope.factor={m.rope.factor} with model.rope.scaling='none': name a scaling, or leave the "
               "factor at 1")


def _mup(m):
    if m.base_depth and not m.base_width:
        yield f"model.base_depth={m.base_depth} with model.base_width=0: muP is switched on by model.base_width"
    if m.base_width and not m.head_size:
        yield ("model.base_width (muP) with model.head_size=0: name the size, which stays while the number of heads "
               "grows")
    if m.base_width and m.norm_place == "post":
        yield "model.base_width (muP) with model.norm_place='post': muP wants 'pre' or 'sandwich'"


def _data(d):
    if sources := sum(1 for spec in d.sources.split(";") if spec.strip()):
        yield from weights(d.weights, sources)
        yield from epochs(d.epochs, sources)
    else:
        yield f"data.sources={d.sources!r}: name one, such as stdlib or text:corpus/*.txt"
    if d.objective in ("span", "ul2", "masked_pairs") and d.strategy != "concat":
        yield f"data.strategy={d.strategy!r} with data.objective={d.objective!r}: rows are filled exactly, use 'concat'"


def _objective(m, d):
    """The objective decides which family and which head can learn it."""
    if d.objective in ("masked", "masked_pairs") and (m.causal or m.encoder_depth):
        yield f"data.objective={d.objective!r} wants an encoder: model.causal=False and model.encoder_depth=0"
    if d.objective in ("causal", "prefix") and (not m.causal or m.encoder_depth):
        yield f"data.objective={d.objective!r} wants a decoder: model.causal=True and model.encoder_depth=0"
    if d.objective in ("span", "ul2") and not m.encoder_depth:
        yield f"data.objective={d.objective!r} wants an encoder and a decoder: model.encoder_depth > 0"
    if m.head in ("classes", "tags", "span", "none"):
        yield (f"model.head={m.head!r} with data.objective={d.objective!r}: pretraining wants 'lm', 'mlm' or "
               "'mlm_pairs'")
    if (m.head == "mlm_pairs") != (d.objective == "masked_pairs"):
        yield (f"model.head={m.head!r} with data.objective={d.objective!r}: the 'mlm_pairs' head and 'masked_pairs' "
               "go together")
    if d.objective == "masked_pairs" and m.types < 2:
        yield f"model.types={m.types} with data.objective='masked_pairs': sentence A and B need model.types=2"
    if d.objective != "masked_pairs" and m.types > 0:
        yield (f"model.types={m.types} with data.objective={d.objective!r}: only 'masked_pairs' has token types, set "
               "model.types=0")
    if m.positions == "learned" and d.length > m.max_length:
        yield (f"data.length={d.length} is longer than model.max_length={m.max_length} learned positions: raise the "
               "latter")


def _optim(o):
    if len(o.betas) != 2 or not all(_is_number(beta) and 0 <= beta < 1 for beta in o.betas):
        yield f"optim.betas={o.betas!r}: two numbers, at least 0 and below 1"


def _train(t):
    if t.batch % max(t.microbatches, 1):
        yield f"train.batch={t.batch} in train.microbatches={t.microbatches}: make it a multiple"
    if set(filter(None, t.loggers.split(","))) - LOGGERS.keys():
        yield f"train.loggers={t.loggers!r}: 'tensorboard', 'wandb' or 'tensorboard,wandb'"


def _mesh(sizes):
    for axis, size in sizes.items():
        if size < 1 and size != -1:
            yield f"mesh.{axis}={size}: at least 1, or -1 for the devices that are left"
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        yield f"mesh.{' and mesh.'.join(free)} are -1: one axis alone can take the devices that are left"


def _is_number(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
