"""Build the store that a config trains from, and show what is in it.

    python -m lm_jax.prepare --config=configs/tiny.py

`train` does this by itself; apart from it, the work needs no accelerator and can go on while one is busy.
"""

import rich.box
import rich.console
import rich.table

from lm_jax import command, errors
from lm_jax.config import DataConfig
from lm_jax.data import store


def main(argv):
    settings, _ = command.parse(argv, doc=__doc__)
    console = rich.console.Console()

    def say(line):
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    with console.status("preparing"):
        prepared = store.prepare(settings.data, say=say)
    for split in prepared.manifest["splits"]:
        console.print(contents(prepared, split))
    console.print(fates(prepared, settings.data))
    say(f"{prepared.path}: content {prepared.digest}, vocabulary of {prepared.tokenizer.vocab:,}")


def contents(prepared: store.Store, split: str) -> rich.table.Table:
    """Documents, bytes, tokens and rows of each source; nats a token where a source knows its true cost."""
    table = _table(split, "source", "docs", "bytes", "tokens", "B/token", "rows", "full", "nats")
    for tag, row in prepared.manifest["splits"][split].items():
        nats = "" if row["nats"] is None else f"{row['nats'] / row['tokens']:.4f}"
        table.add_row(tag, f"{row['docs']:,}", f"{row['bytes']:,}", f"{row['tokens']:,}",
                      f"{row['bytes'] / row['tokens']:.2f}", f"{row['rows']:,}", f"{row['utilisation']:.1%}", nats)
    return table


def fates(prepared: store.Store, data: DataConfig) -> rich.table.Table:
    """What became of the documents that the sources hold: kept and dropped together are all of them."""
    invalid = {"replace": "repaired", "drop": "dropped", "error": "found"}[data.invalid]
    table = _table("documents read", "source", "kept", "dropped: white space only", f"{invalid}: not UTF-8")
    for tag, report in prepared.manifest["read"].items():
        table.add_row(tag, *(f"{report.get(key, 0):,}" for key in ("documents", "empty", "invalid_utf8")))
    return table


def _table(title, first, *numbers):
    table = rich.table.Table(title=title, box=rich.box.SIMPLE, padding=(0, 1, 0, 0), title_justify="left")
    table.add_column(first)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


if __name__ == "__main__":
    errors.run(main)
