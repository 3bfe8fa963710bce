"""Files that are whole or absent: written under a hidden name, forced to the disk, renamed; and what proves it."""

import hashlib
import json
import os
from pathlib import Path


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
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
