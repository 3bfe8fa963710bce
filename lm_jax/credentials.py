"""Credentials: refused where they would be written down, masked where they would be printed. Their place is the
environment, of which nothing is ever recorded."""

import os
import re
from collections.abc import Mapping

KNOWN = re.compile(  # of Hugging Face, GitHub, Google, Amazon, OpenAI and the like, Slack; private keys; user:password@
    r"\bhf_\w{20,}|\bgh[opsu]_\w{20,}|\bgithub_pat_\w{20,}|\bAIza[\w-]{30,}|\bya29\.[\w.-]*|\bAKIA[A-Z0-9]{16}"
    r"|\bsk-[\w-]{20,}|\bxox[abpr]-[\w-]{10,}|-----BEGIN [A-Z ]*PRIVATE KEY|(?<=://)[^/\s:@]*:[^/\s@]+(?=@)")
NAMES = re.compile(r"(TOKEN|SECRET|KEY|PASSWORD|CREDENTIALS)$")  # of variables that hold one
SHORTEST = 12  # characters of such a variable; a shorter one may be a word


def shown(text: str, env: Mapping[str, str] = os.environ) -> str:
    """The first credential in a text, "" if there is none: by its form, or as one that the environment holds."""
    found = KNOWN.search(text)
    return found[0] if found else next((value for value in _held(env) if value in text), "")


def masked(text: str, env: Mapping[str, str] = os.environ) -> str:
    """A text with its credentials made unreadable."""
    for value in _held(env):
        text = text.replace(value, f"{value[:3]}*****")
    return KNOWN.sub(lambda found: f"{found[0][:3]}*****", text)


def _held(env: Mapping[str, str]) -> list[str]:
    """What the environment's variables hold that are named as credentials; a file's name is none."""
    return [value for name, value in env.items()
            if NAMES.search(name) and len(value) >= SHORTEST and "/" not in value]
