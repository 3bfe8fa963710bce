"""Every knob of the codebase, with its default and its reason: frozen dataclasses <-> ConfigDict <-> JSON.

A file in `configs/` has a `get_config()` that returns `default()` with what differs. The command line overrides
single keys (`--config.optim.lr=3e-4`). `resolve` turns the result into a frozen `Config` and reports *all* unknown
keys, wrong types and impossible combinations at once, before any device is touched.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import typing
from dataclasses import dataclass, field

import ml_collections

from lm_jax import checks
from lm_jax.errors import ConfigError


@dataclass(frozen=True)
class RopeConfig:
    theta: float = 10_000.0  # wavelength base (Su et al. 2021)
    fraction: float = 1.0  # share of each head that is rotated (partial rotary)
    interleaved: bool = False  # True pairs neighbours (0,1)(2,3); False pairs halves, as LLaMA files do
    scaling: str = "none"  # none | linear | ntk | dynamic | yarn | llama3: how to reach past the length trained on
    factor: float = 1.0  # how many times longer than that
    original: int = 0  # the length trained on, from which scaling starts; 0 is model.max_length
    slow: float = 1.0  # waves of fewer turns in that length are stretched whole (yarn, llama3)
    fast: float = 0.0  # waves of more turns are kept, a blend between; 0 is the paper's: yarn 32, llama3 4
    mscale: float = 0.0  # yarn's factor on cos and sin, with that of the next line below it; 0 is the paper's
    mscale_all: float = 0.0  # and its square on attention's logits (DeepSeek: 1)
    local_theta: float = 0.0  # > 0: theta of sliding layers, which are never scaled (Gemma 3: 1e4)


@dataclass(frozen=True)
class MoEConfig:
    experts: int = 0  # E; 0 is a dense MLP
    top_k: int = 2  # experts that each token visits
    shared: int = 0  # experts that every token visits besides (DeepSeekMoE)
    hidden: int = 0  # F of an expert; 0 is the dense layers'
    pattern: str = "E"  # repeated over the layers: E experts, D a dense MLP (DeepSeek-V3: DDD, then E)
    score: str = "softmax"  # softmax | sigmoid: what a gate is before the chosen ones are normalised
    normalized: bool = True  # the chosen gates sum to 1
    scale: float = 1.0  # times this (DeepSeek-V3: 2.5)
    bias: bool = False  # a number an expert that sways the choice and not the gate (DeepSeek-V3)
    groups: int = 1  # experts are chosen within the best groups of so many, by the sum of each one's two best
    top_groups: int = 1  # how many
    balance: float = 0.01  # weight of the load-balance loss, per row (DeepSeek-V3, eq. 17-20)
    router_z: float = 1e-3  # weight of the squared router log-partition (ST-MoE)


@dataclass(frozen=True)
class TransformerConfig:
    vocab: int = 0  # V; 0 takes the tokenizer's
    width: int = 256  # D
    depth: int = 4  # L, layers of the decoder, or of the only stack
    encoder_depth: int = 0  # > 0 adds an encoder and cross-attention: T5
    heads: int = 4  # N
    kv_heads: int = 0  # K; 0 is N (multi-head), 1 is multi-query
    head_size: int = 0  # H; 0 is D / N
    latent: int = 0  # > 0: keys and values are made of a latent of this size, which is cached (MLA, DeepSeek)
    query_latent: int = 0  # with `latent`: queries are too; 0 makes them of the row itself
    value_size: int = 0  # with `latent`: a head's values; 0 is the part of its keys that is not rotated
    hidden: int = 0  # F; 0 is 4 D, or 8/3 D rounded up to a multiple of 32 if gated
    causal: bool = True  # False sees both ways: BERT
    norm: str = "rms"  # rms | layer | none (parameter-free RMS)
    norm_place: str = "pre"  # pre | post | sandwich
    norm_eps: float = 1e-6
    norm_plus_one: bool = False  # norms multiply by 1 + w: weights near 0 keep their bits (Gemma)
    embed_norm: bool = False  # a norm right after the embeddings (BERT)
    bias: str = "none"  # none | qkv | attention | norm | all: which layers carry a bias
    activation: str = "silu"  # gelu | gelu_tanh | relu | relu2 | silu
    gated: bool = True  # two up-projections, one through the activation (GLU)
    positions: str = "rope"  # rope | learned | sinusoidal | relative | alibi | none
    max_length: int = 2048  # rows of learned positions; the length that rope scaling starts from
    rope: RopeConfig = field(default_factory=RopeConfig)
    buckets: int = 32  # of relative positions (T5)
    farthest: int = 128  # distance that the last bucket begins at
    qk_norm: bool = False  # norm on each head's queries and keys: bounds attention logits
    attention_scale: float = 0.0  # 0 is 1/sqrt(H); T5 has 1
    attention_softcap: float = 0.0  # 0 is off; Gemma 2 has 50
    logit_softcap: float = 0.0  # 0 is off; Gemma 2 has 30
    window: int = 0  # tokens that a sliding layer sees, itself included; 0: all layers are full
    window_pattern: str = "S"  # repeated over the layers: S sliding, F full ("SF" is Gemma 2)
    sinks: bool = False  # a learned logit per head that attention may spend itself on (gpt-oss)
    attention: str = "auto"  # auto | xla | blocked | cudnn | splash | ring; auto is the best that can do what is asked
    tied: bool = True  # the output table is the embedding table
    table_scale: str = "none"  # none | in: embeddings x sqrt(D) (Gemma) | out: hidden x 1/sqrt(D) before the head (T5)
    types: int = 0  # token-type embeddings (BERT: 2)
    head: str = "lm"  # lm | mlm (dense, act, norm, tied, bias) | mlm_pairs (mlm, pooler, next-sentence head), or of
    #                   fine-tuned models: classes of a row | tags of each token | span (question answering) | none
    labels: int = 0  # outputs of the heads that are not over the vocabulary; 0 is 2
    pooler: str = "none"  # none | tanh | relu: a layer over a row's token, before its classes (BERT: tanh)
    dropout: float = 0.0
    init_std: float = 0.0  # 0: 1/sqrt(fan-in), embeddings 0.02; else every table and matrix (GPT-2: 0.02)
    base_width: int = 0  # > 0 is muP with depth scaling (CompleteP): hyperparameters transfer from this width
    base_depth: int = 0  # and from this depth; 0 is the model's own
    dtype: str = "bfloat16"  # of the computation; weights and optimizer state stay float32
    remat: str = "none"  # none | full | dots: what the backward pass computes again
    moe: MoEConfig = field(default_factory=MoEConfig)

    @property
    def sizes(self) -> dict[str, int]:
        """Letter -> size, with what is left at 0 filled in."""
        hidden = self.hidden or (-(-8 * self.width // 96) * 32 if self.gated else 4 * self.width)
        head = self.head_size or self.width // self.heads
        turned = int(head * self.rope.fraction + 1e-6) // 2 * 2  # sizes of a head that are rotated
        value = self.value_size or head - turned
        return dict(D=self.width, F=hidden, N=self.heads, K=self.kv_heads or self.heads, V=self.vocab, H=head,
                    E=self.moe.experts, M=self.width, P=self.max_length, G=self.types, U=self.buckets,
                    C=self.labels or 2, J=turned, Q=self.query_latent, W=self.latent, Y=self.latent + turned,
                    Z=head - turned + value, O=value)


@dataclass(frozen=True)
class DataConfig:
    sources: str = "stdlib"  # with ';' between: text:GLOB, jsonl:GLOB#field, parquet:GLOB#column, tfds:NAME, markov:..
    weights: tuple = ()  # a number per source, or a row (start fraction, number per source) per stage; () is by size
    epochs: tuple = ()  # most passes over a source: (4.0,) for all, or a number per source; 0 or () is no cap
    root: str = "data"  # folder of the prepared stores
    tokenizer: str = "bpe"  # bpe | unigram | byte | a SentencePiece .model | a Hugging Face tokenizer.json
    vocab: int = 8192  # size of a tokenizer trained here
    length: int = 512  # T, tokens in a row
    strategy: str = "concat"  # concat: full rows, documents split | fit: best-fit, documents whole where they fit
    objective: str = "causal"  # causal | prefix | masked | masked_pairs | span | ul2
    noise: float = 0.15  # share of tokens masked or corrupted
    span: float = 3.0  # mean length of a corrupted span (T5)
    whole_words: bool = False  # mask whole words
    validation: float = 0.05  # share of documents held out
    invalid: str = "replace"  # replace | drop | error: documents whose bytes are not UTF-8


@dataclass(frozen=True)
class OptimConfig:
    name: str = "adamw"  # adamw | adafactor | lion | muon
    lr: float = 3e-3  # peak learning rate
    schedule: str = "cosine"  # cosine | wsd | rsqrt | linear | constant
    warmup: int = 100  # steps of linear warm-up
    decay: float = 0.2  # wsd: share of the steps that cools down
    floor: float = 0.1  # last learning rate as a share of the peak (cosine, wsd, linear)
    betas: tuple = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices; norms, biases and embeddings are spared
    clip: float = 1.0  # largest global gradient norm; 0 is off
    spike: float = 0.0  # skip an update whose loss lies so many robust deviations above the last 128; 0 is off
    ema: float = 0.0  # decay of an average of the weights, which is then evaluated; 0 is off


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 1000
    batch: int = 64  # B, rows in a step over all devices
    microbatches: int = 1  # the step's rows in so many parts, one after another
    z_loss: float = 0.0  # weight of the squared log-partition (PaLM: 1e-4)
    smoothing: float = 0.0  # label smoothing
    log_every: int = 1  # steps a row of metrics.jsonl
    eval_every: int = 250
    eval_rows: int = 256  # validation rows a source at each evaluation; the last one takes all
    checkpoint_every: int = 250
    keep: int = 2  # newest checkpoints kept
    loggers: str = ""  # besides metrics.jsonl: "tensorboard", "wandb", or both with a comma
    rollbacks: int = 3  # times to go back to before 4 refused updates of 50, and on after them; then it is diverged
    compare_every: int = 100  # steps between comparisons of devices that hold copies; also at each save, 0: only there
    watchdog: float = 1.0  # a phase that takes so many times its limit (lm_jax/clock.py) ends the run; 0: none does
    deterministic: bool = False  # the same bits in each run on GPUs too, by slower kernels (docs/reliability.md)
    profile: int = 0  # first of five steps to trace with jax.profiler; 0 is off


@dataclass(frozen=True)
class MeshConfig:
    replica: int = 1  # copies across slices, over the data-centre network
    data: int = 1  # copies within a slice
    fsdp: int = -1  # shards of weights and rows; -1 takes the devices that are left
    model: int = 1  # tensor parallel
    sequence: int = 1  # shards of the row's tokens
    expert: int = 1  # shards of the experts


@dataclass(frozen=True)
class Config:
    name: str = "default"
    seed: int = 0
    model: TransformerConfig = field(default_factory=TransformerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)


OVER_WORDS = ("lm", "mlm", "mlm_pairs")  # heads whose outputs are the vocabulary's
CHOICES = {
    "model.norm": ("rms", "layer", "none"),
    "model.norm_place": ("pre", "post", "sandwich"),
    "model.bias": ("none", "qkv", "attention", "norm", "all"),
    "model.activation": ("gelu", "gelu_tanh", "relu", "relu2", "silu"),
    "model.positions": ("rope", "learned", "sinusoidal", "relative", "alibi", "none"),
    "model.rope.scaling": ("none", "linear", "ntk", "dynamic", "yarn", "llama3"),
    "model.table_scale": ("none", "in", "out"),
    "model.head": ("lm", "mlm", "mlm_pairs", "classes", "tags", "span", "none"),
    "model.pooler": ("none", "tanh", "relu"),
    "model.moe.score": ("softmax", "sigmoid"),
    "model.attention": ("auto", "xla", "blocked", "cudnn", "splash", "ring"),
    "model.dtype": ("float32", "bfloat16"),
    "model.remat": ("none", "full", "dots"),
    "data.strategy": ("concat", "fit"),
    "data.objective": ("causal", "prefix", "masked", "masked_pairs", "span", "ul2"),
    "data.invalid": ("replace", "drop", "error"),
    "optim.name": ("adamw", "adafactor", "lion", "muon"),
    "optim.schedule": ("cosine", "wsd", "rsqrt", "linear", "constant"),
}


def default() -> ml_collections.ConfigDict:
    """All defaults as a locked, typed ConfigDict: what a config file starts from."""
    return ml_collections.ConfigDict(dataclasses.asdict(Config())).lock()


def resolve(c: ml_collections.ConfigDict) -> Config:
    """The frozen, checked `Config`; raises one ConfigError that lists everything wrong with `c`."""
    problems: dict[str, str] = {}  # by key: where a key is wrong by itself, what it has to do with others is not said
    config = _build(Config, c.to_dict(), "", problems)
    problems |= {key: f"{key}={value!r}: choose one of {', '.join(choices)}" for key, choices in CHOICES.items()
                 if (value := checks.value(config, key)) not in choices}
    more = [line for line in checks.impossible(config) if not any(key in line for key in problems)]
    if problems or more:
        raise ConfigError("this config cannot run:\n  " + "\n  ".join([*problems.values(), *more]))
    return config


def to_dict(config) -> dict:
    """Nested plain dict, as written to config.json."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(values: dict) -> Config:
    """The inverse of `to_dict`: a run's config.json back into a checked `Config`."""
    return resolve(ml_collections.ConfigDict(values))


def digest(values) -> str:
    """Twelve hex digits that name a JSON-able value: equal values, equal name, on any machine."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def difference(old: dict, new: dict, prefix: str = "") -> list[str]:
    """Lines `key: old -> new` for the leaves in which two nested dicts differ."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key, "(absent)"), new.get(key, "(absent)")
        if isinstance(a, dict) and isinstance(b, dict):
            lines += difference(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return lines


def _build(cls, values: dict, prefix: str, problems: dict[str, str]):
    """`cls` from nested `values`; adds to `problems` instead of raising, and what is wrong is left at its default."""
    hints = typing.get_type_hints(cls)
    for key in values.keys() - hints.keys():
        near = difflib.get_close_matches(key, hints, n=1)
        problems[f"{prefix}{near[0] if near else key}"] = (
            f"unknown key {prefix}{key}" + (f": did you mean {prefix}{near[0]}?" if near else ""))
    kept = {}
    for key, hint in hints.items():
        if key not in values:
            continue
        value = values[key]
        if dataclasses.is_dataclass(hint):
            if isinstance(value, dict):
                kept[key] = _build(hint, value, f"{prefix}{key}.", problems)
            else:
                problems[f"{prefix}{key}"] = f"{prefix}{key}={value!r}: a section with keys of its own is wanted"
            continue
        value = float(value) if hint is float and type(value) is int else value
        value = _tuples(value) if hint is tuple and isinstance(value, (list, tuple)) else value
        if type(value) is not hint:
            problems[f"{prefix}{key}"] = f"{prefix}{key}={value!r}: wanted {hint.__name__}, got {type(value).__name__}"
        elif hint is float and not math.isfinite(value):
            problems[f"{prefix}{key}"] = f"{prefix}{key}={value!r}: wanted a finite number"
        else:
            kept[key] = value
    return cls(**kept)


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value
