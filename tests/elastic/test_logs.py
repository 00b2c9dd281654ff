"""What workers and hosts print, while they do: lines as they come, of whatever they hold."""

from dsv3_jax.elastic import logs
from dsv3_jax.elastic.hosts import HostProcess
from dsv3_jax.elastic.logs import Follower


def test_lines_are_passed_on_once_they_are_complete(tmp_path):
    log, said = tmp_path / "log", []
    follower = Follower(log, said.append)
    follower.read()  # the worker has not begun
    with open(log, "ab", buffering=0) as file:
        for written, expected in ((b"one\ntw", ["one"]), (b"o\n[Gloo] three\n", ["two"]), (b"", []), (b"four\n", ["four"])):
            file.write(written)
            said.clear()
            follower.read()
            assert said == expected


def test_nothing_in_a_log_controls_the_terminal(tmp_path):
    (tmp_path / "log").write_bytes(b"\xff \x1b]0;title\x07 [/x]\n")
    said = []
    with Follower(tmp_path / "log", said.append):
        pass
    assert said == [rb"\ufffd".decode("unicode_escape") + r" \x1b]0;title\x07 [/x]"]


def test_a_line_without_an_end_comes_in_pieces(tmp_path, monkeypatch):
    """Once each: it was read again from its beginning at every look."""
    monkeypatch.setattr(logs, "_PIECE_BYTES", 8)
    log, said = tmp_path / "log", []
    log.write_bytes(b"a" * 20)
    follower = Follower(log, said.append)
    follower.read()
    assert said == ["a" * 8, "a" * 8]
    follower.read()
    assert said == ["a" * 8, "a" * 8]
    log.write_bytes(b"a" * 20 + b"\nb\nc\n")
    follower.read()
    assert said[2:] == ["aaaa", "b", "c"]


def test_what_a_library_prints_in_a_host_is_no_word_of_the_host_s():
    """It ended the thread that listens, after which nobody noticed how the worker ended."""
    host = object.__new__(HostProcess)
    host.ready = host.lost = False
    said = []

    class Process:
        @property
        def stdout(self):
            for line in (b'{"ready": 7}\n', b"warning: x\n", b"3\n", b"\xff\n", b"[" * 99_999, b'{"pid": 8}\n'):
                yield line
                said.append((host.ready, getattr(host, "pid", None)))

    host.process = Process()  # type: ignore[assignment]
    host._listen()
    assert said[0] == (True, None)
    assert said[-1] == (True, 8)
    assert host.lost
