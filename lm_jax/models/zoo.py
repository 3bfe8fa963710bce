"""Settings with a name: published models, and a ladder of sizes. Plain dictionaries for `config.TransformerConfig`.

A config file says `c.model.update(zoo.get("llama-8b"))`. The vocabulary is the published one; a run that trains its own
tokenizer says `c.model.vocab = 0` after it.
"""

import copy
import difflib
import math

from lm_jax.config import ConfigError


def get(name: str) -> dict:
    """The settings of a published model, as a fresh dictionary. ConfigError names the nearest when there is none."""
    if name not in MODELS:
        near = difflib.get_close_matches(name.lower(), MODELS, n=1, cutoff=0)[0]
        raise ConfigError(f"no model named {name!r}: did you mean {near!r}? There are: {', '.join(MODELS)}")
    return copy.deepcopy(MODELS[name])


def ladder(*, depth: int = 0, params: float = 0) -> dict:
    """A decoder of the default kind (RMS, rotary, gated silu) of any size from 50k to 10B parameters, by one dial.

    `depth` is L; `params` is the number of parameters outside the embedding table and takes the nearest rung, so that
    depth and width never shrink when it grows; neighbours differ by a factor of 1.1 to 1.6 from 3M parameters on, and
    of up to 2.8 below. The rule keeps the aspect D / L (loss is flat around its optimum: Kaplan et al. 2020, fig. 5):

        D = 64 L, a multiple of H
        H = 16, from D = 192 on 32, from 512 on 64, from 2048 on 128
        F = 8/3 D, a multiple of H and of 32

    which makes about 12 L D^2 = 49152 L^3 parameters: 50k at L = 1, 50M at L = 10, 10B at L = 59.
    """
    if (depth > 0) == (params > 0):
        raise ConfigError(f"ladder(depth={depth}, params={params}): give exactly one of the two, above 0")
    if depth:
        if not 1 <= depth <= DEEPEST:
            raise ConfigError(f"ladder(depth={depth}): the rungs go from depth 1 to {DEEPEST}")
        return _rung(depth, 64 * depth)
    widths = (width for width in range(64, 64 * DEEPEST + 1, 16) if width % _head(width) == 0)
    rungs = [_rung(int(width / 64 + 0.5), width) for width in widths]
    smallest, largest = non_embedding(rungs[0]), non_embedding(rungs[-1])
    if not 0.8 * smallest <= params <= 1.2 * largest:
        raise ConfigError(f"ladder(params={params:g}): the rungs go from {smallest:,} to {largest:,} parameters")
    return min(rungs, key=lambda rung: abs(math.log(non_embedding(rung) / params)))


def non_embedding(rung: dict) -> int:
    """Parameters of a rung of the ladder outside the embedding table: attention, gated MLP and norms."""
    d, f = rung["width"], rung["hidden"]
    return rung["depth"] * (4 * d * rung["heads"] * rung["head_size"] + 3 * d * f + 2 * d) + d


DEEPEST = 60  # 10.6B parameters
_WIDTHS_TO_HEADS = ((2048, 128), (512, 64), (192, 32), (0, 16))  # from this width on, this H; 128 fills an MXU


def _head(width: int) -> int:
    return next(size for least, size in _WIDTHS_TO_HEADS if width >= least)


def _rung(depth: int, width: int) -> dict:
    head = _head(width)
    width = _round_up(width, head)
    hidden = _round_up(8 * width / 3, max(head, 32))
    return {"depth": depth, "width": width, "heads": width // head, "head_size": head, "hidden": hidden}


def _round_up(x: float, unit: int) -> int:
    return math.ceil(x / unit) * unit


def _gpt2(depth, width, heads):  # Radford et al. 2019
    return dict(vocab=50257, depth=depth, width=width, heads=heads, hidden=4 * width, norm="layer", norm_eps=1e-5,
                bias="all", activation="gelu_tanh", gated=False, positions="learned", max_length=1024, init_std=0.02)


def _llama(depth, width, heads, kv_heads, hidden, *, vocab=128256, length=8192, theta=5e5, **rope):  # Touvron 2023
    return dict(vocab=vocab, depth=depth, width=width, heads=heads, kv_heads=kv_heads, hidden=hidden, norm_eps=1e-5,
                max_length=length, rope=dict(theta=theta, **rope), tied=False)


def _mixtral(depth, width, heads, kv_heads, hidden, *, experts):  # Jiang et al. 2024
    llama = _llama(depth, width, heads, kv_heads, hidden, vocab=32000, length=32768, theta=1e6)
    return llama | dict(moe=dict(experts=experts, top_k=2))


def _qwen3(depth, width, heads, hidden, *, tied):  # Yang et al. 2025: norms on queries and keys, heads wider than D / N
    return dict(vocab=151936, depth=depth, width=width, heads=heads, kv_heads=8, head_size=128, hidden=hidden,
                qk_norm=True, max_length=32768, rope=dict(theta=1e6), tied=tied)


def _gemma2(depth, width, heads, kv_heads, hidden):  # Riviere et al. 2024
    return dict(vocab=256000, depth=depth, width=width, heads=heads, kv_heads=kv_heads, head_size=256, hidden=hidden,
                norm_place="sandwich", norm_plus_one=True, activation="gelu_tanh", attention_softcap=50.0,
                logit_softcap=30.0, window=4096, window_pattern="SF", table_scale="in", max_length=8192)


def _bert(depth, width, heads, *, types=2, head="mlm_pairs"):  # Devlin et al. 2019; Sanh et al. 2019
    return dict(vocab=30522, depth=depth, width=width, heads=heads, hidden=4 * width, causal=False, norm="layer",
                norm_place="post", norm_eps=1e-12, embed_norm=True, bias="all", activation="gelu", gated=False,
                positions="learned", max_length=512, types=types, head=head, dropout=0.1, init_std=0.02)


def _t5(depth, width, heads, hidden, *, head_size=64):  # Raffel et al. 2020
    return dict(vocab=32128, depth=depth, encoder_depth=depth, width=width, heads=heads, head_size=head_size,
                hidden=hidden, activation="relu", gated=False, positions="relative", attention_scale=1.0,
                table_scale="out", max_length=512, dropout=0.1)


def _t5_v1_1(depth, width, heads, hidden):  # Shazeer 2020: gated, an output table of its own, no dropout in pretraining
    t5 = _t5(depth, width, heads, hidden)
    return t5 | dict(activation="gelu_tanh", gated=True, tied=False, table_scale="none", dropout=0.0)


MODELS = {
    "gpt2-small": _gpt2(12, 768, 12),
    "gpt2-medium": _gpt2(24, 1024, 16),
    "gpt2-large": _gpt2(36, 1280, 20),
    "gpt2-xl": _gpt2(48, 1600, 25),
    "llama-1b": _llama(22, 2048, 32, 4, 5632, vocab=32000, length=2048, theta=1e4),  # TinyLlama, Zhang et al. 2024
    "llama-7b": _llama(32, 4096, 32, 32, 11008, vocab=32000, length=4096, theta=1e4),  # Llama 2
    "llama-8b": _llama(32, 4096, 32, 8, 14336),  # Llama 3, Dubey et al. 2024
    "llama-70b": _llama(80, 8192, 64, 8, 28672),
    "llama-3.2-1b": _llama(16, 2048, 32, 8, 8192, scaling="llama3", factor=32.0) | dict(tied=True),
    "qwen3-0.6b": _qwen3(28, 1024, 16, 3072, tied=True),
    "qwen3-1.7b": _qwen3(28, 2048, 16, 6144, tied=True),
    "qwen3-8b": _qwen3(36, 4096, 32, 12288, tied=False),
    "gemma-2-2b": _gemma2(26, 2304, 8, 4, 9216),
    "gemma-2-9b": _gemma2(42, 3584, 16, 8, 14336),
    "mixtral-8x7b": _mixtral(32, 4096, 32, 8, 14336, experts=8),
    "bert-base": _bert(12, 768, 12),
    "bert-large": _bert(24, 1024, 16),
    "distilbert": _bert(6, 768, 12, types=0, head="mlm"),
    "t5-small": _t5(6, 512, 8, 2048),
    "t5-base": _t5(12, 768, 12, 3072),
    "t5-large": _t5(24, 1024, 16, 4096),
    "t5-xl": _t5(24, 1024, 32, 16384, head_size=128),  # the paper's 3B
    "t5-xxl": _t5(24, 1024, 128, 65536, head_size=128),  # the paper's 11B
    "t5-v1.1-small": _t5_v1_1(8, 512, 6, 1024),
    "t5-v1.1-base": _t5_v1_1(12, 768, 12, 2048),
    "t5-v1.1-large": _t5_v1_1(24, 1024, 16, 2816),
    "t5-v1.1-xl": _t5_v1_1(24, 2048, 32, 5120),
    "t5-v1.1-xxl": _t5_v1_1(24, 4096, 64, 10240),
}
