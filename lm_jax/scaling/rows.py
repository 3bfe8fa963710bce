"""Lines of a file as rows of a table: a CSV that names its columns, or the records of runs.jsonl.

Columns that mean something here are KNOWN, under any of their names; a record may hold more than is read. Whatever is
damaged is said with its line.
"""

import csv
import difflib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lm_jax.errors import ConfigError, DataError

# What a column may be called. The first name is its own; N, D, U, C are the letters of the laws.
KNOWN = {
    "N": ("params", "parameters", "n", "n_params", "num_params", "model_size"),
    "D": ("tokens", "d", "training_tokens", "n_tokens", "num_tokens"),
    "C": ("flops", "c", "compute", "training_flops"),
    "U": ("unique_tokens", "unique", "u"),
    "loss": ("loss", "val_loss", "final_loss"),
    "bits_per_byte": ("bits_per_byte", "val_bits_per_byte", "bpb"),
    "epochs": ("epochs",), "lr": ("lr", "learning_rate"), "batch": ("batch", "batch_tokens"), "seed": ("seed",),
    "run": ("run", "id", "name"), "status": ("status",), "excluded": ("excluded",), "flags": ("flags",),
    "tokenizer": ("tokenizer",), "code_revision": ("code_revision",), "data_digest": ("data_digest",),
    "params_convention": ("params_convention",), "flops_convention": ("flops_convention",),
}
NAMES = {alias: key for key, aliases in KNOWN.items() for alias in aliases}
NUMBERS = ("N", "D", "C", "U", "loss", "bits_per_byte", "epochs", "lr", "batch")
SPOILT = ("diverged", "under-cooled")  # flags of a run whose loss is not what its N and D can reach
Row = tuple[int, dict]  # its line, and its values by the keys of KNOWN


def read(path: Path, *, where: Mapping[str, str], ignore: Sequence[str], params: str) -> list[Row]:
    """All rows of a file; columns in `ignore` are passed over, those in `where` may be of any name."""
    try:
        rows = list(_records(path, params) if path.suffix in (".jsonl", ".json") else _csv(path, where, ignore))
    except (UnicodeError, csv.Error) as error:
        raise DataError(f"{path} is no text in UTF-8 ({error}): pass a CSV or a runs.jsonl") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    passed = {NAMES.get(name.lower(), name) for name in ignore}
    return [(line, {key: value for key, value in row.items() if key not in passed}) for line, row in rows]


def left_out(row: Mapping) -> str:
    """Why a row says nothing of the law, or nothing."""
    if str(row.get("excluded") or "0").lower() in ("1", "1.0", "true", "yes"):
        return "excluded"
    status = row.get("status") or "ok"
    return next((flag for flag in SPOILT if flag in str(row.get("flags"))), status if status != "ok" else "")


def given(value) -> bool:
    return value is not None and value != ""


def number(value, name: str, line: int, source: str) -> float:
    """A number, NaN for nothing: whether that may be is for the fit to say."""
    try:
        return float(value) if given(value) else math.nan
    except (TypeError, ValueError):
        raise DataError(f"{source}, line {line}: {name} is {str(value)[:40]!r}, not a number") from None


def some(lines) -> str:
    lines = list(map(str, lines))
    return ", ".join(lines[:8]) + (f" and {len(lines) - 8} more" if len(lines) > 8 else "")


def _csv(path: Path, where: Mapping, ignore: Sequence[str]) -> Iterator[Row]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        header = [name.strip() for name in next(reader, [])]
        names = [name if name in ignore else NAMES.get(name.lower(), name) for name in header]
        if len(header) == 1 and any(mark in header[0] for mark in ";\t|"):
            raise ConfigError(f"{path} has one column, {header[0]!r}: separate columns by commas")
        for name, key in zip(header, names):
            if key not in KNOWN and name not in {*where, *ignore}:
                near = difflib.get_close_matches(name.lower(), NAMES, n=1)
                raise ConfigError(f"{path}: unknown column {name!r}" + (f", is it {near[0]!r}?" if near else "")
                                  + f" Rename it, or pass --ignore={name} or --where={name}=VALUE")
            if names.count(key) > 1:
                raise ConfigError(f"{path}: {name!r} is a second column for {key}: take one of them out")
        for row in reader:
            if not row:
                continue  # an empty line
            if len(row) != len(header):
                raise DataError(f"{path}, line {reader.line_num}: {len(row)} values for {len(header)} columns: the row "
                                "is half-written; mend or delete it")
            yield reader.line_num, dict(zip(names, (value.strip() for value in row)))


def _records(path: Path, params: str) -> Iterator[Row]:
    for line, text in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except ValueError as error:
            raise DataError(f"{path}, line {line} is half-written or no JSON ({error}): delete the line, and the "
                            "sweep that wrote it runs the point again") from error
        if not isinstance(record, dict) or not record:
            raise DataError(f"{path}, line {line} is no record of a run: it is {str(record)[:40]!r}; delete the line")
        known = [name for name in record if name in NAMES]
        row = {NAMES[name]: record[name] for name in known}
        if len(row) < len(known):
            twice = [name for name in known if sum(NAMES[other] == NAMES[name] for other in known) > 1]
            raise ConfigError(f"{path}, line {line}: {' and '.join(twice)} say the same: keep one of them")
        if isinstance(row.get("N"), dict):  # counts under several conventions
            if params not in row["N"]:
                raise ConfigError(f"{path}, line {line}: no count {params!r} of parameters, only "
                                  f"{', '.join(row['N'])}: pass one of these as --params")
            row |= {"N": row["N"][params], "params_convention": params}
        yield line, row
