"""Files of strangers: only regular ones of bounded size are read, and JSON of bounded depth and number of values."""

import os

import pytest

from dsv3_jax.errors import UserError
from dsv3_jax.files import open_regular, read_json, read_regular


def test_only_regular_files_are_opened(tmp_path):
    """Opening a pipe that nobody writes to would wait forever, and /dev/zero has no end."""
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("file", "link"):
        assert read_regular(tmp_path / name, 7) == b"content"
        with open_regular(tmp_path / name) as file:
            assert file.read() == b"content"
    for bad, why in (("pipe", "no regular file"), ("zero", "no regular file"), (".", "directory"), ("none", "No such file")):
        with pytest.raises(UserError, match=why) as error:
            read_regular(tmp_path / bad, 7)
        assert str(tmp_path / bad) in str(error.value)
    with pytest.raises(UserError, match="null byte"):
        open_regular("a\0b")


def test_sizes_are_bounded_before_anything_is_read(tmp_path):
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match=r"it has 1,099,511,627,776 bytes, and at most 8 are expected"):
        read_regular(tmp_path / "sparse", 8)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "not valid JSON"),
        ("[" * 200_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("[" + "9" * 5000 + "]", "not valid JSON"),
        ('{"a": Infinity}', "Infinity is no JSON number"),
        ("[" + "{}," * 2_000_000 + "{}]", "more than 3,000,000 values"),
        (b"\xff{}", "not valid JSON"),
    ],
    ids=range(7),
)
def test_hostile_json_is_one_line(tmp_path, content, why):
    (tmp_path / "x.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=why) as error:
        read_json(tmp_path / "x.json", 2**24)
    assert len(str(error.value)) < 300


def test_json_is_read(tmp_path):
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf{"a": [1, "\xc3\xa9"]}')  # a byte order mark is no part of it
    assert read_json(tmp_path / "x.json", 100) == {"a": [1, "é"]}
