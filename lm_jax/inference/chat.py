"""Conversations as prompts: the chat template of a folder, as transformers uses it, or a plain one."""

import datetime
import json
import re
from dataclasses import dataclass
from pathlib import Path

from lm_jax.errors import ConfigError, DataError
from lm_jax.hub.folder import read_json

MARK = "\ue000"  # private use: put into what people write, where it spells a special token, until that is past


@dataclass(frozen=True)
class Template:
    """How messages [{"role": .., "content": ..}] become ids.

    `source` is Jinja; None writes the tokenizer's own tokens of roles. `stops` are strings that end an answer.
    """

    tokenizer: object
    source: str | None
    words: dict  # what a template may name: bos_token and its like
    stops: tuple[str, ...] = ()

    @classmethod
    def of_roles(cls, tokenizer) -> "Template":
        """For a vocabulary made here, which has tokens for who speaks: <user> text <end> <assistant>."""
        return cls(tokenizer, None, {})

    @classmethod
    def of_folder(cls, folder: Path, settings: dict, tokenizer) -> "Template":
        """That of chat_template.jinja, chat_template.json or tokenizer_config.json; where there is none a plain one in
        words."""
        file, key = folder / "chat_template.jinja", "chat_template"
        found = read_json(folder / "chat_template.json").get(key, settings.get(key))
        if isinstance(found, list):
            named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
            found = named.get("default", next(iter(named.values()), None))
        found = file.read_text("utf-8") if file.is_file() else found
        if not isinstance(found, str | None):
            raise DataError(f"{folder} has a chat_template that is no text: {found!r}")
        words = {name: word["content"] if isinstance(word, dict) else word for name, word in settings.items()
                 if name.endswith("_token") and isinstance(word, (str, dict))}
        return cls(tokenizer, found or PLAIN, words, () if found else ("\nUser:",))

    def ids(self, messages: list[dict]) -> list[int]:
        """The prompt of what the assistant says next. What people write never becomes a special token."""
        _check(messages)
        if self.source is None:
            roles, encode = self.tokenizer.chat, self.tokenizer.encode
            said = [[roles[_role(one, roles)], *encode(one["content"]), roles["end"]] for one in messages]
            return [self.tokenizer.bos, *(int(id) for ids in said for id in ids), roles["assistant"]]
        names = sorted(filter(None, self.tokenizer.specials), key=len, reverse=True)
        special = re.compile("|".join(map(re.escape, names)) or "(?!)")  # which is nowhere
        tamed = [one | {"content": special.sub(lambda found: found[0][0] + MARK + found[0][1:], one["content"])}
                 for one in messages]
        text, ids, at = self.written(tamed), [], 0
        for found in [*special.finditer(text), None]:
            part = text[at:found.start() if found else len(text)].replace(MARK, "")
            ids += self.tokenizer.encode(part).tolist() if part else []
            ids += [self.tokenizer.specials[found[0]]] if found else []
            at = found.end() if found else at
        return ids

    def written(self, messages: list[dict]) -> str:
        """The conversation as the template writes it, up to where the assistant goes on."""
        world = _jinja()
        world.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        world.globals |= {"raise_exception": _refuse,
                          "strftime_now": lambda form: datetime.datetime.now().strftime(form)}
        try:
            return world.from_string(self.source).render(
                messages=messages, add_generation_prompt=True, tools=None, documents=None, **self.words)
        except ConfigError:
            raise
        except Exception as error:  # Jinja's own, and whatever a template's expressions come to
            raise ConfigError(f"the chat template cannot write this conversation: {error}") from error


PLAIN = """{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}{{ message.content }}

{% else %}{{ message.role.capitalize() }}: {{ message.content }}
{% endif %}{% endfor %}Assistant:"""


def _check(messages):
    """Refuse what is no conversation."""
    for one in messages:
        if not (isinstance(one, dict) and isinstance(one.get("role"), str) and isinstance(one.get("content"), str)):
            raise ConfigError(f"{repr(one)[:80]} is no message: {{'role': .., 'content': ..}} is wanted, both texts; "
                              "join the texts of a content in parts")


def _role(message: dict, roles) -> str:
    if message["role"] not in roles:
        raise ConfigError(f"role {message['role']!r} in a conversation: {', '.join(name for name in roles)}")
    return message["role"]


def _jinja():
    """Jinja in a sandbox, with the tags that templates use besides its own."""
    try:
        from jinja2 import nodes
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise ConfigError("a chat template needs a package: pip install 'lm_jax[hf]'") from error

    class Generation(Extension):
        """{% generation %} .. {% endgeneration %} around what a model learns to say, which is written as it is."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation])


def _refuse(message):
    raise ConfigError(f"the chat template refuses this conversation: {message}")


