"""Write text with a model: of a run, be it still training, or of a folder as transformers saves it.

    python -m lm_jax.generate --model=runs/tiny --prompt="Once upon a time"
    python -m lm_jax.generate --model=folder --prompts=questions.txt --json > answers.jsonl
    python -m lm_jax.generate --model=folder --chat

One prompt's answer appears as it is written; several are written side by side. Exit codes: 0 done, 2 this cannot be
done: the message says why, 77 files are damaged, 79 no checkpoint is intact, 141 what it writes is read no more.
"""

import argparse
import dataclasses
import functools
import json
import sys

import jax
import numpy as np

from lm_jax import errors, parallel
from lm_jax.config import MeshConfig
from lm_jax.errors import ConfigError
from lm_jax.inference import beam, speculative, text
from lm_jax.inference.load import Speaker, load
from lm_jax.inference.sample import Sampler
from lm_jax.pipelines.wish import Wish, draws, of_folder

DRAWN = tuple(field.name for field in dataclasses.fields(Sampler))
SEARCHED = ("no_repeat_ngram_size",)  # of these, what a search knows too
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
    parallel.use(MeshConfig(fsdp=1, model=-1))
    tell = functools.partial(print, file=sys.stderr)
    speaker = load(args.model, say=tell)
    tell(f"{speaker.said}: {jax.device_count()} {jax.devices()[0].device_kind}")
    sampler = drawing(speaker, given, args, tell)
    if args.chat:
        return chat(speaker, sampler, args, tell)
    if len(prompts) == 1 and not (args.json or args.beams or args.draft):
        for _, new, _ in text.stream(speaker, prompts, sampler, **knobs(args), say=tell):
            print(new, end="", flush=True)
        print()
        return 0
    for prompt, answer in zip(prompts, answered(speaker, prompts, sampler, args, tell)):
        record = {"prompt": prompt} | dataclasses.asdict(answer)
        print(json.dumps(record, ensure_ascii=False) if args.json else f"{prompt}▮{answer.text}\n")
    return 0


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


def drawing(speaker: Speaker, given: dict, args, tell) -> Sampler:
    """How to draw: what flags say and, where they do not, the model's folder."""
    folder, _ = of_folder(speaker.model, task="text-generation", say=tell)
    known = SEARCHED if args.beams else DRAWN
    taken = {name: value for name, value in draws(Wish().told(folder)).items() if name in known and name not in given}
    if taken:
        tell(f"as {args.model} says: {' '.join(f'--{name}={value}' for name, value in taken.items())}")
    return Sampler(**taken | given)


def knobs(args) -> dict:
    return dict(length=args.length, seed=args.seed, stop=args.stop)


def answered(speaker: Speaker, prompts: list[str], sampler: Sampler, args, tell) -> list[text.Answer]:
    """The answers, drawn side by side, searched for, or drafted."""
    if not (args.beams or args.draft):
        return text.answers(speaker, prompts, sampler, **knobs(args), say=tell)
    batch = text.prompted(speaker, prompts, length=args.length, say=tell)
    asked = dict(length=args.length, stop=speaker.stops, vocab=speaker.vocab)
    if args.beams:
        found = beam.search(speaker.model, batch, beams=args.beams, length_penalty=args.length_penalty,
                            no_repeat_ngram_size=sampler.no_repeat_ngram_size, **asked)
        made = (a_BW[:, 0] for a_BW in found[:3])
    else:
        draft = load(args.draft, say=tell)
        if draft.tokenizer.digest != speaker.tokenizer.digest:
            raise ConfigError(f"--draft={args.draft} has another tokenizer than --model={args.model}: take a draft "
                              "that was trained on the same ids")
        keys_B = text.seeded(args.seed, len(prompts))
        found = speculative.speculate(speaker.model, draft.model, batch, sampler, key=keys_B, ahead=args.ahead, **asked)
        tell(f"{int(found.kept_B.sum())} of {int(found.drafted_B.sum())} drafted tokens were kept")
        made = found[:3]
    return text.read(speaker, prompts, *map(np.asarray, made), length=args.length, stop=args.stop)


def chat(speaker: Speaker, sampler: Sampler, args, tell) -> int:
    """Turn after turn, until the input ends."""
    messages = [{"role": "system", "content": args.system}] * bool(args.system)
    knobs = dict(length=args.length, stop=[*args.stop, *speaker.template.stops], say=tell)
    seed = args.seed
    for line in turns():
        messages.append({"role": "user", "content": line})
        try:
            prompt = speaker.template.ids(messages)
            for _, new, answer in text.stream(speaker, [prompt], sampler, seed=seed, **knobs):
                print(new, end="", flush=True)
        except ConfigError as error:  # such as no more room; what was said before, where anything was, stands
            if seed == args.seed:
                raise
            tell(f"{error}. Your last message is dropped")
            messages.pop()
            continue
        print()
        messages.append({"role": "assistant", "content": answer.text})
        seed += 1
    return 0


def turns():
    """What the user writes, line by line."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def bias(given: str) -> tuple:
    """`id:number,id:number` as pairs."""
    try:
        return tuple((int(id), float(add)) for id, add in (pair.split(":") for pair in given.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{given!r} is not ID:NUMBER,ID:NUMBER") from None


if __name__ == "__main__":
    errors.run(main, again="interrupted", memory="fewer prompts at once, a lower --length or fewer --beams take less")
