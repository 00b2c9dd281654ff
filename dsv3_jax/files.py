"""Files that are written whole or not at all, and where the user's cache is."""

import os
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace a file by one beside it, so that nobody ever finds half of it. Raises `OSError`, and leaves the old one then."""
    scratch = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        scratch.write_bytes(content.encode() if isinstance(content, str) else content)
        scratch.rename(path)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise


def user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsv3_jax"
