"""The corpus: the files that `data.path` names, and their documents."""

import functools
import glob
import hashlib
import os
import re
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from dsv3_jax.config import DataConfig
from dsv3_jax.data.document import Document
from dsv3_jax.data.readers import READERS, file_type
from dsv3_jax.errors import UserError

# Directories to leave out: installed packages are no part of the standard library, tests and tables no typical source text.
_NOT_SOURCE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__", "lib2to3"}
_LONGEST_PATH = 4096  # characters
_ALL_FOLDERS = re.compile(r"(^|/)\*\*(?:/\*\*)*(/|$)")  # in a glob: of any depth
_TYPES = f"{', '.join(READERS)}, and these with .gz or .zst after them"


@functools.cache
def stdlib_files() -> tuple[Path, ...]:
    """Source files of the running Python's standard library, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    return tuple(sorted(p for p in root.rglob("*.py") if not _NOT_SOURCE & set(p.relative_to(root).parts)))


def patterns(path: str) -> Iterator[str]:
    """What `data.path` names, one by one: it is cut at commas, but not within a name that exists; `~` is filled in."""
    parts = path.split(",")
    while parts:
        name, count = _name(parts[0]), 1
        longer = parts[0]
        for number, part in enumerate(parts[1:], 2):
            longer = f"{longer},{part}"
            if len(longer) > _LONGEST_PATH:
                break
            joined = _name(longer)
            if os.path.exists(joined) or _folder_of(joined).count(",") == number - 1:
                name, count = joined, number
        yield name
        parts = parts[count:]


def _name(text: str) -> str:
    """What stands between two commas: a name that exists, or else one without the spaces around it and with `~` filled in."""
    return text if os.path.exists(text) else os.path.expanduser(text.strip())


def _folder_of(pattern: str) -> str:
    """The longest folder at the pattern's beginning that exists, brackets and commas being parts of its name; '' for none."""
    folder = os.path.dirname(pattern)
    while folder and not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return folder


def _matching(pattern: str) -> set[str]:
    folder = _folder_of(pattern)
    return _expanded(glob.escape(folder) + pattern[len(folder) :])


def _expanded(pattern: str) -> set[str]:
    """As `glob.glob(pattern, recursive=True)`, but `**` leads into no folder twice: of links that lead back there is no end."""
    found = _ALL_FOLDERS.search(pattern)
    if found is None:
        return set(glob.glob(pattern))
    before, after = pattern[: found.start()] + found[1], pattern[found.end() :] or "*"
    names: set[str] = set()
    for top in glob.glob(before) if before else [""]:
        for folder, _ in _walk(top or os.curdir):
            inside = folder if top else os.path.relpath(folder, os.curdir)
            names |= _expanded(after if inside == os.curdir else os.path.join(glob.escape(inside), after))
    return names


def _files_of(pattern: str) -> list[Path]:
    """Files of a folder, the file of that name, or else those that match."""
    if os.path.isdir(pattern):
        files = _folder_files(pattern)
        if not files:
            raise UserError(f"data.path={pattern!r}: the folder holds no file to read; these are: {_TYPES}")
        return files
    names = [pattern] if os.path.isfile(pattern) else _matching(pattern)
    files = sorted(Path(name) for name in names if os.path.isfile(name))
    if not files:
        hint = f"; it matches folders: name one of them, such as {min(names)}" if any(map(os.path.isdir, names)) else ""
        raise UserError(f"data.path={pattern!r} matches no file{hint}")
    return files


def _folder_files(folder: str) -> list[Path]:
    """Files of types that can be read, in all its folders, in order; hidden names are left out, as by globs."""
    found = [Path(root, name) for root, names in _walk(folder, _refuse) for name in names if not name.startswith(".")]
    return sorted(path for path in found if file_type(path) in READERS and path.is_file())


def _walk(top: str, onerror: Callable[[OSError], None] | None = None) -> Iterator[tuple[str, list[str]]]:
    """A folder and those in it, each once, with the names of the files; those that are hidden are left out."""
    seen = set()
    for root, folders, names in os.walk(top, onerror=onerror, followlinks=True):
        if os.path.realpath(root) in seen:  # a link leads back
            folders.clear()
            continue
        seen.add(os.path.realpath(root))
        # in order: of two names of one folder, the same one is taken on every machine
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield root, names


def _refuse(error: OSError) -> None:
    raise UserError(f"data.path: cannot read the folder {error.filename}: {error.strerror}")


def data_files(config: DataConfig) -> list[Path]:
    """The corpus's files. Raises `UserError` for a pattern that matches nothing or a type that cannot be read."""
    if config.path is None:
        return list(stdlib_files())
    files = [path for pattern in patterns(config.path) for path in _files_of(pattern)]
    for path in files:
        if file_type(path) not in READERS:
            raise UserError(f"data.path: {path}: unknown type {file_type(path)!r}; use one of {_TYPES}")
    return files


def absolute_patterns(path: str) -> str:
    """`data.path` so that it names the same files in every working directory."""
    return ",".join(os.path.join(os.getcwd(), pattern) for pattern in patterns(path))


def documents(config: DataConfig, report: Callable[[str], None] = lambda _: None) -> Iterator[Document]:
    """All documents with text. Each .txt (or standard library) file is one document.

    Rows whose text is null are skipped; at the end `report` gets a line about how many they were.
    """
    nulls, first = 0, ""
    for path in data_files(config):
        read = READERS.get(file_type(path), READERS[".txt"])
        for document in read(path, config.text_field):
            if document.content is None:
                nulls, first = nulls + 1, first or document.id
            elif document.has_text():
                yield document
    if nulls:
        report(f"data.path: rows skipped, whose data.text_field={config.text_field!r} is null: {nulls:,}, first {first}")


def is_validation(text: Document | str, fraction: float) -> bool:
    """Split by the text's hash: the same document falls on the same side in every run, corpus and order."""
    return is_held_out_hash((text if isinstance(text, Document) else Document("", text)).digest(), fraction)


def is_held_out_hash(digest: bytes, fraction: float) -> bool:
    """`is_validation` of the document with this digest."""
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def fingerprint(config: DataConfig) -> str:
    """Hash of what decides the corpus: files with sizes and modification times, and the text field."""
    digest = hashlib.sha256(config.text_field.encode())
    real = functools.cache(os.path.realpath)  # of a folder: once, not for each of its files
    for path in data_files(config):
        try:
            stat = path.stat()
        except OSError as error:
            raise UserError(f"data.path: cannot read {path}: {error.strerror}") from None
        digest.update(
            os.fsencode(f"{real(path.parent)}/{path.name}\0{stat.st_size}\0{stat.st_mtime_ns}\0")
        )  # a name may be no UTF-8
    return digest.hexdigest()[:16]
