"""The tokens that begin and end a text."""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from dsv3_jax.data.companions import CONFIG, GENERATION, SPECIAL_TOKENS_MAP, TOKENIZER_CONFIG, Companions, fields
from dsv3_jax.errors import UserError

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
# names under which a tokenizer.json may have them that came alone, ours first
_BOS_NAMES = (BOS, "<｜begin▁of▁sentence｜>", "<s>", "[BOS]", "<bos>", "<|startoftext|>", "<|endoftext|>")
_EOS_NAMES = (
    EOS, "<｜end▁of▁sentence｜>", "</s>", "[EOS]", "<eos>", "<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>",
)  # fmt: skip
_SURROGATES = re.compile("[\ud800-\udfff]")  # halves of pairs, which JSON's escapes can spell, are no text


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the tokens that frame a text. A document ends with the first of `ends`, a generated text with any of them."""

    begin: int | None
    ends: tuple[int, ...]

    def begun(self, ids: list[int]) -> list[int]:
        """A text's ids from the begin token on, which is put before them if they do not begin with it."""
        return ids if self.begin is None or ids[:1] == [self.begin] else [self.begin, *ids]

    @property
    def frame(self) -> tuple[list[int], list[int]]:
        """What stands before and after a document's own ids. Raises `UserError` if there is no end token."""
        if not self.ends:
            raise UserError(
                f"data.tokenizer: no end-of-text token; name it as eos_token in {TOKENIZER_CONFIG} beside tokenizer.json, or "
                f"call it one of {', '.join(_EOS_NAMES)}"
            )
        return [] if self.begin is None else [self.begin], [self.ends[0]]


def special_tokens(tokenizer: Tokenizer, companions: Companions | None = None) -> SpecialTokens:
    """What the files beside a tokenizer say of its begin and end tokens; if they say nothing, those with known names.

    The first of generation_config.json, config.json, tokenizer_config.json and special_tokens_map.json that names a begin token
    decides on it; every token that one of them calls an end token is one. Ids that the tokenizer does not have are left out.
    Raises `UserError` for an id or a token that is none.
    """
    companions = companions or {}
    begins, ends = (
        _known(tokenizer, _stated(companions, which)) or _known(tokenizer, names)
        for which, names in (("bos", _BOS_NAMES), ("eos", _EOS_NAMES))
    )
    return SpecialTokens(begins[0] if begins else None, tuple(ends))


def _stated(companions: Companions, which: str) -> Iterator[int | str]:
    """The tokens `which` ("bos", "eos") of all files, by id or by text, in the order of precedence."""
    for file in (GENERATION, CONFIG):
        value = fields(companions, file).get(f"{which}_token_id")
        for token in value if isinstance(value, list) else [] if value is None else [value]:
            if type(token) is not int:
                raise UserError(f"{file}: {which}_token_id={str(value)[:80]} must be the id of a token, or a list of ids")
            yield token
    for file in (TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP):
        value = fields(companions, file).get(f"{which}_token")
        token: Any = value.get("content") if isinstance(value, dict) else value  # transformers writes either
        if isinstance(token, str) and not _SURROGATES.search(token):
            yield token
        elif token is not None:
            raise UserError(f"{file}: {which}_token={ascii(value)[:80]} must be a token's text, or an object with its content")


def check_stated(companions: Companions) -> None:
    """Raise `UserError` for a begin or end token that is neither an id nor a text, whatever the tokenizer is."""
    for which in ("bos", "eos"):
        list(_stated(companions, which))


def _known(tokenizer: Tokenizer, tokens: Iterable[int | str]) -> list[int]:
    """Ids of those tokens that the tokenizer has, each once."""
    ids = (tokenizer.token_to_id(token) if isinstance(token, str) else token for token in tokens)
    there = (i for i in ids if i is not None and 0 <= i < 2**32 and tokenizer.id_to_token(i) is not None)
    return list(dict.fromkeys(there))


def with_begin_added(tokenizer: Tokenizer, begin: int | None) -> Tokenizer:
    """A tokenizer that puts `begin` before a text, and nothing else, when it is asked to add special tokens.

    So that other programs, which ask for them, give a model its texts as it was trained on them: by tokenizer.json's
    post-processor. One that does nothing else but this or measure offsets stays.
    """
    plain, processed = (tokenizer.encode("", add_special_tokens=add).ids for add in (False, True))
    if processed == (plain if begin is None else [begin, *plain]):
        return tokenizer
    described = json.loads(tokenizer.to_str())
    before = described["post_processor"] if processed == plain else None
    processors = [] if before is None else before["processors"] if before["type"] == "Sequence" else [before]
    if begin is not None:
        processors = [*processors, _template(tokenizer.id_to_token(begin) or "", begin)]
    several = {"type": "Sequence", "processors": processors}
    described["post_processor"] = several if len(processors) > 1 else next(iter(processors), None)
    return Tokenizer.from_str(json.dumps(described, ensure_ascii=False))


def _template(token: str, begin: int) -> dict[str, Any]:
    """A post-processor of the library `tokenizers` that puts a token before a text, and before each of a pair."""

    def begun(sequence: str, type_id: int) -> list[dict]:
        return [{"SpecialToken": {"id": token, "type_id": type_id}}, {"Sequence": {"id": sequence, "type_id": type_id}}]

    special = {token: {"id": token, "ids": [begin], "tokens": [token]}}
    single, pair = begun("A", 0), begun("A", 0) + begun("B", 1)
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}
