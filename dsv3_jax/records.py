"""Records of files that a crash, a disk or a stranger may have damaged: one JSON object a line.

A line that is no sound record is skipped and counted, so that one bad byte ends nothing. Files are read as bytes, a line at a
time, and those that grow with a run from their end where only the latest records are asked for.
"""

import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TextIO

from dsv3_jax.files import open_regular

Record = dict[str, Any]
Sound = Callable[[Record], bool]  # whether a record has the fields that its readers need

_LONGEST = 2**24  # bytes of a line; a longer one is damage, such as the zeros that a crash leaves, and is not kept in memory
_BLOCK = 2**16  # bytes read at a time from the end
_EARLIER = 64  # records in a row that are not late, before which none is looked for


def number(record: Mapping[str, Any], key: str, default: float = 0.0) -> float:
    """A record's number as a float; `default` where it is missing, no number, or not finite."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return default
    try:
        found = float(value)
    except OverflowError:  # an integer of hundreds of digits
        return default
    return found if math.isfinite(found) else default


def _record(line: bytes, sound: Sound) -> Record | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and sound(found) else None


class Records:
    """The sound records of a .jsonl file, in order, read anew whenever they are iterated over; none if there is no file.

    `skipped` counts the damaged lines of the last iteration. A last line that ends without a newline, which is being written
    or was cut off by a crash, is not among them.
    """

    def __init__(self, path: Path, sound: Sound):
        self._path, self._sound, self.skipped = path, sound, 0

    def __iter__(self) -> Iterator[Record]:
        self.skipped = 0
        if not self._path.exists():
            return
        with open_regular(self._path) as file:
            while line := file.readline(_LONGEST):
                record = _record(line, self._sound)
                if record is not None:
                    yield record
                elif line.endswith(b"\n") and line.strip():
                    self.skipped += 1


def _lines_from_end(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """(offset, line without its newline), from the last to the first."""
    at, later = file.seek(0, os.SEEK_END), []  # `later`: blocks of the line that begins before `at`, the last first
    while at:
        size = min(_BLOCK, at)
        at -= size
        file.seek(at)
        pieces = file.read(size).split(b"\n")
        pieces[-1] += b"".join(reversed(later)) if len(pieces) > 1 else b""
        begins = list(itertools.accumulate((len(piece) + 1 for piece in pieces), initial=at))
        yield from zip(reversed(begins[1:-1]), reversed(pieces[1:]), strict=True)
        later = [*later, pieces[0]] if len(pieces) == 1 else [pieces[0]]
        if len(later) * _BLOCK > _LONGEST:
            later = [b"\0"]  # damage, whatever comes before it
    yield 0, b"".join(reversed(later))


def _from_end(file: IO[bytes], sound: Sound) -> Iterator[tuple[int, Record]]:
    """(offset, record) of the sound records, from the last to the first."""
    for offset, line in _lines_from_end(file):
        record = _record(line, sound)
        if record is not None:
            yield offset, record


def last_records(path: Path, sound: Sound, count: int = 1) -> list[Record]:
    """The last `count` sound records of a .jsonl file, the latest first, read from its end."""
    if not path.exists():
        return []
    with open_regular(path) as file:
        return [record for _, record in itertools.islice(_from_end(file, sound), count)]


def reopen(path: Path, sound: Sound, is_late: Callable[[Record], bool]) -> tuple[TextIO, list[Record]]:
    """Take the late records from the end of a .jsonl file, and open it to append others in their place.

    Damaged lines among or after the late ones go too; those before stay, for readers to skip.

    Args:
        path: The file, which need not exist. Only its end is read, as far as there are late records.
        sound: Which records count.
        is_late: Whether a record is to go. In a file, those that are come after those that are not.

    Returns:
        The open file, and the late records in their order.
    """
    late: list[Record] = []
    stay: list[Record] = []  # that come after a late one, because of damage to a number
    with open(path, "a+b") as file:
        end, earlier = _sound_end(file, sound), []
        for offset, record in _from_end(file, sound):
            if is_late(record):
                end = offset
                late.append(record)
                stay, earlier = stay + earlier, []
            else:
                earlier.append(record)
                if len(earlier) == _EARLIER:
                    break
        file.truncate(end)
        file.write(b"".join(json.dumps(record).encode() + b"\n" for record in reversed(stay)))
    return open(path, "a", buffering=1), late[::-1]


def _sound_end(file: IO[bytes], sound: Sound) -> int:
    """Where the last line ends with a newline, which it gets if it is a sound record; one that was cut off is left out."""
    offset, line = next(_lines_from_end(file))
    if not line or _record(line, sound) is None:
        return offset
    file.write(b"\n")
    return file.seek(0, os.SEEK_END)
