"""The one exception that users are meant to see: the command line prints it as one line and exits with code 2."""


class UserError(Exception):
    """Bad input: names the field or file, the value, and what would be accepted or done next."""


class FailedElsewhere(Exception):
    """Process 0 of a run has failed and says why; the others just end."""
