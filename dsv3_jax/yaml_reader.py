"""YAML from people and strangers, within limits: what it takes to read grows with the text, which has a largest size.

Refused are aliases (a few lines of which make billions of values), deep nesting, keys that are not text, and values that no
configuration has, such as binaries and sets.
"""

import datetime
import re
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from dsv3_jax.errors import UserError

LARGEST_TEXT = 2**16  # characters; the YAML of a run has about 4,000
_DEEPEST = 16  # sections and lists inside each other
_LARGEST_NUMBER = 2**63  # beyond any that is computed with, and before arithmetic on digits costs time


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-3` as a string; here it is a float, as everybody expects. Duplicate keys are errors."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise ComposerError(None, None, f"alias *{event.anchor} is not supported", event.start_mark)
        self.depth += 1
        if self.depth > _DEEPEST:
            raise ComposerError(None, None, f"nested deeper than {_DEEPEST} levels", event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node)
            if not isinstance(key, str):
                raise ConstructorError(None, None, f"key {str(key)[:40]} is not text", key_node.start_mark)
            if key in seen:
                raise ConstructorError(None, None, f"key {key!r} stands twice", node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > 4 * len(str(_LARGEST_NUMBER)) or abs(number := self.construct_yaml_int(node)) >= _LARGEST_NUMBER:
            short = node.value[:20] + ("..." if len(node.value) > 20 else "")
            raise ConstructorError(None, None, f"number {short} is out of range", node.start_mark)
        return number

    def refuse(self, node: yaml.Node) -> Any:
        raise ConstructorError(None, None, f"values of type {node.tag} are not supported", node.start_mark)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_number)
for _kind in ("binary", "omap", "pairs", "set"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.refuse)


def parse_yaml(text: str, where: str | Path) -> Any:
    """The value of a YAML text, which `where` names in errors; a date is text. Raises `UserError` for what is refused.

    `where` is a file's path, which is shown as it is, or an option with its value, which may be very long.
    """
    where = where if isinstance(where, Path) or len(where) <= 80 else f"{where[:77]}..."
    if len(text) > LARGEST_TEXT:
        raise UserError(f"{where}: {len(text):,} characters of YAML; at most {LARGEST_TEXT:,} are read")
    try:
        return _without_dates(yaml.load(text, _Loader))
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not valid YAML: {_problem(error)}") from None
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:  # what PyYAML raises for these
        raise UserError(f"{where} is not valid YAML: a value is not of its type ({error})") from None


def _problem(error: yaml.YAMLError) -> str:
    """What is wrong and where, in one line, without the text around it."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    said = ", ".join(part for part in (error.context, error.problem) if part)
    return f"{said}, at line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"


def _without_dates(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_dates(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_dates(item) for item in value]
    return str(value) if isinstance(value, datetime.date) else value
