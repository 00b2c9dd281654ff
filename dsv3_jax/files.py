"""Atomic writing of small files, and the user's cache directory."""

import os
from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file atomically: nobody ever reads half of it. Raises `OSError`, and then leaves the old one."""
    scratch = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        scratch.write_bytes(content.encode() if isinstance(content, str) else content)
        scratch.rename(path)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise


def user_cache() -> Path:
    """$XDG_CACHE_HOME/dsv3_jax, or ~/.cache/dsv3_jax."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsv3_jax"
