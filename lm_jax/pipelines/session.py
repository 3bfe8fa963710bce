"""What `python -m lm_jax.generate` does once its flags are right: prompts answered, or a conversation."""

import dataclasses
import functools
import json
import sys

import jax
import numpy as np

from lm_jax import hosts, parallel
from lm_jax.config import MeshConfig
from lm_jax.errors import ConfigError
from lm_jax.inference import beam, speculative, text
from lm_jax.inference.load import Speaker, load
from lm_jax.inference.sampler import DRAWN, SEARCHED, Sampler
from lm_jax.pipelines.wish import Wish, draws, of_folder


def run(prompts: list[str], given: dict, args) -> int:
    """Answer the prompts, or a conversation; `given` are the fields of a Sampler that flags say."""
    hosts.keep_programs()
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
