"""How fast it is: against what this machine can do at most, and against what users would pick instead.

    python -m lm_jax.bench --config=configs/tiny.py                      the limits, then this config's training
    python -m lm_jax.bench --config=configs/tiny.py --parts=starts,loader,growth
    python -m lm_jax.bench --against=torch --sizes=a --dtypes=float32    side by side, in turns
    python -m lm_jax.bench --against=transformers
    python -m lm_jax.bench --against=torch --json > figures.jsonl        a line of JSON a part

Every key of the config is a flag too: --config.model.dtype=bfloat16. What is shown was measured here, now, warm, a
median between its quartiles; a nominal figure says so. Exit codes: 0 done, 2 this cannot be measured: the message says
why.
"""

import argparse
import shlex

from lm_jax import errors, pages
from lm_jax.errors import ConfigError

PARTS = {  # name -> what it measures; those of a config need --config
    "limits": "the best products of matrices, each way round, and memory; with huge pages and without",
    "training": "a config's rate, MFU, split of a step, memory against the plan, costliest operations",
    "packing": "rows of several documents against rows of one",
    "starts": "import, --help, and a config's time to its first step, cold and cached",
    "loader": "tokens a second from the packed store",
    "growth": "how cost grows over model size, length, vocabulary and devices",
    "together": "eight points of a million parameters side by side, against one after another",
    "gap": "what the trainer's loop costs the host beside its steps, at a million parameters",
    "entropy": "the memory of the cross-entropy at a vocabulary of 128k",
}
OF_CONFIG = ("training", "packing", "starts", "loader")
AGAINST = {  # and how long that takes on two cores; what each turn took is told meanwhile
    "torch": "a nanoGPT-shaped model's training in PyTorch, eager and compiled: a 3 minutes, b 16; half with --turns=1",
    "transformers": "generation by an 85M GPT-2, classification by a DistilBERT: 4 minutes",
}
CONTENTS = "\n".join(f"  {name:<14}{what}" for name, what in (PARTS | AGAINST).items())


def main(argv):
    args = parse(argv)
    pages.begin_again(args.pages)
    from lm_jax import command  # late, as errors.run says
    from lm_jax.measure import machine, parts

    needed = [name for name in args.parts if name in OF_CONFIG]
    if needed and not any(flag.startswith("--config") for flag in args.config):
        raise ConfigError(f"--parts={','.join(needed)} measures a config: pass one, as --config=configs/tiny.py")
    c = command.parse([argv[0], *args.config], doc=__doc__)[0] if needed or args.config else None
    page = parts.Page(args.json, shlex.join(["python", "-m", "lm_jax.bench", *argv[1:]]))
    page.head(machine.record())
    if args.against:
        parts.AGAINST[args.against](page, args)
    for name in args.parts:
        parts.PARTS[name](page, c, args)
    page.end(machine.load())
    return 0


def parse(argv) -> argparse.Namespace:
    """The flags of this main; `config` holds those of the config."""
    parser = argparse.ArgumentParser(prog="python -m lm_jax.bench", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, epilog=CONTENTS)
    names = lambda known: lambda text: chosen(parser, text, known)
    add = parser.add_argument
    add("--parts", type=names(PARTS), metavar="A,B", help=f"of {', '.join(PARTS)}; default limits,training of --config")
    add("--against", choices=AGAINST, help="beside what users would pick instead; needs the bench extra")
    add("--sizes", type=names(("a", "b")), default=["a", "b"], metavar="A,B",
        help="with --against=torch: a is 10M parameters, T 256, batch 16; b is GPT-2 small, T 512, batch 8")
    add("--dtypes", type=names(("float32", "bfloat16")), default=["float32", "bfloat16"], metavar="A,B",
        help="with --against")
    add("--turns", type=int, default=7, help="times that each is measured, after a warm-up; default 7")
    add("--pages", choices=("huge", "plain"), default="huge",
        help="memory pages of all that is measured, set by beginning this process again; default huge")
    add("--json", action="store_true", help="a line of JSON a part instead of tables")
    args, rest = parser.parse_known_args(argv[1:])
    args.config = rest
    if args.turns < 1:
        raise ConfigError(f"--turns={args.turns}: at least 1")
    if args.parts is None:
        args.parts = [] if args.against else ["limits", "training"]
    return args


def chosen(parser, text: str, known) -> list[str]:
    """Names with commas between, each of which is known."""
    if wrong := [name for name in text.split(",") if name not in known]:
        parser.error(f"no {wrong[0]!r}: choose of {', '.join(known)}")
    return text.split(",")


if __name__ == "__main__":
    errors.run(main, again="interrupted", memory="a smaller train.batch, data.length or model takes less")
