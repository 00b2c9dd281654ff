"""What a person sees: nothing is wrapped or cut off in a pipe; a terminal's width is respected."""

import io
import re

from rich.table import Table

from dsv3_jax.progress import BytesProgress, ProgressReporter, human, make_console, one_line, printable
from tests.commands import dsv3
from tests.conftest import ROOT

LONG = " ".join(f"word{i}" for i in range(100))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def printed(file: io.StringIO) -> list[str]:
    console = make_console(file)
    console.print(LONG)
    table = Table("column")
    table.add_row(LONG)
    console.print(table)
    return re.sub("\x1b\\[[0-9;]*m", "", file.getvalue()).splitlines()


def test_a_pipe_gets_lines_of_any_length():
    text, *table = printed(io.StringIO())
    assert text == LONG
    assert any(LONG in line for line in table)
    assert len(table) == 5  # rules above and below, the head and what is under it, one row


def test_a_terminal_gets_lines_of_its_width(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert max(map(len, printed(Terminal()))) <= 60


def test_verbs_wrap_nothing_in_a_pipe(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")  # narrower than any of these
    for verb in (("describe", "configs/tiny.yaml"), ("platforms",), ("plan", "--list")):
        done = dsv3(*verb, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        assert "…" not in done.stdout
    lines = dsv3("describe", "configs/tiny.yaml", cwd=ROOT).stdout.splitlines()
    assert any("MTP modules (1), without the shared embedding and head" in line for line in lines)
    (training,) = (line for line in lines if line.startswith("training: "))
    assert training.endswith(" per step")


def test_progress_in_a_pipe_is_plain_lines(capsys):
    with ProgressReporter(steps=2, done=0) as progress:
        progress.say(LONG)
        row = {"loss": 1.5, "tokens_per_s": 2e6, "max_load": 1.25, "step_time_s": 3.0}
        progress.update(1, row, 5e12)
    with BytesProgress("import", 10) as copy:
        copy.advance(10)
    out, err = capsys.readouterr()
    expected = "step 1/2  loss 1.5000  2M tokens/s  5TFLOP/s  expert load 1.25  ETA 3 s"
    assert out.splitlines() == [LONG, expected]
    assert err.startswith("import: 10B of 10B, ")
    assert len(err.splitlines()) == 1


HOSTILE = "[/x] [bold]a[/bold] [link=http://b]c[/link] :smile: \x1b]0;t\x07 \ud800 \u202e é"
SHOWN = r"[/x] [bold]a[/bold] [link=http://b]c[/link] :smile: \x1b]0;t\x07 \ud800 \u202e é"


def test_text_is_printed_as_it_is():
    """As a line, and as a table's title, caption, column and cell: on a terminal too nothing in it is obeyed."""
    assert printable(HOSTILE) == SHOWN
    assert one_line(f" a\n\t{HOSTILE}\u2028b") == f"a {SHOWN} b"
    assert one_line("x" * 10**6) == "x" * 2000 + "... (1,000,000 characters)"
    for file in (io.StringIO(), Terminal()):
        console, table = make_console(file, width=200), Table(HOSTILE, title=HOSTILE, caption=HOSTILE)
        table.add_row(HOSTILE)
        console.print(HOSTILE, soft_wrap=True)
        console.print(table)
        console.rule(HOSTILE)
        plain = re.sub("\x1b\\[[0-9;]*m", "", file.getvalue())  # a table's own styles
        assert plain.count(SHOWN) == 6
        assert "\x1b" not in plain


def test_human():
    assert [human(x) for x in (7, 1234, 1234567, 6.71e11)] == ["7", "1.23k", "1.23M", "671G"]
