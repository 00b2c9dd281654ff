"""A process's standard streams: open from the start, and never a reason to end what is being done.

The reader of a pipe goes (`| head`), a terminal dies with its connection, the disk of a log fills up: then what is printed is
lost, and training goes on.
"""

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from typing import IO, Any

_GONE = (errno.EPIPE, errno.EIO, errno.ENXIO, errno.EBADF, errno.ECONNRESET, errno.ESHUTDOWN)  # nobody will ever read on


class Forgiving:
    """A text stream whose `write` and `flush` raise no `OSError`; all else is the stream's own.

    `lost` is the first error that has cost some text although a reader may still be there, such as a full disk.
    """

    def __init__(self, stream: IO[str]):
        self._stream = stream
        self.lost: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._try(lambda: self._stream.write(text))
        except UnicodeEncodeError:  # a terminal of another encoding
            encoding: str = self._stream.encoding  # pyright: ignore[reportAttributeAccessIssue]
            self._try(lambda: self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding)))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def end(self) -> None:
        """Flush for the last time, so that the interpreter, which flushes at its end, has nothing left that could fail."""
        if not self._try(self._stream.flush):
            self._discard()

    def _try(self, use: Callable[[], Any]) -> bool:
        try:
            if not self._stream.closed:
                use()
        except OSError as error:
            if error.errno in _GONE:
                self._discard()
            elif self.lost is None:
                self.lost = error
            return False
        return True

    def _discard(self) -> None:
        """Send the rest to /dev/null: also what is still in the stream's buffer, and what native code prints."""
        with contextlib.suppress(OSError, ValueError):  # a stream in memory has no descriptor
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)


def forgiving(stream: IO[str] | None) -> Forgiving:
    """The stream as a `Forgiving` one; None, which Python has in place of a closed one, takes and drops everything."""
    if isinstance(stream, Forgiving):
        return stream
    return Forgiving(open(os.devnull, "w") if stream is None else stream)


def say(text: str, file: IO[str] | None = None) -> None:
    """Print a line at once, on standard output if no `file` is given, if anybody reads it."""
    out = forgiving(sys.stdout if file is None else file)
    out.write(text + "\n")
    out.flush()


def open_standard_streams() -> None:
    """Open /dev/null where standard input, output or error is closed.

    Else the next files that are opened get these numbers, and what is printed lands in them: in a checkpoint, for example.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, which is this one
            os.set_inheritable(number, True)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, "w" if number else "r")  # noqa: SIM115
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


@contextlib.contextmanager
def forgiving_streams() -> Iterator[Forgiving]:
    """Standard streams that are open, and of which output and error are forgiving. Yields standard output."""
    open_standard_streams()
    old = sys.stdout, sys.stderr
    out, err = forgiving(sys.stdout), forgiving(sys.stderr)
    sys.stdout, sys.stderr = out, err  # type: ignore[assignment]
    try:
        yield out
    finally:
        out.end()
        err.end()
        sys.stdout, sys.stderr = old
