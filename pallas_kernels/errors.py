"""The exception of an implementation that does not take its arguments or its device."""


class Unavailable(NotImplementedError):
    """This implementation of an operation cannot run here: not on this device, or not for these dtypes or sizes."""
