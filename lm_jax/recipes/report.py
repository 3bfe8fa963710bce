"""What a pretraining run says of itself: its manifest, its summary, a sample, and how it does beside xz."""

import dataclasses
import functools
import importlib.metadata
import lzma
import os
import platform
import shlex
import subprocess
from pathlib import Path

import jax
import numpy as np

from lm_jax import config, faults
from lm_jax.data.loader import validation
from lm_jax.inference.generate import generate
from lm_jax.inference.sampler import Sampler
from lm_jax.models import flops
from lm_jax.recipes.pretrain import Pretraining, attention, replicated, row_lengths

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "sentencepiece")
XZ_LIMIT = 64 * 2**20  # bytes of held-out text that are worth the minute xz takes
PROMPT, ANSWER = 32, 96  # tokens


def manifest(recipe: Pretraining, mesh: dict, before: dict | None) -> dict:
    """All that must be known to repeat a run or to compare it: config, code, data, libraries, devices, counts.

    `starts` has code, devices and faults on demand of each start of the run; those of earlier ones are `before`'s.
    """
    c, model = recipe.config, recipe.model_config
    device = jax.devices()[0]
    start = {"code_revision": _revision(), "versions": _versions(), "device": device.device_kind,
             "platform": device.platform, "devices": jax.device_count(), "processes": jax.process_count(), "mesh": mesh,
             "faults": _faults()}
    return {
        "config": config.to_dict(c), "config_digest": config.digest(config.to_dict(c)), "seed": c.seed,
        "data_digest": recipe.store.digest, "data": str(recipe.store.path), "tokenizer": recipe.store.tokenizer.digest,
        **start, "attention": attention(c), "starts": [*(before or {}).get("starts", []), start],
        "parameters": flops.parameters(model), "flops_per_token": _flops_per_token(recipe),
    }


def headline(recipe: Pretraining, mesh: dict) -> str:
    """What is about to be trained, on what, from what; and what of it falls short of what was asked for."""
    c, n = recipe.config, flops.parameters(recipe.model_config)
    short = "" if c.optim.warmup < c.train.steps else (
        f"\nthe warm-up of {c.optim.warmup} steps is not over when the run is: the peak learning rate is not reached")
    whole = ", ".join(replicated(dataclasses.replace(c, model=recipe.model_config)))
    short += f"\nsizes that do not divide their axis of the mesh, kept whole on each device: {whole}" if whole else ""
    short += f"\nfaults will be done to this run: {faults.VARIABLE}={_faults()}" if _faults() else ""
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1) or "one device"
    rows = c.train.batch * c.train.steps
    return (f"{c.name}: {n['total']:,} parameters ({n['non_embedding']:,} without embeddings), "
            f"{_flops_per_token(recipe):.3g} FLOPs a token; {jax.devices()[0].device_kind}, {axes}, "
            f"{recipe.model_config.dtype}, attention by {attention(c)}; "
            f"{c.train.steps:,} steps of {c.train.batch} rows of {sum(row_lengths(c)):,} tokens: "
            f"{rows / recipe.rows_available:.2f} passes over {recipe.store.manifest['name']}{short}")


def summary(recipe: Pretraining, run, status: str, results: dict, wall: float) -> dict:
    """The outcome of a run as a record; validation figures, and what xz reaches, are absent unless it ended well."""
    beside = xz(recipe) if status == "ok" else {}
    final = results.get("all") or next(iter(results.values()), {})
    return {"status": status, "steps": run.done, "tokens": run.done * run.recipe.tokens,
            "flops": run.done * run.recipe.flops, "flops_spent": (run.done - run.begun) * run.recipe.flops,
            "epochs": run.done * recipe.config.train.batch / recipe.rows_available, "seconds": run.meter.seconds,
            "compile_seconds": run.meter.compile_seconds, "rollbacks": run.rollbacks, "saves_left_out": run.unsaved,
            "wall_seconds": wall, **run.clock.account(), **final,
            "validation": results, **beside}


def xz(recipe: Pretraining) -> dict:
    """Bits per byte that `xz -9` reaches on the held-out text, for causal models, which can be compared with it."""
    able = recipe.config.data.objective == "causal" and 0 < _held_out_bytes(recipe) <= XZ_LIMIT
    return {"xz_bits_per_byte": _xz(recipe.store)} if able else {}


def sampled(recipe: Pretraining, model) -> str:
    """What the model makes of a held-out text: how it goes on, what it puts in the gaps."""
    data, tokenizer = recipe.config.data, recipe.store.tokenizer
    batch = next(validation(recipe.store, data, recipe.store.tags[0], batch=2, rows=1))
    show = _restored if recipe.config.model.encoder_depth else _continued if recipe.config.model.causal else _filled
    text = show(model, batch, tokenizer)
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)  # terminals obey some


def closing(summary: dict, workdir, argv: list[str]) -> str:
    """The last lines that a user reads: the outcome, and what to do next."""
    command = lambda *less: shlex.join(["python", "-m", "lm_jax.train", *_without(argv[1:], *less)])
    corpus = ("--config.data.sources", "--config.data.weights", "--config.data.epochs")
    lines = []
    if "val_loss" in summary:
        lines = [f"validation loss {summary['val_loss']:.4f} ± {summary['val_loss_stderr']:.4f} nats a token"
                 f" = {summary['val_bits_per_byte']:.3f} bits per byte"]
    if "true_loss" in summary:
        lines += [f"a perfect model of this source reaches {summary['true_loss']:.4f}, this one "
                  f"{summary['excess_loss']:.4f} more"]
    if "xz_bits_per_byte" in summary:
        lines += [f"xz -9 on the same held-out bytes: {summary['xz_bits_per_byte']:.3f} bits per byte"]
    folder = _shown(workdir.path)
    other = lambda word: shlex.quote(f"--workdir={folder}-{word}")
    lines += [f"{summary['status']}: {summary['steps']:,} steps, {summary['tokens']:,} tokens, {summary['flops']:.3g} "
              f"FLOPs, {summary['seconds']:.0f} s of training; everything is in {folder}"]
    steps = max(summary["steps"], 1)
    return "\n".join(lines + ["next:"] + {
        "ok": [f"  look at {folder}/plots/loss.png and {folder}/summary.json",
               f"  {command('--workdir', '--config.train.steps')} {other('long')} "
               f"--config.train.steps={2 * steps}   # twice as long",
               f"  {command('--workdir', *corpus)} {other('own')} '--config.data.sources=text:my/*.txt'"
               "   # your own text",
               "  python -m lm_jax.train --config=configs/tiny_bert.py   # an encoder; tiny_t5.py has both"],
        "stopped": [f"  {command()}   # the same command goes on at step {summary['steps']:,}"],
        "diverged": [f"  {command('--workdir')} {other('calm')} --config.optim.lr=...  # lower; more warm-up"],
    }[summary["status"]])


def _without(argv: list[str], *names: str) -> list[str]:
    """Arguments but for these flags, be they spelt --flag=value or --flag value."""
    kept, skip = [], False
    for argument in argv:
        if not skip and argument.split("=")[0] not in names:
            kept.append(argument)
        skip = not skip and argument in names
    return kept


def _continued(model, batch, tokenizer):
    """A held-out text's beginning, and the model's continuation at temperature 0.8."""
    prompt = {key: value[:1, :PROMPT] for key, value in batch.items() if key in ("tokens", "positions", "segments")}
    first = prompt["segments"][0] == prompt["segments"][0, 0]  # one document
    prompt = {key: value[:, first] for key, value in prompt.items()}
    ids = _answer(model, prompt, tokenizer, temperature=0.8)
    return f"sample, from a held-out beginning:\n{tokenizer.decode(prompt['tokens'][0])}▮{tokenizer.decode(ids)}"


def _filled(model, batch, tokenizer):
    """A held-out row with its hidden tokens in brackets: the model's, and the true one where it differs."""
    best = np.asarray(jax.jit(lambda m, b: m(b).argmax(-1))(model, batch))[0]
    words = []
    for token, target, guess, hidden in zip(batch["tokens"][0], batch["targets"][0], best, batch["weights"][0]):
        right = tokenizer.decode([target])
        wrong = "" if guess == target else f"{tokenizer.decode([guess])}≠"
        words.append(f"[{wrong}{right}]" if hidden else right)
    return "sample, hidden tokens in brackets, wrong guesses before their ≠:\n" + "".join(words[:4 * PROMPT])


def _restored(model, batch, tokenizer):
    """The gaps of a held-out row: the true text, and the model's greedy answer."""
    start = {key: batch[key][:1, :1] for key in ("tokens", "positions", "segments")}
    start["source"] = {key: value[:1] for key, value in batch["source"].items()}
    spell = lambda ids: "".join(" ▮ " if i in tokenizer.sentinels else tokenizer.decode([i]) for i in ids)
    true, ids = batch["targets"][0][:ANSWER], _answer(model, start, tokenizer, temperature=0.0)
    return f"sample, the gaps of a held-out row:\n{spell(true)}\nas the model fills them:\n{spell(ids)}"


def _answer(model, prompt, tokenizer, *, temperature):
    """Ids that the model writes after a prompt of one row, as many as its learned positions allow."""
    room = model.cfg.max_length - prompt["tokens"].shape[1] if model.cfg.positions == "learned" else ANSWER
    made = generate(model, prompt, Sampler(temperature), length=min(ANSWER, room), key=jax.random.key(0),
                    stop=tokenizer.eos, vocab=tokenizer.vocab)
    return np.asarray(made.tokens_BT)[0]


def _flops_per_token(recipe):
    tokens, source = row_lengths(recipe.config)
    return flops.train(recipe.model_config, tokens, source) / (tokens + source)


@functools.lru_cache(maxsize=1)  # runs that are made together share their store
def _xz(store) -> float:
    texts = "".join(text for tag in store.tags for text in store.held_out(tag)).encode()
    return 8 * len(lzma.compress(texts, preset=9)) / len(texts)


def _held_out_bytes(recipe):
    return sum(split["bytes"] for split in recipe.store.manifest["splits"]["validation"].values())


def _faults() -> str:
    return os.environ.get(faults.VARIABLE, "")


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def _revision() -> str:
    """The commit that the code is at, "+" if it differs from it, "unknown" outside a repository."""
    git = lambda *args: subprocess.run(["git", "-C", str(Path(__file__).parent), *args], capture_output=True, text=True)
    try:
        head, changed = git("rev-parse", "--short=12", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    except FileNotFoundError:
        return "unknown"
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "") if head.returncode == 0 else "unknown"


def _shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
