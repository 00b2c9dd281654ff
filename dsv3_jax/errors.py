"""The exceptions that the command line turns into one line and an exit code, and the exit codes with a meaning."""

import errno

EXIT_BAD_INPUT = 2
EXIT_NOT_JOINED = 75  # not all of a run's processes came: "try again" in sysexits.h
EXIT_STOPPED = 130  # after a signal, with the state saved


class UserError(Exception):
    """Bad input: names the field or file, the value, and what would be accepted or done next."""


class FailedElsewhere(Exception):
    """Process 0 of a run has failed and says why; the others just end."""


class Refused(SystemExit):
    """The end of a command that has printed why in one line, `line`. Its exit code is EXIT_BAD_INPUT."""

    def __init__(self, line: str):
        super().__init__(EXIT_BAD_INPUT)
        self.line = line


def os_error_line(error: OSError) -> str:
    """A failed system call in one line: on which file, and what is wrong."""
    where = " to ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    what = (
        "no space left on the device" if error.errno == errno.ENOSPC else error.strerror or str(error) or type(error).__name__
    )
    return f"{where or 'reading or writing failed'}: {what}; what was saved before is intact"
