"""Folders that speak: a run as a trainer leaves it, and a folder as transformers saves it, both tiny."""

import dataclasses
import json

import jax
import tiny
from flax import nnx

from lm_jax import config, hub
from lm_jax.checkpoint import Checkpoints
from lm_jax.data import build
from lm_jax.data.tokenizer_backends import Bytes
from lm_jax.workdir import Workdir

CHATML = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
          "+ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def settings(**model) -> config.Config:
    c = config.default()
    c.data.tokenizer, c.train.checkpoint_every = "byte", 10
    c.model.update(dict(width=16, heads=2, hidden=32, depth=1, max_length=256) | model)
    return config.resolve(c)


def parameters(c: config.Config, scale: float = 1.0) -> dict:
    model = tiny.model(**dataclasses.asdict(c.model) | dict(vocab=Bytes().vocab, rope=c.model.rope, moe=c.model.moe))
    return nnx.to_pure_dict(nnx.state(jax.tree.map(lambda w: scale * w, model)))


def run(folder, c: config.Config, checkpoints: dict[int, dict]):
    """A run's folder with what its trainer wrote at some steps."""
    tokenizer, workdir = Bytes(), Workdir(folder)
    tokenizer.save(str(folder / "store" / build.tokenizer_name(c.data)))
    workdir.write_json("config.json", config.to_dict(c))
    workdir.write_json("manifest.json", {"data": str(folder / "store"), "tokenizer": tokenizer.digest})
    saved = Checkpoints(folder / "checkpoints", keep=9)
    for step, tree in checkpoints.items():
        saved.save(step, tree, {})
    saved.close()
    return folder


def published(folder, *, template: str | None = CHATML):
    """A LLaMA of 300 tokens: bytes, and the special tokens of a chat; texts begin with <s>."""
    import tokenizers

    shown = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    made = tokenizers.Tokenizer(tokenizers.models.BPE({one: i for i, one in enumerate(sorted(shown))}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    cfg = tiny.settings(vocab=300, width=16, heads=2, hidden=32, depth=1, tied=False)
    hub.save(tiny.model(**dataclasses.asdict(cfg) | dict(rope=cfg.rope, moe=cfg.moe)), folder, like="")
    made.save(str(folder / "tokenizer.json"))
    told = {"bos_token": "<s>", "eos_token": {"content": "</s>"}} | ({"chat_template": template} if template else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 259]}))
    return folder


