"""From token ids to text, as tokens come: whole characters only, nothing of a stop string, and where each token begins."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from dsv3_jax.serve.request import Event, Finish, TokenLogprob

_UNFINISHED = "\ufffd"  # what the bytes of a character decode to until its last one has come
_LONGEST_HELD = 16  # tokens: no character has so many bytes, so that these are none's
_CONTEXT = 8  # tokens of the prompt that decide how the first token of the output is written (with a space, or without)


class Detokenizer:
    """Text of tokens that come one by one; put together, it is what the tokenizer makes of all of them.

    Tokens before the first one, `context`, are only looked at.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._tokens = list(context[-_CONTEXT:])  # the last ones with text, and then those that have given none yet
        self._written = len(self._tokens)  # how many of them have given theirs
        self._before = tokenizer.decode(self._tokens)

    def push(self, token: int) -> str:
        """The text that is certain now: "" in the middle of a character, and for a special token."""
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        waits = text.endswith(_UNFINISHED) or len(text) <= len(self._before)
        if waits and len(self._tokens) - self._written < _LONGEST_HELD:
            return ""
        return self._write(text)

    def flush(self) -> str:
        """What is left at the end, such as a character's first bytes."""
        return self._write(self._tokenizer.decode(self._tokens))

    def _write(self, text: str) -> str:
        new = text[len(self._before) :]
        self._tokens = self._tokens[self._written :]
        self._written = len(self._tokens)
        self._before = self._tokenizer.decode(self._tokens)
        return new


class StopFinder:
    """Looks for strings in a text that comes in pieces, by Knuth, Morris and Pratt: the one that ends first is found.

    Attributes:
        held: How many of the last characters may be the beginning of one of the strings.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = [(stop, _borders(stop)) for stop in stops]
        self._matched = [0] * len(self._stops)
        self.held = 0

    def find(self, text: str) -> int | None:
        """Where the string that ends first in the text begins, from the beginning of this piece: negative in an earlier one."""
        for at, character in enumerate(text if self._stops else ""):
            for i, (stop, borders) in enumerate(self._stops):
                matched = self._matched[i]
                while matched and stop[matched] != character:
                    matched = borders[matched - 1]
                self._matched[i] = matched + (stop[matched] == character)
            found = [len(stop) for (stop, _), matched in zip(self._stops, self._matched, strict=True) if matched == len(stop)]
            if found:
                return at + 1 - max(found)
        self.held = max(self._matched, default=0)
        return None


def _borders(stop: str) -> list[int]:
    """For every beginning of a string, the length of its longest proper beginning that it also ends with."""
    borders = [0] * len(stop)
    for i in range(1, len(stop)):
        length = borders[i - 1]
        while length and stop[length] != stop[i]:
            length = borders[length - 1]
        borders[i] = length + (stop[length] == stop[i])
    return borders


@dataclass(frozen=True)
class PlacedToken:
    """A token of a text: where its text begins, and its log-probability; None at a prompt's first place."""

    id: int
    offset: int
    logprob: TokenLogprob | None


@dataclass(frozen=True)
class Piece:
    """What has come of a text."""

    text: str = ""
    tokens: tuple[PlacedToken, ...] = ()  # if log-probabilities were asked for
    finish: Finish | None = None
    error: str = ""

    def then(self, later: "Piece") -> "Piece":
        """Both as one."""
        return Piece(self.text + later.text, self.tokens + later.tokens, later.finish, later.error)


class ChoiceText:
    """The text of one of a request's answers.

    Attributes:
        generated: Tokens that have come, those of a stop string and of text that is held back included.
        finish: Why it has ended.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str], echo: str | None):
        """With `echo` the text begins with the prompt, which is written so."""
        self._tokenizer, self._prompt, self._echo = tokenizer, prompt, echo
        self._detokenizer, self._stops = Detokenizer(tokenizer, prompt), StopFinder(stops)
        self._length = 0  # characters that have come
        self._waiting = ""  # the last ones of them, which may be the beginning of a stop string
        self._tokens: list[PlacedToken] = []  # whose text waits
        self.generated = 0
        self.cached_tokens = 0
        self.finish: Finish | None = None

    def push(self, event: Event) -> Piece:
        """What the event adds. After the end, nothing."""
        if self.finish is not None:
            return Piece()
        self.cached_tokens = max(self.cached_tokens, event.cached_tokens)
        begun = self._begin(event)
        for i, token in enumerate(event.tokens):
            self.generated += 1
            if event.logprobs:
                self._tokens.append(PlacedToken(token, self._length, event.logprobs[i]))
            if self._add(self._detokenizer.push(token)):
                return self._release(begun, Finish.STOP)
        if event.finish is not None and self._add(self._detokenizer.flush()):
            return self._release(begun, Finish.STOP)
        return self._release(begun, event.finish, event.error)

    def _begin(self, event: Event) -> str:
        """The prompt, which no stop string is looked for in."""
        if self._echo is None:
            return ""
        echo, self._echo = self._echo, None
        for token, offset, logprob in zip(
            self._prompt, offsets(self._tokenizer, self._prompt), event.prompt_logprobs or (), strict=False
        ):
            self._tokens.append(PlacedToken(token, offset, logprob))
        self._length = len(echo)
        return echo

    def _add(self, text: str) -> bool:
        """Whether a stop string ends in the text; then what waits ends before it."""
        found = self._stops.find(text)
        waiting = self._waiting + text
        if found is None:
            self._waiting, self._length = waiting, self._length + len(text)
            return False
        self._waiting = waiting[: len(self._waiting) + found]
        self._length += found
        self._tokens = [token for token in self._tokens if token.offset < self._length]
        return True

    def _release(self, begun: str, finish: Finish | None, error: str = "") -> Piece:
        self.finish = finish
        held = self._stops.held if finish is None else 0
        text, self._waiting = self._waiting[: len(self._waiting) - held], self._waiting[len(self._waiting) - held :]
        ready = self._length - held
        count = sum(finish is not None or token.offset < ready for token in self._tokens)
        tokens, self._tokens = tuple(self._tokens[:count]), self._tokens[count:]
        return Piece(begun + text, tokens, finish, error)


def offsets(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[int]:
    """Where each token's text begins in the text of all of them; of bytes within a character, where that begins."""
    detokenizer, length, found = Detokenizer(tokenizer), 0, []
    for token in tokens:
        found.append(length)
        length += len(detokenizer.push(token))
    return found


def _byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level tokenizers write bytes (GPT-2's `bytes_to_unicode`)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """The bytes that a token stands for, which may be a part of a character's; a special token's name."""
    name = tokenizer.id_to_token(token) or ""  # the vocabulary may be smaller than the model's
    text = tokenizer.decode([token], skip_special_tokens=False)
    if _UNFINISHED not in text:
        space = " " if name.startswith("▁") and not text.startswith(" ") else ""  # one that a text does not begin with
        return (space + text).encode()
    if byte := _BYTE_TOKEN.fullmatch(name):
        return bytes([int(byte[1], 16)])
    return bytes(_BYTE_OF[c] for c in name) if all(c in _BYTE_OF for c in name) else name.encode()


def token_name(content: bytes) -> str:
    """A token as OpenAI's log-probabilities name it: its text, or its bytes where they are none."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)
