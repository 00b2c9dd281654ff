"""What a corpus is, by the content of its files: the same wherever they lie and whenever they were written."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from dsv3_jax.config import DataConfig
from dsv3_jax.data.cache import cache_root, cached
from dsv3_jax.data.corpus import data_files, fingerprint
from dsv3_jax.errors import UserError

_THREADS = 4  # each hashes a file; more than two cores can use, because some wait for the disk
_LISTED = 1000  # files, at most, that a record names one by one: it is in every checkpoint
_NAMED = 3  # files, at most, that a message names of each kind


class FileContent(NamedTuple):
    """A file of a corpus."""

    name: str  # below the folder that all files share
    size: int  # bytes
    sha256: str


@dataclass(frozen=True)
class CorpusIdentity:
    """A corpus's files in the order in which they are read. Names do not count, only contents and their order."""

    files: tuple[FileContent, ...]  # those of `data.validation_path` after the others
    held_out: int = 0  # how many are of `data.validation_path`

    @property
    def digest(self) -> str:
        """SHA-256 of all contents, in hexadecimal."""
        contents = "".join(file.sha256 for file in self.files) + (f" {self.held_out}" if self.held_out else "")
        return hashlib.sha256(contents.encode()).hexdigest()

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON: the digest, how much it is, and the files unless there are very many."""
        listing = [[f.name, f.size, f.sha256[:16]] for f in self.files] if len(self.files) <= _LISTED else None
        return {"digest": self.digest, "files": len(self.files), "bytes": self.size, "listing": listing}

    def changes_since(self, record: dict[str, Any]) -> str:
        """What differs from the corpus of a `record`, in a few words; '' if nothing does."""
        if record["digest"] == self.digest:
            return ""
        total = f"{record['files']} files of {record['bytes']:,} bytes, now {len(self.files)} of {self.size:,}"
        if record["listing"] is None or len(self.files) > _LISTED:
            return total
        before = {name: (size, digest) for name, size, digest in record["listing"]}
        now = {f.name: (f.size, f.sha256[:16]) for f in self.files}
        kinds = {
            "changed": [f"{name} ({before[name][0]:,} bytes, now {now[name][0]:,})" for name in now
                        if name in before and before[name] != now[name]],
            "new": [name for name in now if name not in before],
            "gone": [name for name in before if name not in now],
        }  # fmt: skip
        said = [f"{kind}: {_some(names)}" for kind, names in kinds.items() if names]
        return "; ".join([*(said or ["the files' order"]), total])


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def identify(config: DataConfig) -> CorpusIdentity:
    """The identity of the corpus of `config`.

    Contents are read once: their digests are cached under the files' paths, sizes and times. Raises `UserError` if a file
    cannot be read.
    """
    held_out = () if config.validation_path is None else _identify(replace(config, path=config.validation_path))
    return CorpusIdentity((*_identify(config), *held_out), len(held_out))


def _identify(config: DataConfig) -> tuple[FileContent, ...]:
    def build(directory: Path) -> None:
        (directory / "files.json").write_text(json.dumps(_read_all(data_files(config))))

    directory = cached(cache_root(config), f"files-{fingerprint(config)}", build)
    return tuple(FileContent(*file) for file in json.loads((directory / "files.json").read_text()))


def _read_all(files: list[Path]) -> list[FileContent]:
    absolute = [file.absolute() for file in files]
    folder = os.path.commonpath([file.parent for file in absolute])
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = list(pool.map(_digest, absolute))
    return [
        FileContent(file.relative_to(folder).as_posix(), size, digest)
        for file, (size, digest) in zip(absolute, digests, strict=True)
    ]


def _digest(path: Path) -> tuple[int, str]:
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return file.tell(), digest
    except OSError as error:
        raise UserError(f"data.path: cannot read {path}: {error.strerror}") from None
