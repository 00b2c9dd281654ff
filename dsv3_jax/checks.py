"""Checks of a configuration's values, and how errors show values and what would be valid."""

import dataclasses
import functools
import math
from typing import Any

from dsv3_jax.errors import UserError

_LARGEST = 2**31 - 1  # of an int32, which steps, sizes of arrays and tokens are
_MOST_TRIED = 2**17  # divisors that are tried: all up to the root of any n below 2^34


def require(condition: bool, message: str) -> None:
    """Raise `UserError` with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


def positive(section: str, config: Any, *names: str) -> None:
    """Raise `UserError` unless these fields of a section are greater than 0."""
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{section}.{name}={value} must be positive")


def not_negative(section: str, config: Any, *names: str) -> None:
    """Raise `UserError` unless these fields of a section are 0 or greater."""
    for name in names:
        value = getattr(config, name)
        require(value >= 0, f"{section}.{name}={value} must not be negative")


def in_range(section: str, config: Any, unlimited: tuple[str, ...] = (), **most: int) -> None:
    """Refuse integers beyond `_LARGEST`, or the field's own in `most`, and floats that are not finite.

    `unlimited` names the fields in which infinity means that there is no limit.
    """
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if isinstance(value, int):
            limit = most.get(f.name, _LARGEST)
            require(abs(value) <= limit, f"{section}.{f.name}={shortened(value)} is out of range; use at most {limit}")
        elif isinstance(value, float) and not math.isfinite(value):
            fine = f.name in unlimited and value > 0
            require(fine, f"{section}.{f.name}={value} must be {'positive' if f.name in unlimited else 'a finite number'}")


def is_text(value: str) -> bool:
    """Whether a string is Unicode text; what is no UTF-8 in a command's arguments or a file's name becomes lone surrogates."""
    return not any("\ud800" <= c <= "\udfff" for c in value)


def shortened(value: Any) -> str:
    """A value in an error."""
    try:
        text = repr(value)
    except ValueError:  # Python writes out no integer of more than some thousands of digits
        text = hex(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text):,} characters)"


@functools.cache
def _divisors(n: int) -> tuple[int, ...]:
    small = [d for d in range(1, min(math.isqrt(n), _MOST_TRIED) + 1) if n % d == 0]
    return tuple(sorted({*small, *(n // d for d in small)}))


def divisors(n: int) -> list[int]:
    """All divisors of n, ascending; of an n beyond 2^34 those up to 2^17, and what they leave of n."""
    return list(_divisors(n))


def choices(n: int) -> str:
    """The divisors of n as an error lists them."""
    found = _divisors(n)
    return str(list(found)) if len(found) <= 24 else f"[{', '.join(map(str, found[:20]))}, ..., {n}]"
