"""Runs as a table, from anybody's CSV or from runs.jsonl: N, D, C, loss, and how N and C were counted.

A CSV names its columns; those that mean something here are KNOWN, under any of their names. A record of runs.jsonl may
hold more than is read. Whatever is wrong is said with its line; nothing is left out in silence: `Table.notes` tells.
"""

import csv
import dataclasses
import difflib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lm_jax import disk
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
SPOILT = ("diverged", "under-cooled")  # flags of a run whose loss is not what its N and D can reach
NUMBERS = ("N", "D", "C", "U", "loss", "bits_per_byte", "epochs", "lr", "batch")


@dataclass(frozen=True)
class Table:
    """Rows of runs by column; `lines` are theirs in the file, `notes` what a reader must know of how it was read."""

    columns: dict[str, np.ndarray]
    lines: np.ndarray
    source: str = "a table"
    digest: str = ""
    params_convention: str = "as the table gives it"
    flops_convention: str = "6 N D"
    unit: str = "nats per token"
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]

    def __contains__(self, name: str) -> bool:
        return name in self.columns

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def loss(self) -> np.ndarray:
        return self.columns["loss"]

    @property
    def conventions(self) -> str:
        return f"N {self.params_convention}; C {self.flops_convention}; loss in {self.unit}"

    def take(self, rows, *notes: str) -> "Table":
        columns = {name: column[rows] for name, column in self.columns.items()}
        return dataclasses.replace(self, columns=columns, lines=self.lines[rows], notes=self.notes + notes)

    def finals(self) -> "Table":
        """Of a run with several rows (a training curve) the last; all rows where every run has one."""
        if "run" not in self:
            return self
        last = {run: i for i, run in sorted(enumerate(self["run"]), key=lambda pair: self["D"][pair[0]])}
        same = [i for i, run in enumerate(self["run"]) if self["D"][i] == self["D"][last[run]]]
        left = len(self) - len(same)
        return self.take(same, f"{left} rows inside training curves are not end points") if left else self


def read(path, *, where: Mapping[str, str] | None = None, ignore: tuple[str, ...] = (), params: str = "total",
         loss: str = "loss") -> Table:
    """The table in a CSV or JSON-lines file.

    `where` {column: value} keeps the rows that have it, `ignore` names columns to pass over, `params` is the count to
    take where records have several, `loss` may be "bits_per_byte". Raises DataError with the line of what is damaged,
    ConfigError for columns that are missing or unknown.
    """
    path = Path(path)
    where = {NAMES.get(name, name): value for name, value in (where or {}).items()}
    if not path.is_file():
        raise ConfigError(f"no table at {path}: pass a CSV with the columns params, tokens, loss, or a runs.jsonl")
    rows = list(_records(path, params) if path.suffix in (".jsonl", ".json") else _csv(path, where, ignore))
    if not rows:
        raise DataError(f"{path} has no rows: nothing was run, or it was cut off")
    kept = [(line, row) for line, row in rows if all(_same(row.get(k), v, k, path) for k, v in where.items())]
    notes = [f"{len(kept)} of {len(rows)} rows have {', '.join(f'{k}={v}' for k, v in where.items())}"] if where else []
    out = [(line, row) for line, row in kept if not _left_out(row)]
    notes += [f"{len(kept) - len(out)} rows left out (excluded, flagged, or status not ok): lines "
              + _some([line for line, row in kept if _left_out(row)])] if len(out) < len(kept) else []
    if not out:
        raise DataError(f"{path}: no row is left of {len(rows)}: {'; '.join(notes)}")
    return from_rows(out, source=str(path), digest=disk.sha256(path), loss=loss, notes=tuple(notes), params=params)


def from_rows(rows: list[tuple[int, dict]], *, source: str = "a table", digest: str = "", loss: str = "loss",
              notes: tuple[str, ...] = (), params: str = "") -> Table:
    """A table of (line, row) pairs, whose keys are those of KNOWN."""
    lines = np.array([line for line, _ in rows])
    present = [name for name in KNOWN if any(_given(row.get(name)) for _, row in rows)]
    for name in ("N", "D", loss):
        if name not in present:
            raise ConfigError(f"{source} has no column for {name}: name it {' or '.join(KNOWN[name])}")
    columns = {}
    for name in present:
        values = [row.get(name) for _, row in rows]
        missing = [line for line, value in zip(lines, values) if not _given(value)]
        if missing and name in ("N", "D"):
            raise DataError(f"{source}: no {KNOWN[name][0]} on lines {_some(missing)}: fill it in or take the row out")
        if name in NUMBERS:
            columns[name] = np.array([_number(v, name, line, source) for v, line in zip(values, lines)])
        else:
            columns[name] = np.array([str(v) if _given(v) else "" for v in values])
    columns["loss"] = columns[loss]
    for name in ("N", "D", "C", "U"):
        if name in columns and not (partial := np.isfinite(columns[name]) & (columns[name] > 0)).all():
            raise DataError(f"{source}: {KNOWN[name][0]} is not a positive number on lines {_some(lines[~partial])}")
    said = {row["params_convention"] for _, row in rows if row.get("params_convention")}
    unit = "bits per byte" if loss == "bits_per_byte" else "nats per token"
    table = Table(columns, lines, source, digest, unit=unit, notes=notes,
                  params_convention=said.pop() if len(said) == 1 else "as the table gives it")
    return _alone(_computed(table))


def _computed(table: Table) -> Table:
    """With C where the table has none, the convention of C, and U where it can be told."""
    columns = dict(table.columns)
    product = 6 * columns["N"] * columns["D"]
    convention = "6 N D"
    if "C" not in columns:
        columns["C"] = product
    elif np.abs(columns["C"] / product - 1).max() > 0.02:
        ratio = columns["C"] / product
        convention = f"as the table gives it ({ratio.min():.2f} to {ratio.max():.2f} times 6 N D)"
    said = set(columns.get("flops_convention", ())) - {""}
    convention = said.pop() if len(said) == 1 else convention
    if "U" not in columns and "epochs" in columns:
        columns["U"] = columns["D"] / np.maximum(columns["epochs"], 1.0)
    if "U" in columns:
        columns["U"] = np.minimum(columns["U"], columns["D"])  # tokens that were never reached don't count
    return dataclasses.replace(table, columns=columns, flops_convention=convention)


def _alone(table: Table) -> Table:
    """Without rows that say the same twice; DataError for two that disagree and nothing tells apart."""
    tells = [name for name in ("N", "D", "U", "seed", "run", "lr", "batch") if name in table]
    seen, rows = {}, []
    for i, key in enumerate(zip(*(table[name] for name in tells))):
        first = seen.setdefault(key, i)
        if first == i:
            rows.append(i)
        elif table.loss[i] != table.loss[first] and not np.isnan(table.loss[[i, first]]).all():
            raise DataError(f"{table.source}: lines {table.lines[first]} and {table.lines[i]} are the same point "
                            f"({', '.join(tells)}) with losses {table.loss[first]:g} and {table.loss[i]:g}: give a "
                            "column seed or run if both are true, or take one out")
    twice = len(table) - len(rows)
    return table.take(rows, f"{twice} rows say what another said already") if twice else table


def _csv(path: Path, where: Mapping, ignore: tuple[str, ...]) -> Iterator[tuple[int, dict]]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        header = [name.strip() for name in next(reader, [])]
        names = [NAMES.get(name.lower(), name) for name in header]
        for name, key in zip(header, names):
            if key not in KNOWN and name not in {*where, *ignore}:
                near = difflib.get_close_matches(name.lower(), NAMES, n=1)
                raise ConfigError(f"{path}: unknown column {name!r}" + (f", is it {near[0]!r}?" if near else "")
                                  + f" Rename it, or pass --ignore={name} or --where={name}=VALUE")
            if names.count(key) > 1:
                raise ConfigError(f"{path}: {name!r} is a second column for {key}: take one of them out")
        for row in reader:
            if len(row) != len(header):
                raise DataError(f"{path}, line {reader.line_num}: {len(row)} values for {len(header)} columns: the row "
                                "is half-written; mend or delete it")
            yield reader.line_num, dict(zip(names, (value.strip() for value in row)))


def _records(path: Path, params: str) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number} is half-written or no JSON ({error}): delete the line, and the "
                            "sweep that wrote it runs the point again") from error
        if not isinstance(record, dict) or not record:
            raise DataError(f"{path}, line {number} is no record of a run: it is {str(record)[:40]!r}; delete the line")
        row = {NAMES[name]: value for name, value in record.items() if name in NAMES}
        if isinstance(row.get("N"), dict):  # counts under several conventions
            if params not in row["N"]:
                raise ConfigError(f"{path}, line {number}: no count {params!r} of parameters, only "
                                  f"{', '.join(row['N'])}: pass one of these as --params")
            row |= {"N": row["N"][params], "params_convention": params}
        yield number, row


def _left_out(row: Mapping) -> bool:
    spoilt = any(flag in str(row.get("flags")) for flag in SPOILT)
    excluded = str(row.get("excluded") or "0").lower() in ("1", "1.0", "true", "yes")
    return excluded or spoilt or (row.get("status") or "ok") != "ok"


def _same(value, wanted: str, name: str, path) -> bool:
    if value is None:
        raise ConfigError(f"{path} has no column {name!r} to select by")
    try:
        return float(value) == float(wanted)
    except ValueError:
        return str(value) == wanted


def _given(value) -> bool:
    return value is not None and value != ""


def _number(value, name: str, line: int, source: str) -> float:
    """A number, NaN for nothing: whether that may be is for the fit to say."""
    try:
        return float(value) if _given(value) else math.nan
    except (TypeError, ValueError):
        raise DataError(f"{source}, line {line}: {name} is {str(value)[:40]!r}, not a number") from None


def _some(lines) -> str:
    lines = list(map(str, lines))
    return ", ".join(lines[:8]) + (f" and {len(lines) - 8} more" if len(lines) > 8 else "")
