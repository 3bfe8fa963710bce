"""Turn a run, or a model from elsewhere, into a folder as transformers saves it.

    python -m lm_jax.convert runs/tiny exported            # a run's newest checkpoint, with its tokenizer and a card
    python -m lm_jax.convert owner/name@revision folder    # a model of the local hub, else of the one on the network
    python -m lm_jax.convert folder hub:owner/name@word    # into the local hub, from where it is opened by this name

What comes out is always such a folder: `lm_jax.hub.load` and `python -m lm_jax.generate` open one directly, so nothing
is turned into a run. A model that came from a folder keeps its config.json, its tokenizer, card and licence, and every
byte of the weights that it has a use for. What is not kept is said: weights of 8 bits a number (FP8) become the
bfloat16 that they stand for, and their quantization_config goes; tensors of other heads and of layers that predict
further tokens (MTP) are left out.
Exit codes: 0 done, 2 this cannot be done: the message says why, 77 files are damaged, 79 no checkpoint is intact.
"""

import argparse
import os
import shutil
import tempfile
from pathlib import Path

from lm_jax import config, errors
from lm_jax.errors import ConfigError

LOCAL, CARD = "hub:", "README.md"


def main(argv):
    args = parse(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is computed
    from lm_jax.hub import store  # JAX reads its environment when it is imported

    source = store.path(args.source)
    named = args.target.removeprefix(LOCAL)
    if not args.target.startswith(LOCAL):
        write(source, Path(args.target), args)
        place = Path(args.target)
    else:
        store.parse(named)
        with tempfile.TemporaryDirectory(dir=_made(store.root())) as folder:
            write(source, Path(folder), args)
            place = store.add(folder, named)
    size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
    print(f"{place}: {size:,} bytes" + (f", opened by {named!r}" if named != args.target else ""))
    if args.upload:
        print(f"uploaded to {store.upload(place, args.upload)}")
    return 0


def parse(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m lm_jax.convert", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="IN",
                        help="a run's folder, one as transformers saves it, or owner/name@revision")
    parser.add_argument("target", metavar="OUT", help="a folder, or hub:owner/name@word for the local hub")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"),
                        help="of the weights; default: as they are")
    parser.add_argument("--shard", type=int, default=5 * 10**9, help="most bytes of a file, default 5e9")
    parser.add_argument("--upload", metavar="OWNER/NAME", help="send it to the hub on the network too")
    return parser.parse_args(argv[1:])


def write(source: Path, target: Path, args):
    """Write the model of `source` as a folder."""
    import jax

    from lm_jax import hub
    from lm_jax.hub import card, folder, store, vocabulary
    from lm_jax.inference import load

    record = folder.read_json(source / "config.json")
    if source.resolve() == target.resolve():
        raise ConfigError(f"{target} is what is read: pass another folder to write to")
    if "train" not in record:
        hub.save(hub.load(source, weights=args.dtype), target, shard=args.shard)
        if (source / CARD).is_file():  # what it says is as true of what comes out
            shutil.copyfile(source / CARD, target / CARD)
        return
    store.library()  # which makes the card
    step, model, tokenizer = load.run(source, config.from_dict(record))
    described = card.of(source, model.cfg, step)
    cast = lambda weight: weight.astype(args.dtype or weight.dtype)
    hub.save(jax.tree.map(cast, model), target, shard=args.shard)
    vocabulary.write(target, tokenizer, model.cfg)
    described.save(target / CARD)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    errors.run(main)
