"""The requests of a load: their lengths, when they arrive, and where their prompts come from.

The load is open: requests arrive when they arrive, however far behind the server is. A closed one, in which each client waits
for its answer before it asks again, hides every delay that it causes.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.checks import require, shortened
from dsv3_jax.errors import UserError

_SPREAD = 0.6  # standard deviation of the logarithm of lengths


@dataclass(frozen=True)
class Request:
    """One request of a load."""

    arrival_s: float  # since the beginning
    prompt: str | tuple[int, ...]
    max_tokens: int


@dataclass(frozen=True)
class Lengths:
    """Lengths in tokens: lognormal around a median, cut off at both ends."""

    low: int
    median: int
    high: int

    @classmethod
    def parse(cls, name: str, text: str) -> "Lengths":
        """LOW:MEDIAN:HIGH. Raises `UserError`, which names the option."""
        parts = text.split(":")
        valid = len(parts) == 3 and all(part.isdecimal() and len(part) < 10 for part in parts)
        low, median, high = map(int, parts) if valid else (0, 0, 0)
        require(1 <= low <= median <= high, f"{name}={shortened(text)}: use LOW:MEDIAN:HIGH in tokens, such as 8:50:128")
        return cls(low, median, high)

    def draw(self, random: np.random.Generator, count: int) -> np.ndarray:
        """i64[count]."""
        drawn = np.exp(math.log(self.median) + _SPREAD * random.standard_normal(count))
        return np.clip(np.rint(drawn), self.low, self.high).astype(np.int64)


@dataclass(frozen=True)
class Prompts:
    """Prompts that begin anywhere in a text, or of random ids below `vocab_size` if there is none."""

    vocab_size: int
    tokens: np.ndarray | None = None  # i32[total]

    def draw(self, random: np.random.Generator, length: int) -> tuple[int, ...]:
        if self.tokens is None:
            return tuple(random.integers(0, self.vocab_size, length).tolist())
        start = random.integers(0, len(self.tokens) - length + 1)
        return tuple(self.tokens[start : start + length].tolist())


def draw_requests(prompts: Prompts, prompt: Lengths, output: Lengths, count: int, seed: int) -> list[Request]:
    """`count` requests that all arrive at once."""
    random = np.random.default_rng(seed)
    longest = math.inf if prompts.tokens is None else len(prompts.tokens)
    require(prompt.high <= longest, f"prompts of {prompt.high} tokens are longer than the text they are of, {longest} tokens")
    lengths = zip(prompt.draw(random, count).tolist(), output.draw(random, count).tolist(), strict=True)
    return [Request(0.0, prompts.draw(random, tokens), added) for tokens, added in lengths]


def arriving(requests: list[Request], rate: float, seed: int) -> list[Request]:
    """The same requests as a Poisson process of `rate` a second; inf: all at once."""
    if math.isinf(rate):
        return [replace(request, arrival_s=0.0) for request in requests]
    gaps_s = np.random.default_rng(seed).exponential(1 / rate, len(requests))
    return [replace(r, arrival_s=at) for r, at in zip(requests, np.cumsum(gaps_s).tolist(), strict=True)]


def read_trace(path: Path) -> list[Request]:
    """The requests of a JSONL file: `arrival_s`, `prompt` (a text) or `prompt_tokens` (ids), and `max_tokens`.

    Raises `UserError` with the line's number for what is none.
    """
    requests = [_request(fields, where) for where, fields in _lines(path)]
    require(bool(requests), f"{path} has no requests")
    return sorted(requests, key=lambda request: request.arrival_s)


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path} is no UTF-8; a trace has one JSON object a line") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            fields = json.loads(line)
        except ValueError:
            raise UserError(f"{where} is no JSON; a trace has one JSON object a line") from None
        require(isinstance(fields, dict), f"{where} is no JSON object")
        yield where, fields


def _request(fields: dict[str, Any], where: str) -> Request:
    known = {"arrival_s", "prompt", "prompt_tokens", "max_tokens"}
    unknown = ", ".join(sorted(fields.keys() - known))
    require(not unknown, f"{where}: unknown {shortened(unknown)}; use {', '.join(sorted(known))}")
    arrival, most = fields.get("arrival_s"), fields.get("max_tokens")
    real = isinstance(arrival, int | float) and not isinstance(arrival, bool) and 0 <= arrival < math.inf
    require(real, f"{where}: arrival_s={shortened(arrival)}; use seconds since the trace's beginning")
    require(_is_count(most) and most != 0, f"{where}: max_tokens={shortened(most)}; use 1 or more")
    require(("prompt" in fields) != ("prompt_tokens" in fields), f"{where}: give one of prompt and prompt_tokens")
    text, tokens = fields.get("prompt"), fields.get("prompt_tokens", [0])
    require(text is None or (isinstance(text, str) and text != ""), f"{where}: prompt={shortened(text)}; use a text")
    valid = isinstance(tokens, list) and len(tokens) > 0 and all(map(_is_count, tokens))
    require(valid, f"{where}: prompt_tokens={shortened(tokens)}; use a list of token ids")
    return Request(float(arrival or 0), text if text is not None else tuple(tokens), int(most or 0))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31
