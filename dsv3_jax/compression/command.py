"""`dsv3 report` of a compressed checkpoint."""

from pathlib import Path
from typing import Any

from rich.console import Console

from dsv3_jax.compression.report import REPORT
from dsv3_jax.compression.report_tables import headline, show, tables
from dsv3_jax.errors import UserError
from dsv3_jax.files import read_json, write_atomically

PAGE = "compress.html"
_LARGEST = 64 * 2**20


def report(compressed: Path, console: Console) -> Path:
    """Print what compression did, and write it as a page beside compress.json.

    Returns the page's path. Raises `UserError` if there is no report that this version reads.
    """
    from dsv3_jax.compression.page import page  # matplotlib takes a second

    file = compressed / REPORT
    content: Any = read_json(file, _LARGEST)
    try:
        headline(content)
        found, html = tables(content), page(content, compressed.absolute().name)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{file} is damaged, or of another version: {type(error).__name__}: {error}") from None
    show(content, found, console)
    target = compressed / PAGE
    write_atomically(target, html)
    return target
