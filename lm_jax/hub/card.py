"""A model's card: README.md of its folder, written from what its run has recorded."""

from pathlib import Path

import lm_jax.hub.store as store
from lm_jax.errors import DataError
from lm_jax.hub.folder import read_json

TASKS = {"lm": "text-generation", "mlm": "fill-mask", "mlm_pairs": "fill-mask", "classes": "text-classification",
         "tags": "token-classification", "span": "question-answering", "none": "feature-extraction"}


def of(run: Path, cfg, step: int):
    """The card of a run's model after so many steps; it has a method `save`."""
    hub = store.library()
    manifest, summary = (read_json(run / name) for name in ("manifest.json", "summary.json"))
    task = "text2text-generation" if cfg.encoder_depth else TASKS[cfg.head]
    data = hub.ModelCardData(library_name="transformers", pipeline_tag=task, tags=["lm_jax"])
    try:
        return hub.ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text(manifest, summary, step)}")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{run / 'manifest.json'} lacks what a card tells ({error!r}): bring back the run's "
                        "own") from error


def text(manifest: dict, summary: dict, step: int) -> str:
    """What a run has recorded, in words."""
    config, counts = manifest["config"], manifest["parameters"]
    train, data = config["train"], config["data"]
    rows = [
        ("parameters", f"{counts['total']:,} ({counts['non_embedding']:,} without embeddings)"),
        ("trained on", f"{data['sources']}, objective {data['objective']}, rows of {data['length']} tokens"),
        ("data digest", manifest["data_digest"]), ("tokenizer", f"{data['tokenizer']}, {manifest['tokenizer']}"),
        ("steps", f"{step:,} of {train['steps']:,}, {train['batch']} rows each"),
        ("optimizer", f"{config['optim']['name']}, learning rate {config['optim']['lr']:g}, "
                      f"{config['optim']['schedule']}"),
        ("seed", manifest["seed"]), ("code", manifest["code_revision"]),
        ("hardware", f"{manifest['devices']} x {manifest['device']}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())),
        ("config digest", manifest["config_digest"]),
    ]
    if summary.get("status") == "ok" and summary.get("steps") == step:
        rows += [("validation loss", f"{summary['val_loss']:.4f} ± {summary['val_loss_stderr']:.4f} nats a token"),
                 ("FLOPs", f"{summary['flops']:.3g}")]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"# {config['name']}\n\nTrained with lm_jax.\n\n| | |\n| --- | --- |\n{table}\n"
