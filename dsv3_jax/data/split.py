"""Training and held-out documents: by `data.validation_path`, by the hashes of texts, or, of few documents, the end.

A corpus of one or a few documents may leave none on one of the sides. Then its last `data.validation_fraction`, in
characters, is held out, from the begin of a line or word, in documents of the size in which long texts are encoded.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

from dsv3_jax.config import DataConfig
from dsv3_jax.data.corpus import data_files, documents, fingerprint, is_held_out_hash, is_validation
from dsv3_jax.data.document import Document
from dsv3_jax.errors import UserError

_SHORTEST_SIDE = 16  # characters: less is no text to train or measure on


def split_documents(config: DataConfig, report: Callable[[str], None] = lambda _: None) -> Iterator[tuple[bool, Document]]:
    """Every document with text and whether it is held out, in the corpus's order; `report` as for `documents`."""
    if config.validation_path is not None:
        with _of_validation_path():
            held_out = _files(replace(config, path=config.validation_path))
        if both := len(_files(config) & held_out):
            report(f"data.validation_path: {both} of its files are in data.path too: their text is trained on, not held out")
        yield from ((False, document) for document in documents(config, report))
        yield from ((True, document) for document in _validation_documents(config, report))
        return
    found = _few_documents(config)
    if found is None:
        for document in documents(config, report):
            yield is_validation(document, config.validation_fraction), document
        return
    report(
        f"data.path: too few different documents ({found.different:,} of {found.documents:,}) to hold out one of them: it is "
        f"the last {config.validation_fraction:.1%} of the text"
    )
    yield from _cut_at(documents(config, report), found.end_begins, found.characters)


def held_out_documents(config: DataConfig) -> Iterator[Document]:
    """The held-out ones alone."""
    if config.validation_path is not None:
        return _validation_documents(config)
    return (document for held_out, document in split_documents(config) if held_out)


def validation_fingerprint(config: DataConfig) -> str:
    """`fingerprint` of the files of `data.validation_path`, empty without it."""
    if config.validation_path is None:
        return ""
    with _of_validation_path():
        return fingerprint(replace(config, path=config.validation_path))


def _files(config: DataConfig) -> set[tuple[int, int]]:
    """Device and inode of each file, which are the same under all of its names."""
    return {(stat.st_dev, stat.st_ino) for stat in map(os.stat, data_files(config))}


def _validation_documents(config: DataConfig, report: Callable[[str], None] = lambda _: None) -> Iterator[Document]:
    with _of_validation_path():
        yield from documents(replace(config, path=config.validation_path), report)


@contextlib.contextmanager
def _of_validation_path() -> Iterator[None]:
    """Errors about `data.path` name the field that was given instead."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace("data.path", "data.validation_path", 1)) from None


class _FewDocuments(NamedTuple):
    """A corpus that its documents' hashes do not split."""

    documents: int
    different: int  # of other texts: those of one text are all on one side
    characters: int
    end_begins: int  # in characters


def _few_documents(config: DataConfig) -> _FewDocuments | None:
    """The corpus, if the hashes leave one of the sides without a document; None too if it is too short to be cut."""
    count, total, hashes, sides = 0, 0, set(), set()
    for document in documents(config):
        digest = document.digest()
        sides.add(is_held_out_hash(digest, config.validation_fraction))
        if len(sides) == 2:
            return None
        hashes.add(digest[:8])
        count, total = count + 1, total + document.length()
    held_out = max(int(config.validation_fraction * total), _SHORTEST_SIDE)
    return _FewDocuments(count, len(hashes), total, total - held_out) if total - held_out >= _SHORTEST_SIDE else None


def _cut_at(found: Iterable[Document], position: int, end: int) -> Iterator[tuple[bool, Document]]:
    """Documents before and after `position` of the corpus, the one where it lies cut in two."""
    begin = 0
    for document in found:
        length = document.length()
        if begin + length <= position:
            yield False, document
        elif begin >= position:
            yield True, document
        else:
            at = _begin_of_line(document, position - begin, max(2 * position - end - begin, 0))
            before = Document(document.id, functools.partial(_head, document, at))
            if before.has_text():
                yield False, before
            yield from ((True, Document(f"{document.id}, from character {n}", text)) for n, text in _tail(document, at))
        begin += length


def _begin_of_line(document: Document, position: int, least: int) -> int:
    """The begin of the line that holds a position, or else of the word, if not before `least`; or else the position."""
    begin = 0
    for piece in document.pieces():
        if begin + len(piece) > position:
            low, high = max(least - begin, 0), position - begin
            for mark in ("\n", " "):
                if (found := piece.rfind(mark, low, high)) >= 0:
                    return begin + found + 1
            break
        begin += len(piece)
    return position


def _head(document: Document, at: int) -> Iterator[str]:
    for piece in document.pieces():
        yield piece[:at]
        at -= len(piece)
        if at <= 0:
            return


def _tail(document: Document, at: int) -> Iterator[tuple[int, str]]:
    begin = 0
    for piece in document.pieces():
        text = piece[max(at - begin, 0) :]
        if text.strip():
            yield begin + len(piece) - len(text), text
        begin += len(piece)
