"""The journal of an import: which chunks it says are there."""

import json

import pytest

from dsv3_jax.checkpoint.piecewise import _entries, _size

SOUND = [("weights/a/c/0", [4, "ab"]), ("weights/a/c/1", [5, "cd"])]


@pytest.mark.parametrize(
    "damage", [b"\xff", b"{", b"[]", b"[1, 2]", b'["a", [1]]', b'["a", ["1", "x"]]', b'[["a"], [1, "x"]]', b"[" * 99_999]
)
def test_damaged_lines_are_left_out(tmp_path, damage):
    """Their chunks are written again; a byte that was no UTF-8 ended every attempt to go on."""
    first, last = (json.dumps(entry).encode() for entry in SOUND)
    (tmp_path / "done-0.jsonl").write_bytes(b"\n".join([first, damage, last, b'["weights/a/c/2", [6, "e']))
    assert list(_entries(tmp_path / "done-0.jsonl")) == SOUND


def test_a_name_that_no_file_has_is_none(tmp_path):
    (tmp_path / "a").write_bytes(b"1234")
    assert [_size(tmp_path / name) for name in ("a", "b", "x" * 5000, "a\0")] == [4, None, None, None]
