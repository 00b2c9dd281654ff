"""Chat templates of checkpoints: from messages to a prompt, as transformers' `apply_chat_template` makes it."""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from dsv3_jax.data.companions import SPECIAL_TOKENS_MAP, TOKENIZER_CONFIG, Companions, fields
from dsv3_jax.errors import UserError

_FILES = ("chat_template.jinja", "chat_template.json")
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, by which training finds the assistant's tokens; it writes what is in it."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Any) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators=None, sort_keys=False) -> str:
    """jinja2's own filter escapes what HTML needs escaped."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _source(companions: Companions) -> str | None:
    if _FILES[0] in companions:
        return companions[_FILES[0]].decode("utf-8", "replace")
    stated = fields(companions, _FILES[1]).get("chat_template") or fields(companions, TOKENIZER_CONFIG).get("chat_template")
    if isinstance(stated, list):  # several with names
        named = {entry.get("name"): entry.get("template") for entry in stated if isinstance(entry, dict)}
        stated = named.get("default")
    return stated if isinstance(stated, str) else None


def _special_tokens(companions: Companions) -> dict[str, str]:
    """The texts of special tokens, which templates have as variables."""
    found = {}
    for file in (SPECIAL_TOKENS_MAP, TOKENIZER_CONFIG):
        for key, value in fields(companions, file).items():
            text = value.get("content") if isinstance(value, dict) else value
            if key in _SPECIAL and isinstance(text, str):
                found[key] = text
    return found


class ChatTemplate:
    """A checkpoint's template, in a sandbox: it sees the messages, can change nothing and call nothing."""

    def __init__(self, source: str, special: Mapping[str, str]):
        """Raises `UserError` for a template that is none."""
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _now
        self._special = dict(special)
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise UserError(f"the checkpoint's chat template cannot be read: {error}") from None

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt after which the assistant answers. Raises `UserError` for messages that the template does not take."""
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._special)
        except Exception as error:  # a template is a program, and may fail as one does
            raise UserError(f"messages: the checkpoint's chat template refuses them: {error}") from None


def chat_template(companions: Companions) -> ChatTemplate | None:
    """The template in a checkpoint's files, if there is one. Raises `UserError` for one that cannot be read."""
    source = _source(companions)
    return None if source is None else ChatTemplate(source, _special_tokens(companions))
