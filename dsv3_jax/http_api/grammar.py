"""Answers that are JSON of a schema: llguidance says which tokens may come next."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import llguidance
import numpy as np
from tokenizers import Tokenizer

from dsv3_jax.errors import UserError

_MOST_SCHEMA = 2**16  # characters


def _keys(value: Any) -> Iterable[str]:
    """All keys of objects in a JSON value."""
    if isinstance(value, dict):
        yield from value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _keys(inner)


class Grammars:
    """Makes constraints for one tokenizer.

    Example: SamplingParams(constraint=Grammars(tokenizer, 129280, [1]).json({"type": "object"}), end_ids=frozenset([1]))
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, ends: Sequence[int]):
        """`ends`, one at least, are the tokens that end a text once the grammar lets it end."""
        self._tokenizer = llguidance.LLTokenizer(tokenizer.to_str(), n_vocab=vocab_size, eos_token=list(ends))
        self._size, self._ends = vocab_size, list(ends)

    def json(self, schema: dict[str, Any]) -> "JsonConstraint":
        """A constraint to JSON of a schema; {"type": "object"} for any object.

        Raises `UserError` for a schema that is none, is too large, or has what llguidance does not hold an answer to.
        """
        text = json.dumps(schema)
        if len(text) > _MOST_SCHEMA:
            raise UserError(f"response_format: the schema has {len(text):,} characters; use {_MOST_SCHEMA:,} at most")
        if "patternProperties" in _keys(schema):  # llguidance#265: answers that it does not match
            raise UserError("response_format: patternProperties is not supported; list the properties by name")
        grammar = llguidance.LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_flexible": False})
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            reason = matcher.get_error().splitlines()[0][:200]
            raise UserError(f"response_format: the schema is not supported: {reason}")
        return JsonConstraint(matcher, -(-self._size // 32), self._ends[0])


class JsonConstraint:
    """A `Constraint` by an llguidance matcher."""

    def __init__(self, matcher: llguidance.LLMatcher, words: int, end: int):
        self._matcher = matcher
        self._end = np.zeros(words, np.uint32)  # a mask that lets the text end, and nothing else
        self._end[end // 32] = 1 << end % 32

    @property
    def error(self) -> str:
        """Why the answer is cut off: the grammar grew beyond llguidance's limits. "" if it is not."""
        return self._matcher.get_error().partition("\n")[0][:200]

    def mask(self) -> np.ndarray:
        """u32[words]; nothing but an end token after an `error`."""
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: len(self._end)]
        return self._end if self._matcher.is_error() or not mask.any() else mask

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
