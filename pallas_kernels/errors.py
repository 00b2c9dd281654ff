"""What an implementation raises for arguments or a device that it does not take."""


class Unavailable(NotImplementedError):
    """This implementation of an operation cannot run here: not on this device, or not for these dtypes or sizes."""
