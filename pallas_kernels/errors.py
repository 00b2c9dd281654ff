"""The exceptions of an implementation that does not take its arguments or its device."""


class Unavailable(NotImplementedError):
    """This implementation of an operation cannot run here: not on this device, or not for these dtypes or sizes."""


class NotBuilt(Unavailable):
    """This implementation is compiled on the user's machine, and that failed."""
