"""Write text with a model: of a run, be it still training, or of a folder as transformers saves it.

    python -m lm_jax.generate --model=runs/tiny --prompt="Once upon a time"
    python -m lm_jax.generate --model=folder --prompts=questions.txt --json > answers.jsonl
    python -m lm_jax.generate --model=folder --chat

One prompt's answer appears as it is written; several are written side by side. Exit codes: 0 done, 2 this cannot be
done: the message says why, 77 files are damaged, 79 no checkpoint is intact, 141 what it writes is read no more.
"""

import argparse
import dataclasses
import sys

from lm_jax import errors
from lm_jax.errors import ConfigError
from lm_jax.inference.sampler import DRAWN, SEARCHED, Sampler

ALONE = {  # what such a flag leaves without a use
    "chat": (("prompt", "prompts", "json", "beams", "draft"), "a conversation is read and answered a line at a time"),
    "beams": ((*(name for name in DRAWN if name not in SEARCHED), "seed", "draft"),
              "a search for the likeliest draws nothing"),
}
NEEDS = {"system": "chat", "length_penalty": "beams", "ahead": "draft"}  # a flag, and the one without which it is idle


def main(argv):
    args = parse(argv)
    given = {name: getattr(args, name) for name in DRAWN if getattr(args, name) is not None}
    Sampler(**given)  # what is wrong with it is said before a model is read
    prompts = [] if args.chat else read(args)
    from lm_jax.pipelines import session  # late, as errors.run says

    return session.run(prompts, given, args)


def parse(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m lm_jax.generate", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, metavar="FOLDER",
        help="of a run, or as transformers saves it; or a name in the local hub")
    add("--prompt", action="append", default=[], help="may be given again; - is all of standard input")
    add("--prompts", metavar="FILE", help="a prompt a line; - is standard input")
    add("--chat", action="store_true", help="a conversation, a line of standard input at a time")
    add("--system", default="", help="with --chat: what the assistant is told first")
    add("--length", type=int, default=128, help="most new tokens of an answer")
    add("--stop", action="append", default=[], metavar="TEXT", help="an answer ends before it; may be given again")
    add("--seed", type=int, default=0, help="prompt i draws by the seed + i")
    for field in dataclasses.fields(Sampler)[:-1]:
        add(f"--{field.name}", type=field.type, help=f"default: what the model's folder says, or {field.default}")
    add("--logit_bias", type=bias, metavar="ID:NUMBER,..", help="added to the logits of these ids")
    add("--beams", type=int, default=0, help="search for the likeliest answer, so many side by side")
    add("--length_penalty", type=float, default=1.0, help="with --beams: above 0 favours long answers")
    add("--draft", metavar="FOLDER", help="a smaller model of the same tokenizer that drafts for this one")
    add("--ahead", type=int, default=4, help="tokens of a draft")
    add("--json", action="store_true", help="a line of JSON an answer: text, ids, logprobs, how it ended")
    args = parser.parse_args(argv[1:])
    given = [name for name in vars(args) if getattr(args, name) != parser.get_default(name)]
    for flag, (idle, why) in ALONE.items():
        if flag in given and (useless := [name for name in idle if name in given]):
            raise ConfigError(f"--{useless[0]} with --{flag}: {why}; leave one of them out")
    for name, flag in NEEDS.items():
        if name in given and flag not in given:
            raise ConfigError(f"--{name} without --{flag}: it would do nothing; pass --{flag} too, or leave it out")
    return args


def read(args) -> list[str]:
    """All prompts that were asked for, in their order."""
    prompts = [sys.stdin.read() if prompt == "-" else prompt for prompt in args.prompt]
    if args.prompts:
        try:
            with open(sys.stdin.fileno() if args.prompts == "-" else args.prompts, encoding="utf-8") as file:
                prompts += [line.removesuffix("\n") for line in file if line.strip()]
        except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError) as error:
            raise ConfigError(f"--prompts={args.prompts}: {error}: pass a text file, a prompt a line") from error
    if not prompts:
        raise ConfigError('what should be continued? Pass --prompt="...", --prompts=FILE, or --chat')
    return prompts


def bias(given: str) -> tuple:
    """`id:number,id:number` as pairs."""
    try:
        return tuple((int(id), float(add)) for id, add in (pair.split(":") for pair in given.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{given!r} is not ID:NUMBER,ID:NUMBER") from None


if __name__ == "__main__":
    errors.run(main, again="interrupted", memory="fewer prompts at once, a lower --length or fewer --beams take less")
