"""How long does one sentence take a classifier of DistilBERT-base's shape, here and in transformers?

    python experiments/pipeline_speed.py          # needs torch and transformers: pip install -e ".[test-hf]"

Random weights, one sentence at a time, after a warm-up, both turn by turn in one process on the same cores. CPU time is
of all threads: where other programs take cores away it says more than the clock.
"""

import json
import pathlib
import statistics
import tempfile
import time

import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

import lm_jax
from lm_jax import hub
from lm_jax.hub import families
from lm_jax.models import transformer

SENTENCE = "i went to see this film with my whole family last night and we all thought that it was really very good ."
CONFIG = {"model_type": "distilbert", "architectures": ["DistilBertForSequenceClassification"], "vocab_size": 30522,
          "dim": 768, "hidden_dim": 3072, "n_layers": 6, "n_heads": 12, "max_position_embeddings": 512}
TURNS = 40


def main():
    with tempfile.TemporaryDirectory() as place:
        folder = made(pathlib.Path(place))
        ours = lm_jax.pipeline("text-classification", model=folder)
        theirs = transformers.pipeline("text-classification", model=str(folder), device="cpu")
        times, spent = ({"lm_jax": [], "transformers": []} for _ in range(2))
        for turn in range(5 + TURNS):
            for name, run in zip(times, (ours, theirs)):
                start, busy = time.perf_counter(), time.process_time()
                found = run(SENTENCE)
                times[name] += [time.perf_counter() - start] * (turn >= 5)
                spent[name] += [time.process_time() - busy] * (turn >= 5)
                print(name, found) if not turn else None
    for name, seconds in times.items():
        print(f"{name}: median {1000 * statistics.median(seconds):.1f} ms, fastest {1000 * min(seconds):.1f}, of CPU "
              f"{1000 * statistics.median(spent[name]):.1f}")
    ratio, cpu = (statistics.median(of["transformers"]) / statistics.median(of["lm_jax"]) for of in (times, spent))
    print(f"lm_jax is {ratio:.2f} times as fast as transformers {transformers.__version__} ({cpu:.2f} by CPU time)")


def made(folder: pathlib.Path) -> pathlib.Path:
    """Such a model, and a tokenizer that has the sentence's words."""
    cfg = families.of_type("distilbert").read(CONFIG, set())
    hub.save(transformer.make(cfg, seed=0), folder, like="")
    vocab = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *dict.fromkeys(SENTENCE.split())])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, "pad_token": "[PAD]",
         "model_input_names": ["input_ids", "attention_mask"]}))
    return folder


if __name__ == "__main__":
    main()
