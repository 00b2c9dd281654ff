"""Characters that a tokenizer leaves out without a word: a BPE that knows neither all bytes nor a token for what is unknown."""

from tokenizers import Tokenizer, models, pre_tokenizers

from dsv3_jax.progress import printable

_ALL_BYTES = (pre_tokenizers.ByteLevel.alphabet(), [f"<0x{byte:02X}>" for byte in range(256)])
_NEVER_LEARNT = "\U0010fffd"  # a private character: of no vocabulary, so that it is encoded as bytes or not at all


def _may_drop(encoder: Tokenizer) -> bool:
    if not isinstance(encoder.model, models.BPE) or encoder.model.unk_token is not None:
        return False
    has_bytes = any(all(encoder.token_to_id(name) is not None for name in names) for names in _ALL_BYTES)
    return not (has_bytes and encoder.encode(_NEVER_LEARNT, add_special_tokens=False).ids)


class DroppedCharacters:
    """Counts the characters of texts for which an encoder has no token; white space, which many leave out on purpose, apart."""

    def __init__(self, encoder: Tokenizer):
        self._encoder = encoder if _may_drop(encoder) else None
        self._dropped: dict[str, bool] = {}
        self._count, self._first = 0, ""

    def look_at(self, text: str, where: str) -> None:
        """Count those of a text of the document `where`."""
        if self._encoder is None:
            return
        for character in sorted(set(text)):
            if self._is_dropped(character):
                self._first = self._first or f"{character!r} in {where}"
                self._count += text.count(character)

    def _is_dropped(self, character: str) -> bool:
        if character not in self._dropped:
            assert self._encoder is not None
            # thrice: tokens may differ at the beginning and the end of a word
            found = character.isspace() or self._encoder.encode(3 * character, add_special_tokens=False).ids
            self._dropped[character] = not found
        return self._dropped[character]

    @property
    def line(self) -> str | None:
        """What to say of them; None if there are none."""
        if not self._count:
            return None
        what = f"{self._count:,} characters of the text, such as {self._first}"
        return printable(f"data.tokenizer: it has no token for {what}, and leaves them out")
