"""Reading one file: every reader yields its documents as it goes, and reports a bad file by name and line.

Files are streamed, packed ones too: what is in memory is one line, one row or a part of a text, whatever the file's size.
"""

import codecs
import contextlib
import functools
import gzip
import io
import itertools
import json
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import IO, Any, BinaryIO

import pyarrow
import pyarrow.compute
import pyarrow.parquet

from dsv3_jax.data.document import Document
from dsv3_jax.errors import UserError
from dsv3_jax.files import open_regular

# Arrow's own reader of .gz refuses zeros after the last stream, with which tapes and block devices are filled up.
_COMPRESSIONS: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".zst": lambda raw: io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd")),  # type: ignore[arg-type]
}
_BLOCK = 2**20  # bytes of a .txt file that are decoded at once
_MOST_LINE = 2**27  # bytes of a line: a small packed file may hold an endless one
_MOST_NAMES = 20  # of fields that an error lists
_ROWS = 256  # of a .parquet file that are in memory at once
_BYTE_ORDER_MARK = "\ufeff"
_MARKS_OF_OTHERS = (  # the first of UTF-32 begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF16_LE, "UTF-16"), (codecs.BOM_UTF16_BE, "UTF-16"),
)  # fmt: skip
_SURROGATES = re.compile("[\ud800-\udfff]")


def file_type(path: PurePath) -> str:
    """The ending that says what a file holds, in small letters: `.jsonl` of a.jsonl, and of a.JSONL.gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    return suffixes[0] if len(suffixes) == 2 and suffixes[1] in _COMPRESSIONS else "".join(suffixes[-1:])


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked if it is packed. Raises `UserError` for what cannot be opened or read."""
    try:
        with open_regular(path) as raw:
            unpacked = _COMPRESSIONS.get(path.suffix.lower())
            yield unpacked(raw) if unpacked else raw  # type: ignore[misc]
    except UserError as error:
        message = str(error)
        raise error if message.startswith("data.path") else UserError(f"data.path: {message}") from None
    except (OSError, EOFError, zlib.error, pyarrow.ArrowException) as error:
        raise UserError(f"data.path: cannot read {path}: {' '.join(str(error).split())}") from None


def text_parts(path: Path) -> Iterator[str]:
    """A file's text without a byte order mark, in parts of about a million characters."""
    line, rest, first = 1, b"", True
    with _opened(path) as file:
        while block := file.read(_BLOCK):
            rest += block
            text, line, rest = _decoded(path, rest, line, final=False)
            yield text.removeprefix(_BYTE_ORDER_MARK) if first else text
            first = False
        if rest:
            yield _decoded(path, rest, line, final=True)[0]


def _decoded(path: Path, content: bytes, line: int, final: bool) -> tuple[str, int, bytes]:
    """The text, the number of the line where it ends, and the bytes of a character whose others are still to come."""
    try:
        text, used = codecs.utf_8_decode(content, "strict", final)
    except UnicodeDecodeError as error:
        bad, at = content[error.start :], line + content.count(b"\n", 0, error.start)
        other = next((name for mark, name in _MARKS_OF_OTHERS if at == 1 and bad.startswith(mark)), None)
        what = f"{other}, not UTF-8" if other else f"not UTF-8 (byte 0x{bad[0]:02x})"
        raise UserError(f"data.path: {path}, line {at}: {what}; convert it") from None
    return text, line + content.count(b"\n", 0, used), content[used:]


def text_lines(path: Path) -> Iterator[str]:
    """A file's lines with their ends (LF alone ends one), without byte order marks: files may have been joined."""
    with _opened(path) as file:
        for number in itertools.count(1):
            content = file.readline(_MOST_LINE + 1)
            if not content:
                return
            if len(content) > _MOST_LINE:
                raise UserError(f"data.path: {path}, line {number} has more than {_MOST_LINE:,} bytes")
            text, _, _ = _decoded(path, content, number, final=True)
            yield text.removeprefix(_BYTE_ORDER_MARK)


def _read_txt(path: Path, _field: str) -> Iterator[Document]:
    parts = text_parts(path)
    begin = list(itertools.islice(parts, 2))
    parts.close()  # type: ignore[attr-defined]
    yield Document(str(path), "".join(begin) if len(begin) < 2 else functools.partial(text_parts, path))


def _look_up(record: Any, field: str) -> tuple[bool, Any]:
    """(whether it is there, its value): `a.b` is the field of that name, or else `b` in the record `a`; of null it is null."""
    if not isinstance(record, dict):
        return record is None, None
    if field in record:
        return True, record[field]
    for dot in re.finditer(r"\.", field):
        found = _look_up(record.get(field[: dot.start()], ()), field[dot.end() :])
        if found[0]:
            return found
    return False, None


def _parsed(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except RecursionError:
        raise UserError(f"data.path: {path}, line {number}: nested too deeply") from None
    except ValueError as error:  # JSONDecodeError, or a number of thousands of digits
        raise UserError(f"data.path: {path}, line {number}: not JSON: {getattr(error, 'msg', error)}") from None


def _read_jsonl(path: Path, field: str) -> Iterator[Document]:
    for number, line in enumerate(text_lines(path), 1):
        if not line.strip():
            continue
        record = _parsed(path, number, line)
        found, text = _look_up(record, field)
        if not found or not isinstance(text, str | None):
            what = f"it holds {type(text).__name__}" if found else f"found {_keys(record)}"
            raise UserError(f"data.path: {path}, line {number}: no string field data.text_field={field!r}; {what}")
        if text is not None and not text.isascii():
            text = _SURROGATES.sub("\ufffd", text)  # JSON's escapes can spell halves of pairs, which are no text
        yield Document(f"{path}:{number}", text)


def _keys(record: Any) -> str:
    if not isinstance(record, dict):
        return type(record).__name__
    names = [name if name.isprintable() else ascii(name) for name in itertools.islice(record, _MOST_NAMES)]
    return ", ".join(names) + (", ..." if len(record) > _MOST_NAMES else "") or "no field"


@contextlib.contextmanager
def _seekable(path: Path) -> Iterator[Path | BinaryIO]:
    """A file that can be read at any place: a packed one is unpacked beside the system's other temporary files."""
    if path.suffix.lower() not in _COMPRESSIONS:
        yield path
        return
    with tempfile.TemporaryFile() as unpacked:
        with _opened(path) as packed:
            shutil.copyfileobj(packed, unpacked, _BLOCK)
        yield unpacked  # type: ignore[misc]


def _column_path(fields: Any, field: str) -> list[str] | None:
    """Names that lead to a column, from a schema or a struct: the same rule as for records (`_look_up`)."""
    if field in fields.names:
        return [field]
    for dot in re.finditer(r"\.", field):
        head, rest = field[: dot.start()], field[dot.end() :]
        inner = fields.field(head).type if head in fields.names else None
        if isinstance(inner, pyarrow.StructType) and (path := _column_path(inner, rest)):
            return [head, *path]
    return None


def _strings(path: Path, first_row: int, column: str, values: pyarrow.Array) -> Iterator[Document]:
    for row, value in enumerate(values, first_row):
        try:
            text = value.as_py()
        except UnicodeDecodeError as error:
            raise UserError(f"data.path: {path}, row {row}: column {column!r} is not UTF-8 ({error.reason})") from None
        if not isinstance(text, str | None):
            raise UserError(f"data.path: {path}, row {row}: column {column!r} holds {type(text).__name__}")
        yield Document(f"{path}:{row}", text)


def _read_parquet(path: Path, column: str) -> Iterator[Document]:
    with _seekable(path) as file:
        try:
            table = pyarrow.parquet.ParquetFile(file)
            names = _column_path(table.schema_arrow, column)
            if names is None:
                found = _keys(dict.fromkeys(table.schema_arrow.names))
                raise UserError(f"data.path: {path}: no column data.text_field={column!r}; found {found}")
            row = 1
            for batch in table.iter_batches(_ROWS, columns=[column]):
                values = batch.column(names[0])
                if names[1:]:
                    values = pyarrow.compute.struct_field(values, names[1:])  # type: ignore[attr-defined]
                yield from _strings(path, row, column, values)
                row += len(values)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"data.path: cannot read {path}: {' '.join(str(error).split())}") from None


# By the file's ending, without .gz or .zst: (file, data.text_field) -> its documents, of which one without content is a null.
# Source files of the standard library are read as .txt are.
READERS: dict[str, Callable[[Path, str], Iterator[Document]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
