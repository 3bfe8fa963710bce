"""Files that are whole or absent: written under a hidden name, forced to the disk, renamed; and what proves it.

What was written elsewhere is believed in nothing: its JSON says each thing once and in numbers that JSON has, and the
names in it stay in its own folder.
"""

import hashlib
import json
import os
from pathlib import Path

from lm_jax.errors import DataError


def replace(path: Path, chunks):
    """Put `chunks` of text in place of a file at once: readers see the old or the new, a power cut or not."""
    hidden = path.with_name(f".building-{path.name}")
    try:
        with open(hidden, "w", encoding="utf-8") as file:
            file.writelines(chunks)
        sync(hidden)
        hidden.replace(path)
    except BaseException as error:
        hidden.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # where the system names none, as on a full disk
        raise
    sync(path.parent)


def sync(path: Path):
    """Force a file's bytes, or a folder's names, to the disk; a rename is safe only when both are there."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path):
    """What a JSON file holds, or None where there is no file; ValueError where it is damaged."""
    try:
        return parse_json(path.read_bytes())
    except FileNotFoundError:
        return None


def parse_json(text: bytes | str):
    """What JSON says. ValueError also where a key is there twice, of which readers take one or the other, where a
    number is NaN or infinite, and where brackets are nested without end."""
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError("its brackets are nested too deeply") from error


def inside(folder: Path, name: str) -> Path:
    """The file in a folder that something in it names: DataError where the name leads out, as ../other would."""
    if not isinstance(name, str) or os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == "..":
        raise DataError(f"{folder} names {name!r}, which is outside its folder: refused")
    return folder / name


def _once(pairs):
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is in it twice")
    return found


def _refuse(word: str):
    raise ValueError(f"{word} is no number of JSON's")
