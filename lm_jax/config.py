"""Every knob of the codebase, with its default and its reason: frozen dataclasses <-> ConfigDict <-> JSON.

A file in `configs/` has a `get_config()` that returns `default()` with what differs. The command line overrides
single keys (`--config.optim.lr=3e-4`). `resolve` turns the result into a frozen `Config` and reports *all* unknown
keys, wrong types and impossible combinations at once, before any device is touched.
"""

import dataclasses
import difflib
import hashlib
import json
import sys
import typing
from dataclasses import dataclass, field

import ml_collections
from absl import flags
from ml_collections import config_flags


class ConfigError(ValueError):
    """A configuration that cannot run; the message names the key and the cure. Exit code 2: retrying cannot help."""


@dataclass(frozen=True)
class RopeConfig:
    theta: float = 10_000.0  # wavelength base (Su et al. 2021)
    fraction: float = 1.0  # share of each head that is rotated (partial rotary)
    interleaved: bool = False  # True pairs neighbours (0,1)(2,3); False pairs halves, as LLaMA files do
    scaling: str = "none"  # none | linear | ntk | dynamic | yarn | llama3: how to reach past model.max_length
    factor: float = 1.0  # how many times longer than model.max_length


@dataclass(frozen=True)
class MoEConfig:
    experts: int = 0  # E; 0 is a dense MLP
    top_k: int = 2  # experts that each token visits
    shared: int = 0  # experts that every token visits besides (DeepSeekMoE)
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
    hidden: int = 0  # F; 0 is 4 D, or 8/3 D rounded up to a multiple of 32 if gated
    causal: bool = True  # False sees both ways: BERT
    norm: str = "rms"  # rms | layer | none (parameter-free RMS)
    norm_place: str = "pre"  # pre | post | sandwich
    norm_eps: float = 1e-6
    embed_norm: bool = False  # a norm right after the embeddings (BERT)
    bias: str = "none"  # none | qkv | norm | all: which layers carry a bias
    activation: str = "silu"  # gelu | gelu_tanh | relu | relu2 | silu
    gated: bool = True  # two up-projections, one through the activation (GLU)
    positions: str = "rope"  # rope | learned | sinusoidal | relative | alibi | none
    max_length: int = 2048  # rows of learned positions; the length that rope scaling starts from
    rope: RopeConfig = field(default_factory=RopeConfig)
    qk_norm: bool = False  # norm on each head's queries and keys: bounds attention logits
    attention_scale: float = 0.0  # 0 is 1/sqrt(H); T5 has 1
    attention_softcap: float = 0.0  # 0 is off; Gemma 2 has 50
    logit_softcap: float = 0.0  # 0 is off; Gemma 2 has 30
    window: int = 0  # tokens that a sliding layer sees, itself included; 0: all layers are full
    window_pattern: str = "S"  # repeated over the layers: S sliding, F full ("SF" is Gemma 2)
    sinks: bool = False  # a learned logit per head that attention may spend itself on (gpt-oss)
    tied: bool = True  # the output table is the embedding table
    table_scale: str = "none"  # none | in: embeddings x sqrt(D) (Gemma) | out: hidden x 1/sqrt(D) before the head (T5)
    types: int = 0  # token-type embeddings (BERT: 2)
    head: str = "lm"  # lm | mlm (dense, act, norm, tied, bias) | bert (mlm, pooler and next-sentence head)
    dropout: float = 0.0
    init_std: float = 0.0  # 0: 1/sqrt(fan-in), embeddings 0.02; else every table and matrix (GPT-2: 0.02)
    base_width: int = 0  # > 0 is muP with depth scaling (CompleteP): hyperparameters transfer from this width
    base_depth: int = 0  # and from this depth; 0 is the model's own
    dtype: str = "bfloat16"  # of the computation; weights and optimizer state stay float32
    remat: str = "none"  # none | full | dots: what the backward pass computes again
    moe: MoEConfig = field(default_factory=MoEConfig)


@dataclass(frozen=True)
class DataConfig:
    sources: str = "stdlib"  # specs separated by ';' (stdlib, text:GLOB, jsonl:GLOB#field, parquet:GLOB#column, tfds:NAME, markov: ...)
    weights: tuple = ()  # a number per source, or a row (start fraction, number per source) per stage; () is by size
    epochs: float = 0.0  # a source is repeated at most so often; 0 is no cap
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


CHOICES = {
    "model.norm": ("rms", "layer", "none"),
    "model.norm_place": ("pre", "post", "sandwich"),
    "model.bias": ("none", "qkv", "norm", "all"),
    "model.activation": ("gelu", "gelu_tanh", "relu", "relu2", "silu"),
    "model.positions": ("rope", "learned", "sinusoidal", "relative", "alibi", "none"),
    "model.rope.scaling": ("none", "linear", "ntk", "dynamic", "yarn", "llama3"),
    "model.table_scale": ("none", "in", "out"),
    "model.head": ("lm", "mlm", "bert"),
    "model.dtype": ("float32", "bfloat16", "float16"),
    "model.remat": ("none", "full", "dots"),
    "data.strategy": ("concat", "fit"),
    "data.objective": ("causal", "prefix", "masked", "masked_pairs", "span", "ul2"),
    "data.invalid": ("replace", "drop", "error"),
    "optim.name": ("adamw", "adafactor", "lion", "muon"),
    "optim.schedule": ("cosine", "wsd", "rsqrt", "linear", "constant"),
}
