"""Damaged and hostile versions of a sound input: of its values, of its text, of its bytes. A seed decides which."""

import json
import random
import re
from collections.abc import Callable
from typing import Any

import yaml

_ESCAPES = "[/x] [link=http://a]b[/link] \x1b]0;c\x07 \u202e"
_VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 3, 2**31, 2**32, 2**63, 2**64 - 1, 10**18, 10**400, -(10**400), 0.5, -0.0, 1e308, -1e308,
   
    float("nan"), float("inf"), float("-inf"), "", " ", "\0", "\ud800", "x" * 5000, "9" * 400, "1e999", "0x10", "2020-01-01",
    "null", _ESCAPES, "../../../etc/passwd", "/dev/zero", "a\nb", [], {}, [[]], [None], {"": None}, [1, "a", None],
    {"a": {"b": [{}]}}, list(range(3000)), {str(i): i for i in range(3000)}, [[0] * 3] * 500,
]  # fmt: skip


def _nested(depth: int) -> Any:
    value: Any = 1
    for i in range(depth):
        value = [value] if i % 2 else {"a": value}
    return value


def _value(rng: random.Random) -> Any:
    return _nested(rng.choice([20, 200])) if rng.random() < 0.05 else rng.choice(_VALUES)


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value inside a tree."""
    found = []
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        found += [(tree, key), *_places(value)]
    return found


def _damage_value(tree: Any, rng: random.Random) -> Any:
    """The tree with one value replaced, removed, doubled, wrapped, moved or renamed; it is changed in place."""
    places = _places(tree)
    if not places or rng.random() < 0.03:
        return _value(rng)
    container, key = rng.choice(places)
    act = rng.choice(["replace", "replace", "replace", "remove", "wrap", "swap", "rename", "add", "double"])
    if act == "replace":
        container[key] = _value(rng)
    elif act == "remove":
        del container[key]
    elif act == "wrap":
        container[key] = rng.choice([lambda v: [v], lambda v: {"a": v}, str, lambda v: [v] * 50])(container[key])
    elif act == "swap":
        other, its = rng.choice(places)
        container[key], other[its] = json.loads(json.dumps([other[its], container[key]]))
    elif isinstance(container, list):
        container.insert(key, _value(rng) if act == "add" else container[key])
    elif act == "rename":
        container[rng.choice(["", "\0", _ESCAPES, "x" * 300, f"{key} ", str(key).upper()])] = container.pop(key)
    else:
        container[rng.choice(["a", "time", "step", "__class__", "$ref", _ESCAPES])] = _value(rng)
    return tree


def _damage_text(text: str, rng: random.Random) -> str:
    """Text whose keys stand twice, whose numbers are huge, that is nested deep, or holds what YAML gives a meaning."""
    at = rng.randrange(len(text) + 1)
    act = rng.randrange(6)
    if act == 0 and (keys := re.findall(r'"[^"\\]{1,40}"(?=\s*:)', text)):
        return text.replace("{", "{" + f"{rng.choice(keys)}: {rng.choice(['1', 'null', '[]', '{}'])}, ", rng.choice([1, 2, 3]))
    if act == 1 and (numbers := list(re.finditer(r"\d+", text))):
        found = rng.choice(numbers)
        digits = rng.choice(
            ["9" * 400, "9" * 5000, "1e999", "-1", "0x" + "f" * 200, "NaN", "Infinity", "1:" * 50 + "1", "1_000", "07"]
        )
        return text[: found.start()] + digits + text[found.end() :]
    if act == 2:
        return text[:at] + rng.choice(["[", "{", '{"a":', "- ", "? ", "("]) * rng.choice([3, 50, 100_000]) + text[at:]
    if act == 3:
        inserted = ["&a ", "*a", "!!binary ", "!!set ", "!!python/object:os.system ", "<<: ", "\t", "\n---\n", "%YAML 9\n",
                    "|\n", "'", '"', "#", ": ", ",", "~: 1\n", "2020-01-01: 1\n", "!!timestamp ", "!!int ", "=", ".",
                    "\\u0000", "\\ud800"]  # fmt: skip
        return text[:at] + rng.choice(inserted) + text[at:]
    if act == 4:
        lines = text.split("\n")
        rng.shuffle(lines)
        return "\n".join(lines)
    return text * rng.choice([2, 3, 20])


def _damage_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bytes with flipped bits, cut off, with a piece removed, repeated or zeroed, or with others put in."""
    begin = rng.randrange(len(data) + 1)
    end = min(len(data), begin + rng.choice([1, 2, 8, 64, 1000]))
    act = rng.randrange(8)
    if act == 0 and data:
        flipped = bytearray(data)
        for _ in range(rng.choice([1, 1, 2, 8, 100])):
            flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    if act == 1:
        return data[:begin]
    if act == 2:
        return data[:begin] + data[end:]
    if act == 3:
        return data[:begin] + data[begin:end] * rng.choice([2, 50]) + data[end:]
    if act == 4:
        return data[:begin] + b"\0" * (end - begin) + data[end:]
    if act == 5:
        return (
            data[:begin]
            + rng.choice([b"\0", b"\xff", b"\n", b"\r", b"\xef\xbb\xbf", b"\xed\xa0\x80", rng.randbytes(20)])
            + data[begin:]
        )
    if act == 6:
        return rng.choice(
            [b"", b"\0" * 4096, b"\xef\xbb\xbf" + data, data + data, data + rng.randbytes(100), rng.randbytes(300)]
        )
    return data.decode(errors="replace").encode(rng.choice(["utf-16", "utf-32", "latin-1"]), errors="replace")


def _as_json(data: bytes, rng: random.Random) -> bytes:
    return json.dumps(_damage_value(json.loads(data), rng)).encode()


def _as_yaml(data: bytes, rng: random.Random) -> bytes:
    return yaml.safe_dump(_damage_value(yaml.safe_load(data), rng), sort_keys=False, allow_unicode=rng.random() < 0.5).encode(
        errors="surrogatepass"
    )


def _as_lines(data: bytes, rng: random.Random) -> bytes:
    """Some lines with damaged values, some as text or bytes, and some in another order."""
    lines = data.splitlines()
    for _ in range(rng.choice([1, 1, 3, 10])):
        number = rng.randrange(len(lines))
        how = rng.choice([_as_json, _as_json, lambda line, rng: _damage_bytes(line, rng)])
        try:
            lines[number] = how(lines[number], rng)
        except ValueError:  # this line is damaged already
            continue
    if rng.random() < 0.2:
        rng.shuffle(lines)
    return b"\n".join(lines) + rng.choice([b"\n", b"\n", b""])


def _as_safetensors(data: bytes, rng: random.Random) -> bytes:
    """The header's values, or the eight bytes that say how long it is."""
    length = int.from_bytes(data[:8], "little")
    header = _as_json(data[8 : 8 + length], rng)
    said = rng.choice([len(header)] * 4 + [0, 1, length, 2**32, 2**63 - 1, 2**64 - 1])
    return said.to_bytes(8, "little") + header + data[8 + length :]


_STRUCTURES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "json": _as_json, "yaml": _as_yaml, "lines": _as_lines, "safetensors": _as_safetensors,
}  # fmt: skip


def damaged(sample: bytes, kind: str, rng: random.Random) -> bytes:
    """A damaged version of a sound input.

    Args:
        sample: The sound input.
        kind: What it is: json, lines (of JSON), yaml, safetensors, text or bytes.
        rng: Decides what is done; the same state gives the same bytes.
    """
    structure = _STRUCTURES.get(kind)
    if structure is not None and rng.random() < 0.8:
        sample = structure(sample, rng)
        if rng.random() < 0.7:
            return sample
    if kind != "bytes" and rng.random() < 0.6:
        text = sample.decode(errors="surrogateescape")
        return _damage_text(text, rng).encode(errors="surrogateescape") if kind != "safetensors" else sample
    for _ in range(rng.choice([1, 1, 2, 4])):
        sample = _damage_bytes(sample, rng)
    return sample
