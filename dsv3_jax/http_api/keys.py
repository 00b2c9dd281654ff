"""Files of API keys, and which addresses are this machine's alone."""

import ipaddress
from pathlib import Path

from dsv3_jax.errors import UserError
from dsv3_jax.files import read_regular

_MOST_BYTES = 2**20
_SHORTEST = 16  # characters of a key


def read_keys(path: Path) -> list[str]:
    """The keys in a file, one a line. Raises `UserError` if it cannot be read, has none, or has one that is no good key."""
    keys = [line.strip() for line in read_regular(path, _MOST_BYTES).decode("utf-8", "replace").splitlines() if line.strip()]
    if not keys:
        raise UserError(f"--api-key-file={path} holds no key; put one on each line")
    for number, key in enumerate(keys, 1):
        if len(key) < _SHORTEST or not (key.isascii() and key.isprintable()) or " " in key:
            raise UserError(f"--api-key-file={path}: key {number} must have at least {_SHORTEST} ASCII characters, no spaces")
    return keys


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
