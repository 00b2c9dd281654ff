"""From YAML and `key=value`s to a checked tree of frozen dataclasses, with one line for whatever is wrong."""

import dataclasses
import difflib
import json
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pydantic

from dsv3_jax.checks import is_text, require, shortened
from dsv3_jax.errors import UserError
from dsv3_jax.yaml_reader import LARGEST_TEXT, parse_yaml

_DEEPEST = 8  # sections inside each other in an override


def read_sections(path: str | Path) -> dict:
    """The nested sections of a YAML file; {} if it is empty. Raises `UserError` if it cannot be read or holds none."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(LARGEST_TEXT + 1)  # and not more, of what never ends
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read config {path}: {error}") from None
    raw = parse_yaml(text, Path(path))
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected sections such as `model:`, found {type(raw).__name__}")
    return raw


def leaves(tree: dict, prefix: str = "") -> dict[str, Any]:
    """{a.b.c: value} of nested sections."""
    found = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        found |= leaves(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found


def _named(key: str) -> str:
    """A key in an error."""
    return key if len(key) <= 80 and key.isprintable() and key == key.strip() else shortened(key)


def merge_overrides(raw: dict, overrides: Iterable[str], tree: type) -> None:
    """Set `key=value`s in nested sections; values are YAML, and text as it stands where `tree` takes text (name=007).

    Raises `UserError` for one that is not of this form.
    """
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not all(key.split(".")):
            raise UserError(f"override {shortened(override)} is not key=value, e.g. train.steps=100")
        _merge(raw, key, _override_value(key, value, override, tree))


def _merge(base: dict, key: str, value: Any) -> None:
    *sections, leaf = key.split(".")
    if len(sections) > _DEEPEST:
        raise UserError(f"unknown key {shortened(key)}: no section lies so deep")
    for section in sections:
        base = base.setdefault(section, {})
        if not isinstance(base, dict):
            raise UserError(f"{_named(key)}: {section} is a value, not a section")
    base[leaf] = value


def _override_value(key: str, value: str, override: str, tree: type) -> Any:
    """What a value means as YAML; where the key takes text, whatever YAML does not read as text or null stands for itself."""
    if key not in _text_keys(tree):
        return parse_yaml(value, override)
    try:
        parsed = parse_yaml(value, override)
    except UserError:  # such as *.txt
        return value
    return parsed if parsed is None or isinstance(parsed, str) else value


def _text_keys(cls: type, prefix: str = "") -> set[str]:
    """The keys whose values are text, such as names and paths."""
    kinds = typing.get_type_hints(cls)
    found = {f"{prefix}{key}" for key, kind in kinds.items() if kind is str or kind == str | None}
    sections = {key: kind for key, kind in kinds.items() if isinstance(kind, type) and dataclasses.is_dataclass(kind)}
    return found.union(*(_text_keys(kind, f"{prefix}{key}.") for key, kind in sections.items()))


def checked[T](tree: type[T], raw: dict, source: str) -> T:
    """Nested sections as the dataclass `tree`, which pydantic checks.

    Raises `UserError` that names `source`, the key, its value and what would be valid.
    """
    for key, value in _texts(raw):
        require(is_text(value), f"{source}: {_named(key)}={shortened(value)} holds bytes or characters that are no UTF-8")
        require(all(key.split(".")), f"{source}: key {shortened(key)} lacks a name; write it out, e.g. train.steps")
    try:
        text = json.dumps(raw, default=str)
    except (TypeError, ValueError, RecursionError) as error:  # keys of other types, endless integers, sections in themselves
        raise UserError(f"{source}: {error}") from None
    try:
        # JSON mode: strict about leaf types ("four" is no int), while sections may still be plain mappings
        return pydantic.TypeAdapter(tree).validate_json(text)
    except pydantic.ValidationError as error:
        raise UserError(_explain(error, source, tree)) from None


def _texts(raw: dict, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    """(key, value) of the strings in nested sections; each key's name, too, which is text that somebody gave."""
    for key, value in raw.items():
        name = f"{prefix}{key}"
        yield name, name
        if isinstance(value, str):
            yield name, value
        elif isinstance(value, dict) and depth < _DEEPEST:
            yield from _texts(value, f"{name}.", depth + 1)


def _leaf_keys(cls: Any, prefix: str = "") -> list[str]:
    keys = []
    for f in dataclasses.fields(cls):
        nested = isinstance(f.type, type) and dataclasses.is_dataclass(f.type)
        keys += _leaf_keys(f.type, f"{prefix}{f.name}.") if nested else [f"{prefix}{f.name}"]
    return keys


def _explain(error: pydantic.ValidationError, source: str, tree: Any) -> str:
    """One line for the first problem: key, value, what is accepted; for an unknown key the nearest valid name."""
    first = error.errors(include_url=False)[0]
    key = _named(".".join(str(part) for part in first["loc"]))
    if first["type"] == "unexpected_keyword_argument":
        valid = _leaf_keys(tree)
        # compare whole keys and last parts, so that both a typo and a misplaced key find their match
        by_leaf = {k.rsplit(".", 1)[-1]: k for k in valid}
        near = difflib.get_close_matches(key, valid, 1, 0.5)
        near_leaf = difflib.get_close_matches(key.rsplit(".", 1)[-1], by_leaf, 1, 0.8)
        best = by_leaf[near_leaf[0]] if near_leaf else (near[0] if near else None)
        hint = f"did you mean {best}?" if best else "valid sections: " + ", ".join(f.name for f in dataclasses.fields(tree))
        return f"{source}: unknown key {key}; {hint}"
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"{source}: {key}={shortened(first['input'])}: {message}"
