"""Generation and classification beside transformers: the same weights, prompts and sentence, in turns in one process.

Weights are random. Both sides open the same folder, which our hub writes.
"""

import contextlib
import json
import logging
import os
import tempfile
from pathlib import Path

import jax
import numpy as np

import lm_jax
from lm_jax import hub
from lm_jax.config import TransformerConfig
from lm_jax.hub import families
from lm_jax.inference.generate import generate, ready
from lm_jax.inference.sampler import Sampler
from lm_jax.measure import timing
from lm_jax.measure.figures import Figure, duration, rate
from lm_jax.measure.torch_reference import package
from lm_jax.models import transformer, zoo

PROMPT, NEW = 64, 64  # tokens
SENTENCE = "i went to see this film with my whole family last night and we all thought that it was really very good ."
DISTILBERT = {"model_type": "distilbert", "architectures": ["DistilBertForSequenceClassification"], "dim": 768,
              "vocab_size": 30522, "hidden_dim": 3072, "n_layers": 6, "n_heads": 12, "max_position_embeddings": 512}


def generation(rows: int, dtype: str, *, turns: int = timing.TURNS, prompt: int = PROMPT, new: int = NEW,
               say=timing.quiet, **shape) -> list[Figure]:
    """New tokens a second of greedy decoding with a cache, so many prompts at once; `shape` replaces GPT-2 small's."""
    transformers, torch = _packages()
    cfg = TransformerConfig(**zoo.get("gpt2-small") | {"dtype": "float32"} | shape)
    with tempfile.TemporaryDirectory() as folder:
        hub.save(transformer.make(cfg, seed=0), folder, like="")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        ours = jax.block_until_ready(jax.jit(ready)(hub.load(folder, weights=dtype, dtype=dtype)))
    ids = np.random.default_rng(0).integers(0, cfg.vocab, (rows, prompt))
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    theirs, batch, tokens = theirs.to(device), hub.batch(cfg, ids), torch.from_numpy(ids).to(device)
    answers = {}

    def ask():
        made = generate(ours, batch, Sampler(temperature=0.0), length=new, key=jax.random.key(0))
        answers["lm_jax"] = np.asarray(made.tokens_BT)

    def they_ask():
        with torch.inference_mode():
            made = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, pad_token_id=0,
                                   min_new_tokens=new, max_new_tokens=new, use_cache=True)
        answers["transformers"] = made[:, prompt:].cpu().numpy()

    seconds = timing.interleaved({"lm_jax": ask, "transformers": they_ask}, turns=turns, say=say)
    same = (answers["lm_jax"] == answers["transformers"]).mean()
    what = f"{rows} × {new} new tokens after {prompt}, greedy, {dtype}"
    return [*(rate(name, rows * new, s, "tokens/s", what) for name, s in seconds.items()),
            timing.times_as_fast("lm_jax is as fast, times", *seconds.values()),
            Figure("tokens that both wrote", 100 * float(same), "%", "random weights: near ties part for good")]


def classification(*, turns: int = timing.TURNS, **shape) -> list[Figure]:
    """Seconds of one sentence through the pipelines of both, words to labels; `shape` replaces DistilBERT-base's."""
    transformers, _ = _packages()
    with tempfile.TemporaryDirectory() as place:
        folder = classifier(Path(place), DISTILBERT | shape)
        ours = lm_jax.pipeline("text-classification", model=folder)
        theirs = transformers.pipeline("text-classification", model=str(folder), device="cpu")
        seconds = timing.interleaved({"lm_jax": lambda: ours(SENTENCE), "transformers": lambda: theirs(SENTENCE)},
                                     turns=turns, warm=5)
        scores = [run(SENTENCE)[0]["score"] for run in (ours, theirs)]
    what = f"a sentence of {len(SENTENCE.split())} words, float32"
    return [*(duration(name, s, what) for name, s in seconds.items()),
            timing.times_as_fast("lm_jax is as fast, times", *seconds.values()),
            Figure("difference of their scores", abs(scores[0] - scores[1]), "", "of one label")]


def classifier(folder: Path, settings: dict) -> Path:
    """A classifier of these settings, and a tokenizer that has the sentence's words."""
    tokenizers = package("tokenizers")
    cfg = families.of_type("distilbert").read(settings, set())
    hub.save(transformer.make(cfg, seed=0), folder, like="")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *dict.fromkeys(SENTENCE.split())]
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, "pad_token": "[PAD]",
         "model_input_names": ["input_ids", "attention_mask"]}))
    return folder


def _packages():
    """transformers and PyTorch, without their progress bars and advice."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all that is read is a folder here
    transformers, torch = package("transformers"), package("torch")
    transformers.logging.set_verbosity(logging.ERROR)
    with contextlib.suppress(AttributeError):
        transformers.logging.disable_progress_bar()
    return transformers, torch
