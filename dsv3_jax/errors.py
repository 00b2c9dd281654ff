"""The exceptions that the command line turns into one line and an exit code, and the exit codes with a meaning."""

EXIT_BAD_INPUT = 2
EXIT_NOT_JOINED = 75  # not all of a run's processes came: "try again" in sysexits.h
EXIT_STOPPED = 130  # after a signal, with the state saved


class UserError(Exception):
    """Bad input: names the field or file, the value, and what would be accepted or done next."""


class FailedElsewhere(Exception):
    """Process 0 of a run has failed and says why; the others just end."""
