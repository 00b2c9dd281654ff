"""Documents: where text comes from. Every reader yields (id, text) and reports a bad file by name and line."""

import glob
import hashlib
import json
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet

from dsv3_jax.config import DataConfig
from dsv3_jax.errors import UserError

# Directories to leave out: installed packages are no part of the standard library, tests and tables no typical source text.
_NOT_SOURCE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__", "lib2to3"}


@dataclass(frozen=True)
class Document:
    """One text and its name."""

    id: str  # file, or file:line (.jsonl), or file:row (.parquet)
    text: str


def stdlib_files() -> list[Path]:
    """Source files of the running Python's standard library, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    return sorted(p for p in root.rglob("*.py") if not _NOT_SOURCE & set(p.relative_to(root).parts))


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"data.path: cannot read {path}: {error.strerror}") from None
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"data.path: {path}, line {line}: not UTF-8 (byte 0x{raw[error.start]:02x}); convert it") from None


def _read_jsonl(path: Path, field: str) -> Iterator[Document]:
    for number, line in enumerate(_read_text(path).split("\n"), 1):  # splitlines would cut at U+2028 inside a string
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"data.path: {path}, line {number}: not JSON: {error.msg}") from None
        if not isinstance(record, dict) or not isinstance(record.get(field), str):
            keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise UserError(f"data.path: {path}, line {number}: no string field data.text_field={field!r}; found {keys}")
        yield Document(f"{path}:{number}", record[field])


def _read_parquet(path: Path, column: str) -> Iterator[Document]:
    try:
        table = pyarrow.parquet.ParquetFile(path)
        names = table.schema_arrow.names
        if column not in names:
            raise UserError(f"data.path: {path}: no column data.text_field={column!r}; found {', '.join(names)}")
        row = 0
        for batch in table.iter_batches(columns=[column]):
            for value in batch.column(0).to_pylist():
                row += 1
                if not isinstance(value, str):
                    raise UserError(f"data.path: {path}, row {row}: column {column!r} holds {type(value).__name__}")
                yield Document(f"{path}:{row}", value)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"data.path: cannot read {path}: {error}") from None


# By the file's ending: (file, data.text_field) -> its documents. Source files of the standard library are read as .txt are.
READERS: dict[str, Callable[[Path, str], Iterator[Document]]] = {
    ".txt": lambda path, _field: iter([Document(str(path), _read_text(path))]),
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def data_files(config: DataConfig) -> list[Path]:
    """The corpus's files. Raises `UserError` for a pattern that matches nothing or a type that cannot be read."""
    if config.path is None:
        return stdlib_files()
    files: list[Path] = []
    for pattern in config.path.split(","):
        matched = sorted(Path(p) for p in glob.glob(pattern.strip(), recursive=True) if Path(p).is_file())
        if not matched:
            raise UserError(f"data.path={pattern.strip()!r} matches no file")
        files += matched
    for path in files:
        if path.suffix not in READERS:
            raise UserError(f"data.path: {path}: unknown type {path.suffix!r}; use one of {', '.join(READERS)}")
    return files


def documents(config: DataConfig) -> Iterator[Document]:
    """All documents with text. Each .txt (or standard library) file is one document."""
    for path in data_files(config):
        read = READERS.get(path.suffix, READERS[".txt"])
        yield from (d for d in read(path, config.text_field) if d.text.strip())


def is_validation(text: str, fraction: float) -> bool:
    """Split by the text's hash: the same document falls on the same side in every run, corpus and order."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def fingerprint(config: DataConfig) -> str:
    """Hash of what decides the corpus: files with sizes and modification times, and the text field."""
    digest = hashlib.sha256(config.text_field.encode())
    for path in data_files(config):
        stat = path.stat()
        digest.update(f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return digest.hexdigest()[:16]
