"""Answers held to a schema, whatever tokens are drawn: checked by a reader of JSON that is not ours."""

import json
import random

import numpy as np
import pytest

from dsv3_jax.errors import UserError
from dsv3_jax.http_api.grammar import Grammars
from tests.http_api.fake import tokenizer

ITS = tokenizer()
SIZE = ITS.get_vocab_size() + 40  # models have more rows than their tokenizers have tokens
END = 1


def drawn(schema: dict, seed: int, most: int = 400) -> str:
    constraint, rng, tokens = Grammars(ITS, SIZE, [END]).json(schema), random.Random(seed), []
    for _ in range(most):
        mask = constraint.mask()
        assert len(mask) == -(-SIZE // 32)
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        token = END if END in allowed else rng.choice(allowed.tolist())
        if token == END:
            return ITS.decode(tokens)
        assert token < ITS.get_vocab_size()
        constraint.accept(token)
        tokens.append(token)
    raise AssertionError(f"no end: {ITS.decode(tokens)}")


@pytest.mark.parametrize("seed", range(8))
def test_random_tokens_make_an_answer(seed):
    found = json.loads(drawn({
        "type": "object", "additionalProperties": False, "required": ["kind", "flags", "code"],
        "properties": {
            "kind": {"enum": ["a", "bé"]}, "flags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
            "code": {"type": "string", "pattern": "^[0-9]{2,4}$"},
        },
    }, seed))  # fmt: skip
    assert set(found) == {"kind", "flags", "code"}
    assert found["kind"] in ("a", "bé")
    assert len(found["flags"]) <= 3
    assert all(isinstance(flag, bool) for flag in found["flags"])
    assert found["code"].isdecimal()
    assert 2 <= len(found["code"]) <= 4


def test_an_end_is_all_that_is_left_after_an_error():
    """The engine's thread serves others too: it must get a mask, not an exception."""
    constraint = Grammars(ITS, SIZE, [5, END]).json({"type": "null"})
    constraint.accept(ITS.token_to_id("z") or 7)
    assert constraint.error
    for _ in range(2):
        (allowed,) = np.flatnonzero(np.unpackbits(constraint.mask().view(np.uint8), bitorder="little")).tolist()
        assert allowed == 5
        constraint.accept(allowed)


@pytest.mark.parametrize(
    "schema", [{"$ref": "http://example.org/x"}, {"type": "string", "pattern": "("}, {"type": 5}, {"not": {}}]
)
def test_schemas_that_are_not_supported(schema):
    with pytest.raises(UserError, match="response_format: the schema is not supported"):
        Grammars(ITS, SIZE, [END]).json(schema)
