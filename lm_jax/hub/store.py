"""The local hub: models by name and revision, laid out as Hugging Face's own cache is, so that both share one folder.

    models--owner--name/blobs/<digest>            the files, each content once
                        snapshots/<revision>/...  a folder as transformers saves it, of links to blobs
                        refs/<word>               the revision that a word such as main stands for

A blob's name is the digest that the hub itself knows a file by: SHA-256 of large files, git's of small ones. What is
put in by hand gets as its revision the digest of its names and contents, so equal folders are one snapshot.
https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

import difflib
import hashlib
import os
import re
import shutil
import textwrap
from fnmatch import fnmatch
from pathlib import Path

import lm_jax.hub.folder as folder
from lm_jax import disk
from lm_jax.errors import ConfigError

NAME = re.compile(r"(?P<repo>([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*)(@(?P<revision>[A-Za-z0-9][\w./-]*))?")
LARGE = (".safetensors", ".model", ".bin", ".onnx", ".gguf")  # what the hub keeps beside git, by SHA-256
WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md", *folder.LICENCES]  # never a pickle
UNWANTED = ["*/*", "consolidated*"]  # of those: the same model once more, for ONNX or as who trained it keeps it


def root() -> Path:
    """Where models are kept: $HF_HUB_CACHE, $HF_HOME/hub, or ~/.cache/huggingface/hub."""
    home = os.environ.get("HF_HOME", os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface"))
    return Path(os.environ.get("HF_HUB_CACHE", os.path.join(home, "hub"))).expanduser()


def path(name) -> Path:
    """The folder that a name stands for: itself, or a snapshot here; else it is downloaded, where there is a network.

    Other programs leave parts of a model in the same cache, a tokenizer by itself or half a download: such a snapshot
    is completed. A name is owner/name@revision, the revision a word, a digest or the beginning of one; without it,
    main. ConfigError names the nearest that is here.
    """
    if Path(name).is_dir():
        return Path(name)
    repo, revision = parse(str(name))
    found = _found(repo, revision)
    if found and (_offline() or folder.whole(found)):
        return found
    return _downloaded(repo, revision, found)


def add(source, name: str) -> Path:
    """Put a folder into the local hub under a name, whose revision (default main) then is this; the snapshot's folder.

    Of its files only those that a hub keeps are put in (`WANTED`); content that is here is not copied again.
    """
    repo, word = parse(name)
    folder.config(Path(source))
    place, files = _place(repo), sorted(filter(_wanted, Path(source).iterdir()))
    blobs = {each.name: _digest(each) for each in files}
    listing = "".join(f"{digest} {file}\n" for file, digest in blobs.items())
    revision = hashlib.sha1(listing.encode(), usedforsecurity=False).hexdigest()
    for each, (file, digest) in zip(files, blobs.items()):
        _put(each, place / "blobs" / digest)
        link = place / "snapshots" / revision / file
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(os.path.relpath(place / "blobs" / digest, link.parent))
    ref = place / "refs" / word
    ref.parent.mkdir(parents=True, exist_ok=True)
    disk.replace(ref, [revision])
    return place / "snapshots" / revision


def upload(source, name: str) -> str:
    """Send a folder to the hub on the network, for which huggingface_hub must have a token; the address it is at."""
    repo, word = parse(name)
    remote = library()
    if _offline() or not remote.get_token():
        raise ConfigError(f"{name} cannot be uploaded: HF_HUB_OFFLINE is set, or nobody is logged in: `hf auth login`, "
                          "or set HF_TOKEN")
    folder.config(Path(source))
    api = remote.HfApi()
    try:
        address = api.create_repo(repo, private=True, exist_ok=True)
        if word != "main":
            api.create_branch(repo, branch=word, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=str(source), revision=word, allow_patterns=WANTED,
                          ignore_patterns=UNWANTED)
    except Exception as error:  # the library's errors, and those of the network under it
        raise ConfigError(f"{name} could not be uploaded: {textwrap.shorten(str(error), 300)}") from error
    return str(address)


def names() -> list[str]:
    """Models that are here, each with its words for revisions."""
    found = []
    for place in sorted(root().glob("models--*")):
        repo = place.name.removeprefix("models--").replace("--", "/", 1)
        refs = place / "refs"
        words = sorted(ref.relative_to(refs).as_posix() for ref in refs.rglob("*") if ref.is_file())
        found += [repo if word == "main" else f"{repo}@{word}" for word in words]
    return found


def parse(name: str) -> tuple[str, str]:
    """(owner/name, revision) of a name; the oldest models have no owner."""
    match = NAME.fullmatch(name)
    if not match or ".." in name or "--" in name:
        raise ConfigError(f"{name!r} is neither a folder nor a name: owner/name, or owner/name@revision")
    return match["repo"], match["revision"] or "main"


def _place(repo: str) -> Path:
    return root() / f"models--{repo.replace('/', '--')}"


def _found(repo, revision) -> Path | None:
    """The snapshot of a word, a digest or the beginning of one; None where it is not here."""
    place = _place(repo)
    ref = place / "refs" / revision
    wanted = ref.read_text().strip() if ref.is_file() else revision
    if disk.inside(place / "snapshots", wanted).is_dir():
        return place / "snapshots" / wanted
    begun = sorted((place / "snapshots").glob(f"{wanted}*")) if re.fullmatch("[0-9a-f]{7,40}", wanted) else []
    if len(begun) > 1:
        raise ConfigError(f"{repo}@{revision} is the beginning of {len(begun)} revisions: write more of it")
    return begun[0] if begun else None


def _downloaded(repo, revision, part: Path | None) -> Path:
    """The snapshot out of the network, where `part` of it may be here."""
    name = repo if revision == "main" else f"{repo}@{revision}"
    near = difflib.get_close_matches(name, names(), n=1, cutoff=0)
    here = f"nearest is {near[0]!r}" if near else "there are none"
    lacks = (f"{name!r} is here in part only ({part})" if part else
             f"{name!r} is no folder and not in the local hub {root()} ({here})")
    if _offline():
        raise ConfigError(f"{lacks}; HF_HUB_OFFLINE is set")
    try:
        return Path(library().snapshot_download(repo, revision=revision, cache_dir=root(), allow_patterns=WANTED,
                                                ignore_patterns=UNWANTED))
    except ConfigError:
        raise
    except Exception as error:  # the library's errors, and those of the network under it
        raise ConfigError(f"{lacks}, and could not be fetched: {textwrap.shorten(str(error), 200)}") from error


def library():
    """huggingface_hub, which speaks with the hub on the network and knows what a card is."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise ConfigError("cards and the hub on the network need a package: pip install 'lm_jax[hf]'") from error
    return huggingface_hub


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE")


def _digest(file: Path) -> str:
    """The name that the hub has for a file's content."""
    if file.suffix in LARGE:
        return disk.sha256(file)
    digest = hashlib.sha1(f"blob {file.stat().st_size}\0".encode(), usedforsecurity=False)
    digest.update(file.read_bytes())
    return digest.hexdigest()


def _wanted(file: Path) -> bool:
    """Whether a hub keeps this file of a folder, of which none below another are kept."""
    matches = lambda patterns: any(fnmatch(file.name, pattern) for pattern in patterns)
    return file.is_file() and not file.name.startswith(".") and matches(WANTED) and not matches(UNWANTED)


def _put(source: Path, blob: Path):
    """Copy a file to its place among the blobs, whole or not at all."""
    if blob.exists():
        return
    blob.parent.mkdir(parents=True, exist_ok=True)
    hidden = blob.with_name(f".building-{blob.name}")
    try:
        shutil.copyfile(source, hidden)
        disk.sync(hidden)
        hidden.replace(blob)
    finally:
        hidden.unlink(missing_ok=True)
