"""A document: one text, in memory or read again whenever it is needed, and the pieces in which it is encoded."""

import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

# Characters: a text of up to so many is encoded at once, a longer one in pieces. Encoding takes 100 to 400 times their bytes.
_AT_ONCE, _PIECE = 2**18, 2**16
# Where to cut a long text, the best first. Tokenizers cut before a space that ends a word, so that a cut there changes no token
# of theirs; a piece that begins with a line's end may get a token for the space that some of them put before every text.
_CUTS = [re.compile(pattern) for pattern in (r"[^\W_](?= \S)", r"[^\W_](?=\s)", r"\S(?=\s)")]


@dataclass(frozen=True)
class Document:
    """One text and its name.

    `content` is the text, or for one too long to be held a function that reads it anew, in parts; None is a row without one.
    """

    id: str  # file, or file:line (.jsonl), or file:row (.parquet)
    content: str | Callable[[], Iterator[str]] | None

    @property
    def text(self) -> str:
        return "".join(self._parts())

    def has_text(self) -> bool:
        """Whether there is more than white space."""
        return any(part and not part.isspace() for part in self._parts())

    def pieces(self) -> Iterator[str]:
        """The text in pieces of at most 2^18 characters, cut between words if it has any; a text of up to so many is one."""
        return _cut(self._parts(), _AT_ONCE, _PIECE)

    def digest(self) -> bytes:
        """SHA-256 of the text in UTF-8."""
        digest = hashlib.sha256()
        for part in self._parts():
            digest.update(part.encode())
        return digest.digest()

    def length(self) -> int:
        """Characters of the text."""
        return sum(map(len, self._parts()))

    def _parts(self) -> Iterable[str]:
        if self.content is None:
            return ()
        return (self.content,) if isinstance(self.content, str) else self.content()


def _cut(parts: Iterable[str], at_once: int, piece: int) -> Iterator[str]:
    rest = ""
    for part in parts:
        rest, begin = rest + part, 0
        while len(rest) - begin > at_once:
            end = _best_cut(rest, begin, begin + piece)
            yield rest[begin:end]
            begin = end
        rest = rest[begin:]
    if rest:
        yield rest


def _best_cut(text: str, begin: int, end: int) -> int:
    """A position in the last eighth of text[begin:end]; its end where that is one word."""
    for pattern, part in itertools.product(_CUTS, (64, 8)):  # most texts have one near the end
        if ends := [found.end() for found in pattern.finditer(text, end - (end - begin) // part, end)]:
            return ends[-1]
    return end
