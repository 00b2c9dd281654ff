"""Records of damaged files: what is sound is read, the rest is skipped and counted, from either end."""

import json
import os
from pathlib import Path

import pytest

from dsv3_jax import records
from dsv3_jax.errors import UserError
from dsv3_jax.records import Records, last_records, number, reopen

# a byte that is no UTF-8, no JSON, no object, no step, a step that is none, too deep, zeros that a crash left
DAMAGED = [b'{"step": 4, "x": "\xff"}', b"{", b"3", b'{"loss": 1}', b'{"step": "4"}', b"[" * 100_000, b"\0" * 1000]


def has_step(record) -> bool:
    return type(record.get("step")) is int


def write(path: Path, *lines: bytes, end: bytes = b"") -> Path:
    path.write_bytes(b"".join(line + b"\n" for line in lines) + end)
    return path


def row(step: int, **more) -> bytes:
    return json.dumps({"step": step} | more).encode()


@pytest.mark.parametrize("damage", DAMAGED, ids=lambda damage: repr(damage[:12]))
def test_a_damaged_line_is_skipped_and_counted(tmp_path, damage):
    found = Records(write(tmp_path / "a", row(1), damage, row(2), b"", b"  ", end=b'{"step": 3, "lo'), has_step)
    assert [r["step"] for r in found] == [1, 2]
    assert found.skipped == 1  # neither the empty lines nor the one that is being written
    assert [r["step"] for r in found] == [1, 2]
    assert found.skipped == 1


@pytest.mark.timeout(20)
def test_a_pipe_in_place_of_a_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "a")
    for read in (lambda: list(Records(tmp_path / "a", has_step)), lambda: last_records(tmp_path / "a", has_step)):
        with pytest.raises(UserError, match="no regular file"):
            read()


def test_a_file_that_is_missing_has_no_records(tmp_path):
    assert list(Records(tmp_path / "none", has_step)) == last_records(tmp_path / "none", has_step) == []


@pytest.mark.parametrize("block", [1, 7, 64, 2**16])
def test_the_last_records_are_read_from_the_end(tmp_path, monkeypatch, block):
    """Whatever a block cuts through, and with damage before, between and after them."""
    monkeypatch.setattr(records, "_BLOCK", block)
    lines = [row(1), DAMAGED[0], row(2, long="x" * 300), *DAMAGED[:5], row(3), b"\0" * 200]
    for end in (b"", b'{"step": 9'):
        path = write(tmp_path / "a", *lines, end=end)
        assert [r["step"] for r in last_records(path, has_step, 2)] == [3, 2]
        assert [r["step"] for r in last_records(path, has_step, 9)] == [3, 2, 1]


def test_only_the_end_of_a_long_file_is_read(tmp_path, monkeypatch):
    """Lines are parsed as far as the last record, and when late ones are taken out some earlier ones."""
    path = write(tmp_path / "a", *map(row, range(1, 5001)))
    parsed, parse = [], json.loads
    monkeypatch.setattr(records.json, "loads", lambda line: parsed.append(line) or parse(line))
    assert last_records(path, has_step)[0]["step"] == 5000
    assert len(parsed) <= 2
    file, late = reopen(path, has_step, lambda record: record["step"] > 4990)
    file.close()
    assert [r["step"] for r in late] == list(range(4991, 5001))
    assert len(parsed) < 100
    assert path.read_bytes() == b"".join(row(step) + b"\n" for step in range(1, 4991))


def test_a_line_without_an_end_takes_no_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_LONGEST", 2**12)
    monkeypatch.setattr(records, "_BLOCK", 2**10)
    sizes, parse = [], json.loads
    monkeypatch.setattr(records.json, "loads", lambda line: sizes.append(len(line)) or parse(line))
    path = write(tmp_path / "a", row(1), b"\0" * 2**16, row(2), end=b"\0" * 2**16)
    assert [r["step"] for r in Records(path, has_step)] == [1, 2]
    assert [r["step"] for r in last_records(path, has_step, 2)] == [2, 1]
    assert max(sizes) < 2**13


@pytest.mark.parametrize(
    ("lines", "end", "late", "left"),
    [
        ([row(1), row(2), row(3)], b"", [3], [row(1), row(2)]),
        ([row(1), row(2)], b'{"step": 3, "l', [], [row(1), row(2)]),  # a crash cut it off
        ([row(1)], row(2), [], [row(1), row(2)]),  # and here before the newline alone
        ([row(1), DAMAGED[0], row(2), row(3), DAMAGED[0]], b"", [3], [row(1), DAMAGED[0], row(2)]),
        ([row(1), row(3), row(0), row(4)], b"", [3, 4], [row(1), row(0)]),  # a step that a flipped bit has made small
        ([row(3), row(4)], b"", [3, 4], []),
        ([DAMAGED[0]], b"", [], [DAMAGED[0]]),
        ([], b"\0" * 40, [], []),
        ([], b"", [], []),
    ],
)
def test_late_records_make_room_for_others(tmp_path, lines, end, late, left):
    path = write(tmp_path / "a", *lines, end=end)
    file, found = reopen(path, has_step, lambda record: record["step"] > 2)
    with file:
        file.write("more\n")
    assert [r["step"] for r in found] == late
    assert path.read_bytes() == b"".join(line + b"\n" for line in (*left, b"more"))


def test_numbers_of_damaged_records():
    record = {"a": 2, "b": 10**400, "c": True, "d": "3", "e": float("nan"), "f": None, "g": 1.5}
    assert [number(record, key, -1.0) for key in "abcdefgh"] == [2.0, -1, -1, -1, -1, -1, 1.5, -1]
