"""Which pages of the cache are whose: counted users, and prefixes that several sequences share."""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from dsv3_jax.serve.attend import PAGE


def extend_keys(keys: list[bytes], tokens: Sequence[int], salt: str) -> list[bytes]:
    """`keys` with one for each further full page of `tokens`.

    Keys of two sequences are equal if and only if all tokens up to the page's end, and the salt, are. The salt keeps apart
    those who may not learn from timing what others have asked.
    """
    numbers = np.asarray(tokens[len(keys) * PAGE : len(tokens) // PAGE * PAGE], np.int32).reshape(-1, PAGE)
    for page in numbers:
        before = keys[-1] if keys else salt.encode()
        keys.append(hashlib.sha256(before + page.tobytes()).digest())
    return keys


class PagePool:
    """Pages 1 to P-1 (page 0 belongs to nobody).

    A page is used by one or more sequences, or idle: used by none, but found by its key until it is taken for something else,
    the longest idle first; or free.
    """

    def __init__(self, pages: int):
        self._free = list(range(pages - 1, 0, -1))
        self._users = [0] * pages
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self.size = pages - 1

    @property
    def available(self) -> int:
        """Pages that can be taken."""
        return len(self._free) + len(self._idle)

    def take(self) -> int:
        """A page of one's own; there must be one available."""
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            del self._page_of[self._key_of.pop(page)]
        self._users[page] = 1
        return page

    def known(self, keys: Sequence[bytes]) -> int:
        """How many pages `find` would give."""
        return next((i for i, key in enumerate(keys) if key not in self._page_of), len(keys))

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The pages of the longest known prefix, each with one user more."""
        pages = [self._page_of[key] for key in keys[: self.known(keys)]]
        for page in pages:
            self._idle.pop(page, None)
            self._users[page] += 1
        return pages

    def publish(self, page: int, key: bytes) -> None:
        """Let others find a page by its key, from when its tokens are in it. A key that is known stays with its page."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key], self._key_of[page] = page, key

    def release(self, pages: Sequence[int]) -> None:
        """One user less of each; the last page of a sequence is the first to be taken again."""
        for page in reversed(pages):
            self._users[page] -= 1
            assert self._users[page] >= 0, page
            if self._users[page] == 0:
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)
