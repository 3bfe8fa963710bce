"""Sealed folders: a manifest of every file's size and SHA-256, written last, tells whether a folder is still whole."""

import contextlib
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor

from lm_jax import disk
from lm_jax.errors import Failure

NAME = "MANIFEST.json"


class DamagedError(Exception):
    """What is wrong with a sealed folder."""


class UnreadableError(Failure):
    """A disk does not give what it may well have: no damage, as another attempt may show."""

    code = 74


def write(folder, body: dict):
    """Seal `folder`: bring all of it to the disk, then a manifest of its files and of `body`, a JSON-able dict."""
    body = body | {"files": _digests(folder, before=disk.sync)}
    for inner in (path for path in folder.rglob("*") if path.is_dir()):
        disk.sync(inner)
    disk.replace(folder / NAME, [json.dumps({"sha256": _digest(body), "body": body}, indent=1)])


def read(folder) -> dict:
    """The `body` that a folder was sealed with, and "files"; DamagedError if it is not what was written,
    UnreadableError where the disk refuses."""
    try:
        with _reading(folder):
            manifest = disk.read_json(folder / NAME)
        if manifest is None:
            raise DamagedError(f"it has no {NAME}")
        body, digest = manifest["body"], manifest["sha256"]
        for name in body["files"]:
            disk.inside(folder, name)
    except (ValueError, KeyError, TypeError) as e:
        raise DamagedError(f"{NAME} cannot be read ({type(e).__name__})") from e
    if digest != _digest(body):
        raise DamagedError(f"{NAME} has another SHA-256 than when it was written")
    return body


def verify(folder, **expected):
    """Raise DamagedError unless every file is what it was, sizes first, as they cost nothing, and the body has what is
    expected of a folder of this name."""
    body = read(folder)
    for key, value in expected.items():
        if body[key] != value:
            raise DamagedError(f"it was written as {key} {body[key]}")
    files = body["files"]
    with _reading(folder):
        for name, (size, _) in files.items():
            file = folder / name
            if not file.is_file() or file.is_symlink():
                raise DamagedError(f"{name} is {'a link' if file.is_symlink() else 'missing'}")
            if file.stat().st_size != size:
                raise DamagedError(f"{name} has {file.stat().st_size} bytes of {size}")
        found = _digests(folder)
    for name, expected in files.items():
        if found.get(name) != expected:
            raise DamagedError(f"{name} has another SHA-256 than when it was written")


@contextlib.contextmanager
def _reading(folder):
    """What is not there, or no file, is damage; a disk that fails or refuses is not."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as e:
        raise DamagedError(f"{e.filename} is {'missing' if isinstance(e, FileNotFoundError) else 'no file'}") from e
    except OSError as e:
        raise UnreadableError(f"{folder} cannot be read: {e}. Nothing was changed: run the same command again when the "
                              "disk can be") from e


def _digest(body) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _digests(folder, *, before=lambda file: None) -> dict[str, list]:
    """File -> [bytes, SHA-256] of everything below `folder` but the manifest; `before` is called on each first."""

    def read(file):
        before(file)
        return [file.stat().st_size, disk.sha256(file)]

    names = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file() and p.name != NAME]
    with ThreadPoolExecutor(min(8, os.cpu_count())) as pool:  # other threads run while one hashes
        return dict(zip(names, pool.map(read, [folder / name for name in names])))
