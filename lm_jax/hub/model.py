"""Models out of folders and into them, and the plain way to look at one."""

import contextlib
import difflib
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import lm_jax.hub.families as families
import lm_jax.hub.folder as folder
import lm_jax.hub.store as store
import lm_jax.hub.stream as stream
from lm_jax import parallel
from lm_jax.batch import Batch
from lm_jax.config import CHOICES, TransformerConfig
from lm_jax.errors import ConfigError, DataError
from lm_jax.hub.families import Family
from lm_jax.hub.places import places
from lm_jax.hub.settled import HOW, settled
from lm_jax.hub.tensors import BLOCK, Scaled
from lm_jax.models.transformer import Transformer

KEPT = ("float32", "bfloat16", "float16")  # types of weights


def load(folder_or_name, *, weights: str | None = None, say=print, **settings) -> Transformer:
    """The model of a folder as transformers saves it, or of a name (owner/name@revision), on the mesh in use.

    It computes in the type of its weights (float16 in float32), unless `dtype` is among the `settings`, which are those
    of `settled.HOW`. `weights` is the type that weights are kept in: None keeps each one's own, "float32" is what
    training wants. The model remembers the folder as its `origin`.
    Raises ConfigError or DataError where the folder is not one model, whole.
    """
    _check_settings({"weights": weights} if weights else {}, settings)
    where = store.path(folder_or_name)
    hf = folder.config(where)
    family = families.of_type(hf.get("model_type"))
    found = family.named(folder.read(where))
    _check_blocks(hf, found, where, say)
    cfg = replace(family.read(hf, set(found)), dtype=_computes(found))
    cfg = replace(cfg, **settings)
    wanted = places(cfg, family, _prefix(family, cfg, found))
    _check_tensors(where, {place.name: place.shape for each in wanted.values() for place in each}, found)
    _check_rest(where, hf, family, cfg, wanted, found, say)
    _check_tokenizer(where, cfg)
    graph, state = nnx.split(jax.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0))))
    dtype = jnp.dtype(weights) if weights else None
    filled = {way: leaf.replace(stream.parameter(leaf.get_value(), wanted[way], found, dtype))
              for way, leaf in nnx.to_flat_state(state)}
    model = nnx.merge(graph, nnx.from_flat_state(filled))
    model.origin = str(where.resolve())
    return model


def save(model: Transformer, path, *, like=None, shard: int = folder.SHARD):
    """Write a model as a folder that transformers and `load` read, each weight in the type that it has.

    `like` is a folder of the same model (default: the one it was loaded from; "" for none): its tokenizer and licence
    are copied, and its config.json where that says what the model is. Else the family is the first that can say all of
    the model's settings; ConfigError says what none can. Files hold at most `shard` bytes. A model that was in the
    folder is replaced whole: its tokenizer goes too.
    """
    if model.decoder.apart is not None:
        raise ConfigError("the model was taken apart to decode on a CPU: save the one it was made from, as hub.load "
                          "gives it")
    cfg, target = model.cfg, Path(path)
    like = getattr(model, "origin", "") if like is None else like
    params = {way: leaf.get_value() for way, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    family, hf = _said(cfg, like)
    if not all(leaf.is_fully_addressable for leaf in params.values()):
        raise ConfigError("the model is spread over several processes: load its checkpoint in one, and save it there")
    writer = stream.Writer(params, places(cfg, family, _own_prefix(family, cfg)))
    kept = params["embed", "table"].dtype.name
    hf |= {key: kept for key in ("dtype", "torch_dtype") if key in hf or not like}
    replaced = (target / "config.json").exists()
    folder.write(target, hf, writer.entries(), writer.tensor, shard=shard)
    if like or replaced:
        folder.copy(Path(like) if like else None, target, replaces=replaced)


def logits(model: Transformer, tokens, decoder_tokens=None) -> np.ndarray:
    """What a model's head gives for rows of ids, in float32: [B, T, V] over its vocabulary, [B, T, C] over the labels
    of tokens, [B, C] over those of rows; [B, T, D] of a model without a head.

    Rows may differ in length: what stands past the end of one means nothing. An encoder reads `tokens` and its decoder
    `decoder_tokens`, by default the one token 0 with which T5 begins, or, for labels, as in `labelled`. Products of
    float32 are whole ones on any device.
    """
    cfg = model.cfg
    if decoder_tokens is not None and not cfg.encoder_depth:
        raise ConfigError("decoder_tokens are of a model with an encoder and a decoder: pass all as tokens")
    if decoder_tokens is None and cfg.head in ("classes", "tags", "span"):
        rows = labelled(cfg, tokens)
    else:
        rows = batch(cfg, tokens)
        starts = [[0]] * len(rows["tokens"]) if decoder_tokens is None else decoder_tokens
        rows = batch(cfg, starts) | {"source": rows} if cfg.encoder_depth else rows
    with jax.default_matmul_precision("highest"):
        scores = np.asarray(_forward(model, rows), np.float32)
    return scores[:, 0] if cfg.head == "classes" else scores


def batch(cfg: TransformerConfig, tokens, types=None, *, width: int = 1) -> Batch:
    """A batch of rows of ids (and of token types, where the model has them), padded at their ends to a multiple of
    `width`."""
    rows = [_ids(row) for row in tokens]
    lengths = [len(row) for row in rows]
    if not rows or not min(lengths):
        raise ConfigError("a row without tokens: each needs one at least")
    longest = int(np.argmax(lengths))
    if cfg.positions == "learned" and lengths[longest] > cfg.max_length:
        raise ConfigError(f"row {longest} has {lengths[longest]} tokens and this model learned {cfg.max_length} "
                          "positions: cut it")
    for row in rows:
        if row.min() < 0 or row.max() >= cfg.vocab:
            wrong = next(i for i in row if not 0 <= i < cfg.vocab)
            raise ConfigError(f"token {wrong} is none of this model's {cfg.vocab}: is the tokenizer another model's?")
    T = -(-max(lengths) // width) * width
    padded = lambda rows: np.stack([np.pad(row, (0, T - len(row))) for row in rows]).astype(np.int32)
    made = {"tokens": padded(rows), "positions": padded(map(np.arange, lengths)),
            "segments": padded([np.ones(n, int) for n in lengths])}
    if cfg.types:
        made["types"] = padded([np.zeros(n, int) for n in lengths] if types is None else map(np.asarray, types))
    return made


def labelled(cfg: TransformerConfig, tokens, types=None, *, width: int = 1, start: int = 0) -> Batch:
    """A `batch` as heads of labels read it: the decoder of an encoder-decoder reads what its encoder does, one token
    behind."""
    rows = batch(cfg, tokens, types, width=width)
    if not cfg.encoder_depth:
        return rows
    return batch(cfg, [[start, *row[:-1]] for row in tokens], width=width) | {"source": rows}


def _ids(row) -> np.ndarray:
    """A row of ids as int64."""
    try:
        ids = np.asarray(row)
    except ValueError:  # of rows in it that differ in length
        ids = np.array(None)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ConfigError(f"{repr(row)[:60]} is no row of ids: pass a list of rows, each a list of whole numbers, such "
                          "as [[1, 2, 3]]")
    return ids.astype(np.int64)


@jax.jit
def _forward(model, rows):
    return model(jax.tree.map(lambda a_BT: parallel.constrain(a_BT, "BT"), rows))


def _said(cfg, like) -> tuple[Family, dict]:
    """The family of a model and its config.json."""
    if like:
        if not Path(like).is_dir():
            raise ConfigError(f"{like}, which the model was loaded from, is gone: pass like= a folder with its "
                              "tokenizer, or like='' to write none")
        hf = folder.config(Path(like))
        family = families.of_type(hf.get("model_type"))
        hf.pop("quantization_config", None)  # numbers of 8 bits were read as what they stand for
        with contextlib.suppress(ConfigError):  # of a family that has other names or settings than the model has by now
            if settled(family.read(hf, _names(cfg, family))) == settled(cfg):
                return family, hf
    family = families.of_model(cfg, partial(_names, cfg))
    return family, family.write(cfg)


def _names(cfg, family) -> set[str]:
    """What a family would call a model's tensors."""
    return {place.name for each in places(cfg, family, _own_prefix(family, cfg)).values() for place in each}


def _own_prefix(family, cfg) -> str:
    """What names of a body begin with; those of a model without a head with nothing."""
    return "" if cfg.head == "none" else family.prefixes.get(cfg.head, family.prefix)


def _prefix(family, cfg, found) -> str:
    """What names of the body begin with in a file, which may be of a class with another prefix."""
    embed = family.body(cfg)["embed"] + ".weight"
    own = _own_prefix(family, cfg)
    likely = (own, family.prefix, "", *family.prefixes.values())
    return next((prefix for prefix in likely if prefix + embed in found), own)


def _computes(found) -> str:
    """The type to compute in: bfloat16 where most of the weights are, else float32."""
    sizes = {}
    for tensor in found.values():
        sizes[tensor.dtype.name] = sizes.get(tensor.dtype.name, 0) + int(np.prod(tensor.shape))
    return "bfloat16" if sizes and max(sizes, key=sizes.get) == "bfloat16" else "float32"


def _check_settings(weights, settings):
    """Refuse settings that are unknown, or that change what a model is."""
    for key in settings.keys() - HOW:
        near = difflib.get_close_matches(key, HOW, n=1, cutoff=0)[0]
        raise ConfigError(f"{key}={settings[key]!r}: only {', '.join(HOW)} can be set where a model is loaded; nearest "
                          f"is {near!r}")
    choices = {key: CHOICES[f"model.{key}"] for key in HOW if f"model.{key}" in CHOICES} | {"weights": KEPT}
    for key, value in (weights | settings).items():
        if key in choices and value not in choices[key]:
            raise ConfigError(f"{key}={value!r}: choose one of {', '.join(choices[key])}")
    if not (isinstance(dropout := settings.get("dropout", 0), (int, float)) and 0 <= dropout < 1):
        raise ConfigError(f"dropout={dropout!r}: at least 0 and below 1")


def _check_blocks(hf, found, where, say):
    """Refuse numbers of 8 bits in other blocks than are read; say that others than those on disk will be kept."""
    if small := [name for name, tensor in found.items() if isinstance(tensor, Scaled)]:
        told = hf.get("quantization_config")
        block = isinstance(told, dict) and told.get("weight_block_size") or [BLOCK, BLOCK]
        if block != [BLOCK, BLOCK]:
            raise ConfigError(f"{where}: weight_block_size={block!r} in its config.json: only [{BLOCK}, {BLOCK}] can "
                              "be read; fetch the model in bfloat16")
        say(f"{where}: {len(small)} tensors of 8 bits a number are kept as the bfloat16 that they stand for, such as "
            f"{min(small)}")


def _check_tensors(where, wanted, found):
    """Refuse a folder that lacks a tensor, or has one of another shape."""
    if missing := sorted(wanted.keys() - found.keys()):
        near = sorted(found.keys() - wanted.keys())
        raise DataError(f"{where} lacks {len(missing)} of the model's {len(wanted)} tensors, such as {missing[0]!r} of "
                        f"{list(wanted[missing[0]])}" + (f"; it has {near[0]!r}" if near else "") +
                        ": is config.json another model's?")
    wrong = [f"{name}: {list(shape)} expected, {list(found[name].shape)} found"
             for name, shape in sorted(wanted.items()) if found[name].shape != shape]
    if wrong:
        more = [f"and {len(wrong) - 5} more"] if len(wrong) > 5 else []
        raise DataError(f"{where} has tensors of other shapes than its config.json says:\n  " +
                        "\n  ".join(wrong[:5] + more))


def _check_rest(where, hf, family, cfg, wanted, found, say):
    """Refuse tensors that nobody knows; those of heads that this model lacks are left out, and it is said so."""
    known = {place.name for each in wanted.values() for place in each}
    rest = {name for name in found.keys() - known if not any(re.search(each, name) for each in family.passed_over)}
    others = tuple(f"{name}." for name in [*family.heads.values(), *family.labels.values()])
    body = _prefix(family, cfg, found)
    others += tuple(body + name + "." for name in family.body(cfg).values() if "{" not in name)
    layers = range(cfg.depth, cfg.depth + (hf.get("num_nextn_predict_layers") or 0))  # they predict tokens further on
    others += tuple(f"{body}layers.{i}." for i in layers)
    if unknown := sorted(name for name in rest if not name.startswith(others)):
        raise DataError(f"{where} has {len(unknown)} tensors that a {hf['model_type']} of {cfg.depth} layers has not, "
                        f"such as {unknown[0]!r} of {list(found[unknown[0]].shape)}: is config.json another model's?")
    if rest:
        say(f"{where}: {len(rest)} tensors that {family.classes[cfg.head]} has no use for are left out, such as "
            f"{min(rest)}")


def _check_tokenizer(where, cfg):
    """Refuse a tokenizer that gives ids for which there are no embeddings."""
    if (ids := folder.tokens(where)) > cfg.vocab:
        raise ConfigError(f"{where}: its tokenizer has {ids} ids and the model {cfg.vocab}: one of them is another "
                          "model's")
