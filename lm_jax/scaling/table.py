"""Runs as a table, from anybody's CSV or from runs.jsonl: N, D, C, loss, and how N and C were counted.

What a column may be called is in `rows.KNOWN`. Nothing is left out in silence: `Table.notes` tells.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lm_jax import disk
from lm_jax.errors import ConfigError, DataError
from lm_jax.scaling import curves, rows
from lm_jax.scaling.curves import Curve
from lm_jax.scaling.rows import KNOWN, NAMES, NUMBERS, Row, given, some


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
    recorded: tuple[Curve, ...] = ()  # training curves that are not rows

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

    @property
    def curves(self) -> tuple[Curve, ...]:
        """Training curves: of its rows, or recorded by its runs."""
        return curves.within(self.columns) or tuple(curve for curve in self.recorded if curve.run in self["run"])

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

    def tuned(self) -> "Table":
        """Of runs that differ in their learning rate or batch alone the lowest: what their N and D can reach."""
        alike = [name for name in ("N", "D", "U", "seed") if name in self]
        groups = {}
        for i, key in enumerate(zip(*(self[name] for name in alike))):
            groups.setdefault(key, []).append(i)
        varies = lambda group: any(len(set(self[name][group])) > 1 for name in ("lr", "batch") if name in self)
        best = lambda group: [min(group, key=lambda i: self.loss[i])] if varies(group) else group
        kept = sorted(i for group in groups.values() for i in best(group))
        lost = len(self) - len(kept)
        return self.take(kept, f"{lost} rows are of learning rates or batches that another one beats at their N and D: "
                         "laws are of the best") if lost else self


def read(path, *, where: Mapping[str, str] | None = None, ignore: tuple[str, ...] = (), params: str = "total",
         loss: str = "loss") -> Table:
    """The table in a CSV or JSON-lines file, with the training curves that are beside it.

    `where` {column: value} keeps the rows that have it, `ignore` names columns to pass over, `params` is the count to
    take where records have several, `loss` may be "bits_per_byte". Raises DataError with the line of what is damaged,
    ConfigError for columns that are missing or unknown.
    """
    path = Path(path)
    where = {NAMES.get(name, name): value for name, value in (where or {}).items()}
    if not path.is_file():
        raise ConfigError(f"no table at {path}: pass a CSV with the columns params, tokens, loss, or a runs.jsonl")
    found = rows.read(path, where=where, ignore=ignore, params=params)
    if not found:
        raise DataError(f"{path} has no rows: nothing was run, or it was cut off")
    for name in where:
        if not any(name in row for _, row in found):
            raise ConfigError(f"{path} has no column {name!r} to select by")
    kept = [(line, row) for line, row in found if all(_same(row.get(name), value) for name, value in where.items())]
    asked = ", ".join(f"{name}={value}" for name, value in where.items())
    notes = [f"{len(kept)} of {len(found)} rows have {asked}"] if where else []
    spoilt = {}
    for line, row in kept:
        spoilt.setdefault(rows.left_out(row), []).append(line)
    notes += [f"{len(lines)} rows left out, {why}: lines {some(lines)}" for why, lines in spoilt.items() if why]
    if path.suffix == ".csv" and not path.read_bytes().endswith((b"\n", b"\r")):
        notes.append(f"no line break ends line {found[-1][0]}, the last: see that it is whole")
    out = [(line, row) for line, row in kept if not rows.left_out(row)]
    if not out:
        raise DataError(f"{path}: no row is left of {len(found)}: {'; '.join(notes)}")
    table = from_rows(out, source=str(path), digest=disk.sha256(path), loss=loss, notes=tuple(notes))
    recorded, told = curves.beside(path.parent, table.columns, loss=loss)
    return dataclasses.replace(table, recorded=recorded, notes=table.notes + tuple(told))


def from_rows(pairs: list[Row], *, source: str = "a table", digest: str = "", loss: str = "loss",
              notes: tuple[str, ...] = ()) -> Table:
    """A table of (line, row) pairs, whose keys are those of KNOWN."""
    lines = np.array([line for line, _ in pairs])
    present = [name for name in KNOWN if any(given(row.get(name)) for _, row in pairs)]
    for name in ("N", "D", loss):
        if name not in present:
            raise ConfigError(f"{source} has no column for {name}: name it {' or '.join(KNOWN[name])}")
    columns = {}
    for name in present:
        values = [row.get(name) for _, row in pairs]
        missing = [line for line, value in zip(lines, values) if not given(value)]
        if missing and name in NUMBERS and name not in ("loss", "bits_per_byte"):
            raise DataError(f"{source}: no {KNOWN[name][0]} on lines {some(missing)}: fill it in or take the row out"
                            + ("" if name in "ND" else f", or pass over the column with --ignore={KNOWN[name][0]}"))
        if name in NUMBERS:
            columns[name] = np.array([rows.number(v, name, line, source) for v, line in zip(values, lines)])
        else:
            columns[name] = np.array([str(v) if given(v) else "" for v in values])
    columns["loss"] = columns[loss]
    for name in columns.keys() & set(NUMBERS) - {"loss", "bits_per_byte"}:
        if not (positive := np.isfinite(columns[name]) & (columns[name] > 0)).all():
            raise DataError(f"{source}: {KNOWN[name][0]} is not a positive number on lines {some(lines[~positive])}")
    said = {row["params_convention"] for _, row in pairs if row.get("params_convention")}
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
    seen, kept = {}, []
    for i, key in enumerate(zip(*(table[name] for name in tells))):
        first = seen.setdefault(key, i)
        if first == i:
            kept.append(i)
        elif table.loss[i] != table.loss[first] and not np.isnan(table.loss[[i, first]]).all():
            raise DataError(f"{table.source}: lines {table.lines[first]} and {table.lines[i]} are the same point "
                            f"({', '.join(tells)}) with losses {table.loss[first]:g} and {table.loss[i]:g}: give a "
                            "column seed or run if both are true, or take one out")
    twice = len(table) - len(kept)
    return table.take(kept, f"{twice} rows say what another said already") if twice else table


def _same(value, wanted: str) -> bool:
    try:
        return value is not None and float(value) == float(wanted)
    except (TypeError, ValueError):
        return str(value) == wanted
