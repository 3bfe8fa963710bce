"""config.json and the settings of the block, piece by piece and both ways.

A piece is a pair of functions: `read(hf)` gives settings (dotted names of TransformerConfig) for what a config.json
says, `write(cfg)` the entries that say them. transformers 5 writes `rope_parameters` and `layer_types` where 4 wrote
`rope_theta`, `rope_scaling` and a rule; both are read, and both are written.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from lm_jax.checks import value
from lm_jax.config import TransformerConfig
from lm_jax.errors import ConfigError
from lm_jax.models.stack import dense_or_experts, repeated


@dataclass(frozen=True)
class Piece:
    """Some settings and how a config.json says them."""

    read: Callable[[dict], dict]
    write: Callable[[TransformerConfig], dict]


NEEDED = object()  # no default: a config.json without this key is refused


def keys(**named) -> Piece:
    """hf_key="setting", or ("setting", default): as it is, None being 0; written as it is used.

    A key that was renamed is "key|older": the first that is there is read, and all are written.
    """
    table = {tuple(key.split("|")): (spec, NEEDED) if isinstance(spec, str) else spec for key, spec in named.items()}

    def read(hf):
        found = {words: next((word for word in words if word in hf), words[0]) for words in table}
        return {setting: needed(hf, found[words]) if default is NEEDED else hf.get(found[words], default) or 0
                for words, (setting, default) in table.items()}

    return Piece(read, lambda cfg: {
        word: _used(cfg, setting) for words, (setting, _) in table.items() for word in words})


def fixed(**named) -> Piece:
    """What config.json may only say one way, since the family has no other here."""
    def read(hf):
        for key, only in named.items():
            if hf.get(key, only) not in (only, None):
                raise ConfigError(f"config.json: {key}={hf[key]!r} is not supported, only {only!r}")
        return {}

    return Piece(read, lambda cfg: dict(named))


def always(**settings) -> Piece:
    """Settings that a family has whatever its config.json says."""
    return Piece(lambda hf: settings, lambda cfg: {})


def choice(key: str, setting: str, words: dict, default) -> Piece:
    """A word of config.json for a setting; the first of several words for one is what is written."""
    def read(hf):
        word = hf.get(key, default)
        if word not in words:
            near = difflib.get_close_matches(str(word), map(str, words), n=1, cutoff=0)[0]
            raise ConfigError(f"config.json: {key}={word!r} is not known: nearest is {near!r}, of "
                              f"{', '.join(map(repr, words))}")
        return {setting: words[word]}

    def write(cfg):
        found = [word for word, meant in words.items() if meant == value(cfg, setting)]
        return {key: found[0] if found else None}

    return Piece(read, write)


def activation(key: str, default: str = "silu", tanh: str = "gelu_pytorch_tanh") -> Piece:
    """The activation; `tanh` is what the family calls the approximation of gelu."""
    words = {"silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu", "relu2": "relu2", tanh: "gelu_tanh",
             "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
    return choice(key, "activation", words, default)


def softcap(key: str, setting: str, default=None) -> Piece:
    """A soft-cap, null for none."""
    return Piece(lambda hf: {setting: float(hf.get(key, default) or 0)}, lambda cfg: {key: value(cfg, setting) or None})


def dropout(*named: str) -> Piece:
    """One share of dropout under all its names, of which the first is read."""
    return Piece(lambda hf: {"dropout": float(hf.get(named[0], 0.1) or 0)},
                 lambda cfg: dict.fromkeys(named, cfg.dropout))


def tied(default: bool) -> Piece:
    return Piece(lambda hf: {"tied": bool(hf.get("tie_word_embeddings", default))},
                 lambda cfg: {"tie_word_embeddings": cfg.tied})


def window(default: int | None, *, switch: bool = False, layers: Callable[[dict, int], str] | None = None) -> Piece:
    """Which layers see a window: `layers(hf, depth)` says S or F for each where config.json lists none, else all do.

    With a `switch`, `use_sliding_window` must be on.
    """
    def read(hf):
        size = hf.get("sliding_window", default) or 0
        size = size if hf.get("use_sliding_window", False) or not switch else 0
        depth, listed = needed(hf, "num_hidden_layers"), hf.get("layer_types")
        if layers is None or not size:
            return {"window": size, "window_pattern": "S"}
        kinds = "".join(LAYER_TYPES[kind] for kind in listed) if listed else layers(hf, depth)
        return {"window": size if "S" in kinds else 0, "window_pattern": period(kinds) if "S" in kinds else "S"}

    def write(cfg):
        kinds = repeated(cfg.window_pattern if cfg.window else "F", cfg.depth)
        unused = default if layers and not switch else None  # Gemma's is a number even where no layer reads it
        said = {"sliding_window": cfg.window or unused}
        if switch:
            said |= {"use_sliding_window": cfg.window > 0, "max_window_layers": kinds.find("S") % (cfg.depth + 1)}
        if layers:
            said["layer_types"] = [next(name for name, kind in LAYER_TYPES.items() if kind == k) for k in kinds]
        return said

    return Piece(read, write)


LAYER_TYPES = {"sliding_attention": "S", "full_attention": "F"}


def experts(pattern: Piece, **named) -> Piece:
    """Settings of the experts: plain keys, and which layers have them."""
    plain = keys(**named)
    return Piece(lambda hf: plain.read(hf) | pattern.read(hf), lambda cfg: plain.write(cfg) | pattern.write(cfg))


def first_dense() -> Piece:
    """DeepSeek: the first few layers are dense."""
    def read(hf):
        first, depth = hf.get("first_k_dense_replace") or 0, needed(hf, "num_hidden_layers")
        return {"moe.pattern": period("D" * min(first, depth) + "E" * max(depth - first, 0))}

    return Piece(read, lambda cfg: {"first_k_dense_replace": dense_or_experts(cfg, cfg.depth).count("D")})


def sparse_step() -> Piece:
    """Qwen: every so many layers have experts, but for those that are listed."""
    def read(hf):
        step, dense = hf.get("decoder_sparse_step") or 1, hf.get("mlp_only_layers") or []
        return {"moe.pattern": period("".join("D" if i in dense or (i + 1) % step else "E"
                                              for i in range(needed(hf, "num_hidden_layers"))))}

    def write(cfg):
        letters = dense_or_experts(cfg, cfg.depth)
        return {"decoder_sparse_step": 1, "mlp_only_layers": [i for i, letter in enumerate(letters) if letter == "D"]}

    return Piece(read, write)


def attention_bias() -> Piece:
    return Piece(lambda hf: {"bias": "attention" if hf.get("attention_bias") else "none"},
                 lambda cfg: {"attention_bias": cfg.bias == "attention"})


def token_types() -> Piece:
    """BERT adds an embedding for the kind of a token, of which it has one at least."""
    def read(hf):
        if not (kinds := hf.get("type_vocab_size", 2)):
            raise ConfigError(f"config.json: type_vocab_size={kinds}: a BERT has one at least")
        return {"types": kinds}

    return Piece(read, lambda cfg: {"type_vocab_size": cfg.types})


def query_scalar() -> Piece:
    """Gemma: attention is divided by the root of a number, which may differ from H."""
    def write(cfg):
        scalar = (cfg.attention_scale or cfg.sizes["H"] ** -0.5) ** -2
        return {"query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-9 * scalar else scalar}

    return Piece(lambda hf: {"attention_scale": hf.get("query_pre_attn_scalar", 256) ** -0.5}, write)


def latent() -> Piece:
    """DeepSeek: sizes of latents, and of the parts of a head."""
    def read(hf):
        plain, turned = needed(hf, "qk_nope_head_dim"), needed(hf, "qk_rope_head_dim")
        return {"query_latent": hf.get("q_lora_rank") or 0, "latent": needed(hf, "kv_lora_rank"),
                "value_size": needed(hf, "v_head_dim"), "head_size": plain + turned,
                "rope.fraction": turned / (plain + turned), "rope.interleaved": bool(hf.get("rope_interleave", True))}

    def write(cfg):
        head, turned = cfg.sizes["H"], cfg.sizes["J"]
        return {"q_lora_rank": cfg.query_latent or None, "kv_lora_rank": cfg.latent, "v_head_dim": cfg.sizes["O"],
                "qk_nope_head_dim": head - turned, "qk_rope_head_dim": turned, "rope_interleave": cfg.rope.interleaved,
                "num_key_value_heads": cfg.heads, "head_dim": turned}

    return Piece(read, write)


def t5(*, alone: str) -> Piece:
    """T5's activation, which says whether it is gated, the scale before the output table, which 1.1 dropped, and its
    depths; the class `alone` has an encoder only."""
    words = {"relu": ("relu", False), "gelu": ("gelu", False), "gelu_new": ("gelu_tanh", False),
             "gated-gelu": ("gelu_tanh", True), "gated-gelu_new": ("gelu_tanh", True), "gated-silu": ("silu", True),
             "gated-relu": ("relu", True)}

    def read(hf):
        word = hf.get("feed_forward_proj", "relu")
        if word not in words:
            raise ConfigError(f"config.json: feed_forward_proj={word!r} is not known, only {', '.join(words)}")
        scaled = hf.get("scale_decoder_outputs", hf.get("tie_word_embeddings") is not False)
        layers = needed(hf, "num_layers")
        depths = {"depth": hf.get("num_decoder_layers") or layers, "encoder_depth": layers}
        if alone in (hf.get("architectures") or ()):
            depths = {"depth": layers, "causal": False}
        return {"activation": words[word][0], "gated": words[word][1], "table_scale": "out" if scaled else "none",
                **depths}

    def write(cfg):
        word = next((word for word, meant in words.items() if meant == (cfg.activation, cfg.gated)), None)
        scaled = cfg.table_scale == "out"
        return {"feed_forward_proj": word, "scale_decoder_outputs": scaled, "tie_word_embeddings": cfg.tied or scaled,
                "num_layers": cfg.encoder_depth or cfg.depth, "num_decoder_layers": cfg.depth,
                "is_encoder_decoder": cfg.encoder_depth > 0}

    return Piece(read, write)


def needed(hf: dict, key: str):
    if hf.get(key) is None:
        raise ConfigError(f"config.json has no {key!r}, which a model of type {hf.get('model_type')!r} needs")
    return hf[key]


def period(letters: str) -> str:
    """The shortest pattern that repeats to these letters."""
    patterns = (letters[:n] for n in range(1, len(letters) + 1))
    return next((pattern for pattern in patterns if repeated(pattern, len(letters)) == letters), letters)


def _used(cfg, setting):
    """A setting as the model uses it, where 0 stands for what follows from others."""
    sizes = {"kv_heads": "K", "head_size": "H", "hidden": "F", "value_size": "O"}
    if setting == "moe.hidden":
        return cfg.moe.hidden or cfg.sizes["F"]
    return cfg.sizes[sizes[setting]] if setting in sizes else value(cfg, setting)
