"""The families of published models: how each says the block's settings in config.json, and which heads it has.

`of_type` finds a family by the word in config.json, `of_model` the first that can say all of a model's settings;
nothing else in the library knows the name of one.
"""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass

import lm_jax.hub.names as names
import lm_jax.hub.ropes as ropes
import lm_jax.hub.settings as say
from lm_jax import checks
from lm_jax.config import OVER_WORDS, TransformerConfig
from lm_jax.errors import ConfigError
from lm_jax.hub.settings import Piece, always, fixed, keys
from lm_jax.hub.settled import build, settled


@dataclass(frozen=True)
class Family:
    """A family: its word in config.json, the class of each head (the first is meant where none is named), its settings,
    and its names: of the body, behind a prefix, and of the heads."""

    kind: str
    classes: dict[str, str]
    pieces: tuple[Piece, ...]
    body: Callable[[TransformerConfig], dict[str, str]]
    heads: dict[str, str] = field(default_factory=lambda: {"unembed": "lm_head"})
    labels: dict[str, str] = field(default_factory=lambda: SCORES)  # what gives scores of labels, by head
    prefix: str = "model."
    prefixes: dict[str, str] = field(default_factory=dict)  # of heads that have another
    inputs_first: bool = False  # weights are [in, out] on disk
    seen: Callable[[set[str], str], dict] = lambda tensors, head: {}  # settings that only the tensors tell
    pools: dict[str, str] = field(default_factory=dict)  # head -> activation of the layer under it
    passed_over: tuple[str, ...] = (r"rotary_emb\.inv_freq$",)  # tensors that hold nothing which is not known
    aliases: dict[str, str] = field(default_factory=dict)  # patterns of a tensor's other names -> its own

    def named(self, tensors: dict) -> dict:
        """Tensors of a file, with those that it has only by another name under their own too."""
        others = {re.sub(other, own, name): tensor for other, own in self.aliases.items()
                  for name, tensor in tensors.items() if re.search(other, name)}
        return others | tensors

    def read(self, hf: dict, tensors: set[str]) -> TransformerConfig:
        """The model that a config.json and the names of its tensors say."""
        head = self.head(hf)
        found = {"head": head, "pooler": self.pools.get(head, "none")}
        try:
            for piece in self.pieces:
                found |= piece.read(hf)
            found |= self.seen(tensors, head)
            if head in self.labels:
                found["labels"] = len(hf.get("id2label") or ()) or hf.get("num_labels") or 2
            if head not in OVER_WORDS:
                found["tied"] = True
            cfg = build(found)
            problems = list(checks.model(cfg))
        except ConfigError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:  # values of other kinds
            raise ConfigError(f"config.json is none of a model of type {self.kind!r}: {error!r}") from error
        if problems:
            raise ConfigError("config.json says what no model can be:\n  " + "\n  ".join(problems))
        return cfg

    def write(self, cfg: TransformerConfig) -> dict:
        """The config.json of a model; `lacks` tells what it leaves out."""
        hf = {"architectures": [self.classes.get(cfg.head)], "model_type": self.kind}
        for piece in self.pieces:
            hf |= piece.write(cfg)
        if cfg.head in self.labels:
            labels = [f"LABEL_{i}" for i in range(cfg.sizes["C"])]
            hf |= {"id2label": {str(i): label for i, label in enumerate(labels)},
                   "label2id": {label: i for i, label in enumerate(labels)}}
        return hf

    def head(self, hf: dict) -> str:
        listed = hf.get("architectures") or [next(iter(self.classes.values()))]
        if not isinstance(listed, list) or not isinstance(named := listed[0], str):
            raise ConfigError(f"config.json: architectures={listed!r}: a list of names is wanted, of "
                              f"{', '.join(self.classes.values())}")
        for head, cls in self.classes.items():
            if cls == named:
                return head
        near = difflib.get_close_matches(named, self.classes.values(), n=1, cutoff=0)[0]
        raise ConfigError(f"config.json: architecture {named!r} is not known: nearest is {near!r}, of "
                          f"{', '.join(self.classes.values())}")

    def lacks(self, cfg: TransformerConfig, tensors: set[str]) -> list[str]:
        """Settings of a model that this family cannot say, as lines; none where it can."""
        if cfg.head not in self.classes:
            return [f"model.head={cfg.head!r}", f"of {', '.join(self.classes)}"]
        try:
            told = settled(self.read(self.write(cfg), tensors))
        except ConfigError as error:
            return str(error).splitlines()
        return list(_differences(settled(cfg), told, "model."))


def of_type(kind: str | None) -> Family:
    """The family of a config.json's model_type."""
    if isinstance(kind, str) and kind in FAMILIES:
        return FAMILIES[kind]
    near = difflib.get_close_matches(str(kind), FAMILIES, n=1, cutoff=0)[0]
    raise ConfigError(f"config.json: model_type {kind!r} is not known: nearest is {near!r}, of {', '.join(FAMILIES)}")


def of_model(cfg: TransformerConfig, tensors: Callable[[Family], set[str]]) -> Family:
    """The first family that can say all of a model's settings; `tensors(family)` are the names it would write."""
    lacks = {}
    for kind, family in FAMILIES.items():
        try:
            lacks[kind] = family.lacks(cfg, tensors(family))
        except ConfigError as error:  # it has no name for some tensor
            lacks[kind] = [str(error)] * 10
        if not lacks[kind]:
            return family
    nearest = min(lacks, key=lambda kind: len(lacks[kind]))
    raise ConfigError("no family of published models has these settings; nearest is "
                      f"{nearest!r}, but for\n  " + "\n  ".join(lacks[nearest]))


def _differences(ours, told, prefix):
    for each in fields(ours):
        a, b = getattr(ours, each.name), getattr(told, each.name)
        if is_dataclass(a):
            yield from _differences(a, b, f"{prefix}{each.name}.")
        elif a != b:
            yield f"{prefix}{each.name}={a!r}, where it has {b!r}"


def _classes(stem: str, lm: str = "ForCausalLM", base: str = "Model", **more: str) -> dict[str, str]:
    heads = {"lm": lm, "none": base, "classes": "ForSequenceClassification", "tags": "ForTokenClassification",
             "span": "ForQuestionAnswering"} | more
    return {head: stem + cls for head, cls in heads.items() if cls}


SCORES = dict(classes="score", tags="score", span="qa_outputs")
CLASSIFIERS = dict(classes="classifier", tags="classifier", span="qa_outputs")
SIZES = dict(vocab_size="vocab", hidden_size="width", intermediate_size="hidden", num_hidden_layers="depth",
             num_attention_heads="heads", num_key_value_heads=("kv_heads", 0), head_dim=("head_size", 0),
             max_position_embeddings=("max_length", 2048))
ROTARY = (keys(**SIZES, rms_norm_eps=("norm_eps", 1e-6)), say.activation("hidden_act"), say.tied(False))
QWEN = dict(switch=True, layers=lambda hf, depth: "".join(
    "S" if i >= hf.get("max_window_layers", 28) else "F" for i in range(depth)))
NO_BIAS = fixed(attention_bias=False)
GEMMA = (keys(**SIZES, rms_norm_eps=("norm_eps", 1e-6)), say.activation("hidden_activation", "gelu_pytorch_tanh"),
         say.tied(True), say.query_scalar(), say.attention_bias(), fixed(use_bidirectional_attention=False),
         say.softcap("final_logit_softcapping", "logit_softcap"), always(
             norm_plus_one=True, norm_place="sandwich", table_scale="in"))
LAYER_NORMS = always(norm="layer", bias="all", gated=False, positions="learned")
BERT = (LAYER_NORMS, always(causal=False, norm_place="post", embed_norm=True))
BERT_SIZES = {key: SIZES[key] for key in SIZES if key not in ("num_key_value_heads", "head_dim")} | dict(
    layer_norm_eps=("norm_eps", 1e-12), max_position_embeddings="max_length")
OLD = {"span": "transformer."}  # a prefix from before there was one for all

_all = (
    Family("llama", _classes("Llama"), (*ROTARY, ropes.rope(), say.attention_bias(), fixed(mlp_bias=False)),
           lambda cfg: names.LLAMA, prefixes=OLD),
    Family("mistral", _classes("Mistral"), (*ROTARY, ropes.rope(), say.window(4096)), lambda cfg: names.LLAMA),
    Family("qwen2", _classes("Qwen2"), (*ROTARY, ropes.rope(), say.window(4096, **QWEN), always(bias="qkv")),
           lambda cfg: names.LLAMA, prefixes=OLD),
    Family("qwen3", _classes("Qwen3"), (*ROTARY, ropes.rope(), say.window(4096, **QWEN), say.attention_bias(),
                                        always(qk_norm=True)),
           lambda cfg: names.LLAMA, prefixes=OLD),
    Family("gemma2", _classes("Gemma2", span=""), (
        *GEMMA, ropes.rope(), say.softcap("attn_logit_softcapping", "attention_softcap", 50.0),
        say.window(4096, layers=lambda hf, depth: say.repeated("SF", depth))), lambda cfg: names.GEMMA),
    Family("gemma3_text", _classes("Gemma3", base="TextModel", classes="TextForSequenceClassification", tags="",
                                   span=""), (
        *GEMMA, ropes.local_rope(), say.softcap("attn_logit_softcapping", "attention_softcap"), always(qk_norm=True),
        say.window(4096, layers=lambda hf, depth: say.repeated(
            "S" * (hf.get("sliding_window_pattern", hf.get("_sliding_window_pattern", 6)) - 1) + "F", depth))),
        lambda cfg: names.GEMMA),
    Family("gpt2", _classes("GPT2", lm="LMHeadModel"), (
        LAYER_NORMS, keys(vocab_size="vocab", n_embd="width", n_layer="depth", n_head="heads", n_inner=("hidden", 0),
                          n_positions=("max_length", 1024), layer_norm_epsilon=("norm_eps", 1e-5)),
        say.activation("activation_function", "gelu_new", tanh="gelu_new"), say.tied(True),
        say.dropout("resid_pdrop", "embd_pdrop", "attn_pdrop"),
        say.choice("scale_attn_weights", "attention_scale", {True: 0.0, False: 1.0}, True),
        fixed(scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)),
        lambda cfg: names.GPT2, prefix="transformer.", inputs_first=True,
        passed_over=(r"h\.\d+\.attn\.(masked_)?bias$",), labels=SCORES | {"tags": "classifier"}),
    Family("bert", _classes("Bert", lm="", mlm="ForMaskedLM", mlm_pairs="ForPreTraining"), (
        *BERT, keys(**BERT_SIZES), say.token_types(), say.activation("hidden_act", "gelu"), say.tied(True),
        say.dropout("hidden_dropout_prob", "attention_probs_dropout_prob"),
        fixed(is_decoder=False, add_cross_attention=False, position_embedding_type="absolute")),
        lambda cfg: names.BERT, prefix="bert.", heads=names.BERT_HEAD, pools={"classes": "tanh"}, labels=CLASSIFIERS,
        seen=lambda tensors, head: {"pooler": "tanh"} if head == "none" and _pooled(tensors) else {},
        passed_over=(r"embeddings\.position_ids$", r"^cls\.predictions\.decoder\.")),
    Family("distilbert", _classes("DistilBert", lm="", mlm="ForMaskedLM"), (
        *BERT, keys(vocab_size="vocab", dim="width", hidden_dim="hidden", n_layers="depth", n_heads="heads",
                    max_position_embeddings=("max_length", 512)), say.activation("activation", "gelu"),
        say.tied(True), say.dropout("dropout", "attention_dropout"), always(norm_eps=1e-12)),
        lambda cfg: names.DISTILBERT, prefix="distilbert.", heads=names.DISTILBERT_HEAD, pools={"classes": "relu"},
        labels=CLASSIFIERS,
        passed_over=(r"embeddings\.position_ids$", r"^vocab_projector\.weight$")),
    Family("t5", _classes("T5", lm="ForConditionalGeneration"), (
        keys(vocab_size="vocab", d_model="width", d_kv="head_size", d_ff="hidden", num_heads="heads",
             relative_attention_num_buckets=("buckets", 32), relative_attention_max_distance=("farthest", 128),
             layer_norm_epsilon=("norm_eps", 1e-6)), say.t5(alone="T5ForTokenClassification"),
        say.dropout("dropout_rate"), always(positions="relative", attention_scale=1.0)),
        lambda cfg: names.t5(gated=cfg.gated, alone=not cfg.encoder_depth),
        prefix="", prefixes={"classes": "transformer.", "tags": "transformer."}, pools={"classes": "tanh"},
        heads={"unembed": "lm_head", "pool.dense": "classification_head.dense"},
        labels=CLASSIFIERS | {"classes": "classification_head.out_proj"},
        seen=lambda tensors, head: {"tied": "lm_head.weight" not in tensors},
        passed_over=(r"^(transformer\.)?(en|de)coder\.embed_tokens\.weight$",
                     r"EncDecAttention\.relative_attention_bias"),
        aliases={r"\b(en|de)coder\.embed_tokens\.weight$": "shared.weight"}),
    Family("mixtral", _classes("Mixtral"), (
        *ROTARY, ropes.rope(1e6), say.window(None), NO_BIAS,
        say.experts(keys(), num_local_experts=("moe.experts", 8), num_experts_per_tok=("moe.top_k", 2))),
        lambda cfg: names.MIXTRAL),
    Family("qwen3_moe", _classes("Qwen3Moe"), (
        *ROTARY, ropes.rope(), say.window(4096, switch=True), say.attention_bias(), always(qk_norm=True),
        say.experts(say.sparse_step(), **{"num_local_experts|num_experts": ("moe.experts", 128)},
                    num_experts_per_tok=("moe.top_k", 8), moe_intermediate_size=("moe.hidden", 768),
                    norm_topk_prob=("moe.normalized", False))),
        lambda cfg: names.QWEN_MOE, prefixes=OLD),
    Family("deepseek_v3", _classes("DeepseekV3", span=""), (
        *ROTARY, ropes.rope(sharper=True), NO_BIAS, say.latent(), always(**{
            "kv_heads": 0, "moe.score": "sigmoid", "moe.bias": True}),
        say.experts(say.first_dense(), n_routed_experts=("moe.experts", 256), num_experts_per_tok=("moe.top_k", 8),
                    moe_intermediate_size=("moe.hidden", 2048), norm_topk_prob=("moe.normalized", True),
                    n_shared_experts=("moe.shared", 1), routed_scaling_factor=("moe.scale", 2.5),
                    n_group=("moe.groups", 8), topk_group=("moe.top_groups", 4))),
        lambda cfg: names.DEEPSEEK if cfg.query_latent else names.DEEPSEEK_DIRECT),
)
FAMILIES = {family.kind: family for family in _all}


def _pooled(tensors: set[str]) -> bool:
    """Whether a BERT without a head of its own has a pooler."""
    return any(name.endswith("pooler.dense.weight") for name in tensors)
