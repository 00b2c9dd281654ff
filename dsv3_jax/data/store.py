"""The tokenised corpus on disk: one flat array of ids and document offsets, made once, cached and memory-mapped."""

import hashlib
import tempfile
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from dsv3_jax.config import DataConfig
from dsv3_jax.data.cache import cache_root, cached
from dsv3_jax.data.companions import Companions, beside
from dsv3_jax.data.corpus import documents, fingerprint
from dsv3_jax.data.document import Document
from dsv3_jax.data.dropped import DroppedCharacters
from dsv3_jax.data.special_tokens import SpecialTokens, special_tokens
from dsv3_jax.data.split import split_documents, validation_fingerprint
from dsv3_jax.data.tokenizer import (
    load_tokenizer,
    text_encoder,
    tokenizer_errors,
    tokenizer_hash,
    train_tokenizer,
)
from dsv3_jax.errors import UserError

_FORMAT = "2"  # part of every cache key: raise it when the files' meaning changes
_ENCODE_BATCH = 2**19  # bytes of text, in UTF-8: what encoding takes is some 100 times as much, in threads


@dataclass(frozen=True)
class TokenStore:
    """Documents as token ids, framed by `SpecialTokens.frame`. Invariants: offsets[0] = 0, offsets[-1] = len(tokens)."""

    tokens: np.ndarray  # i32[total], memory-mapped
    offsets: np.ndarray  # i64[documents + 1]
    ids: Sequence[str]  # a name per document
    text_bytes: np.ndarray  # i64[documents], UTF-8 bytes of the text

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Corpus:
    """A tokenised corpus in its two splits."""

    tokenizer: Tokenizer
    special: SpecialTokens
    train: TokenStore
    validation: TokenStore


class _Names(Sequence[str]):
    """Strings in a memory-mapped file: millions of names take no memory."""

    def __init__(self, text: np.ndarray, ends: np.ndarray):
        self._text, self._ends = text, ends  # u8[bytes], in UTF-8; i64[names + 1]

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        return self._text[self._ends[index] : self._ends[index + 1]].tobytes().decode("utf-8", "surrogateescape")


class _StoreWriter:
    """Writes a token store's files, document by document and each of them piece by piece."""

    def __init__(self, directory: Path, special: SpecialTokens):
        directory.mkdir()
        self._directory = directory
        self._begin, self._end = (np.array(ids, np.int32) for ids in special.frame)
        self._tokens, self._names = open(directory / "tokens.bin", "wb"), open(directory / "ids.bin", "wb")  # noqa: SIM115
        self._offsets, self._names_ends, self._text_bytes = array("q", [0]), array("q", [0]), array("q")
        self._document: Document | None = None

    def __enter__(self) -> "_StoreWriter":
        return self

    def __exit__(self, error: type | None, *_) -> None:
        with self._tokens, self._names:
            if error is not None:
                return
            self._end_document()
        for name, values in (("offsets", self._offsets), ("ids_ends", self._names_ends), ("text_bytes", self._text_bytes)):
            np.save(self._directory / f"{name}.npy", np.asarray(values, np.int64))

    def add(self, document: Document, text_bytes: int, ids: list[int]) -> None:
        """The next piece of a document: its size in UTF-8 and its token ids."""
        if document is not self._document:
            self._end_document()
            self._document = document
            self._names_ends.append(self._names_ends[-1] + self._names.write(document.id.encode("utf-8", "surrogateescape")))
            self._offsets.append(self._offsets[-1])
            self._text_bytes.append(0)
            self._write(self._begin)
        self._text_bytes[-1] += text_bytes
        self._write(np.array(ids, np.int32))

    def _end_document(self) -> None:
        if self._document is not None:
            self._write(self._end)

    def _write(self, tokens: np.ndarray) -> None:
        self._tokens.write(tokens.tobytes())
        self._offsets[-1] += len(tokens)


def _map(path: Path, dtype: type) -> np.ndarray:
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)


def _read_store(directory: Path) -> TokenStore:
    offsets, ends, text_bytes = (np.load(directory / f"{name}.npy") for name in ("offsets", "ids_ends", "text_bytes"))
    names = _Names(_map(directory / "ids.bin", np.uint8), ends)
    return TokenStore(_map(directory / "tokens.bin", np.int32), offsets, names, text_bytes)


def _write_encoded(
    found: Iterable[tuple[_StoreWriter, Document]], encoder: Tokenizer, report: Callable[[str], None]
) -> None:  # fmt: skip
    """Encode documents, and write each into its store, framed by begin and end of text."""
    dropped = DroppedCharacters(encoder)
    batch: list[tuple[_StoreWriter, Document, str, int]] = []

    def flush() -> None:
        with tokenizer_errors("data.tokenizer: cannot encode the text"):
            encodings = encoder.encode_batch_fast([piece for _, _, piece, _ in batch], add_special_tokens=False)
        for (writer, document, _, size), encoding in zip(batch, encodings, strict=True):
            writer.add(document, size, encoding.ids)
        batch.clear()

    total = 0
    for writer, document in found:
        for piece in document.pieces():
            size = len(piece.encode())
            if batch and total + size > _ENCODE_BATCH:
                flush()
                total = 0
            batch.append((writer, document, piece, size))
            total += size
            dropped.look_at(piece, document.id)
    flush()
    if dropped.line:
        report(dropped.line)


def _tokenizer_for(config: DataConfig, vocab_size: int, corpus_key: str) -> Tokenizer:
    if config.tokenizer is not None:
        return load_tokenizer(config.tokenizer, vocab_size)

    def build(directory: Path) -> None:
        texts = (piece for held_out, d in split_documents(config) if not held_out for piece in d.pieces())
        train_tokenizer(texts, vocab_size).save(str(directory / "tokenizer.json"))

    key = _key("tokenizer", corpus_key, str(vocab_size), *_split_key(config))
    return load_tokenizer(cached(cache_root(config), key, build) / "tokenizer.json", vocab_size)


def _split_key(config: DataConfig) -> tuple[str, ...]:
    """What decides which documents are held out, beside the corpus."""
    return (str(config.validation_fraction), "" if config.validation_path is None else "by path")


def _key(kind: str, *parts: str) -> str:
    return f"{kind}-" + hashlib.sha256("\0".join((_FORMAT, *parts)).encode()).hexdigest()[:16]


def load_corpus(
    config: DataConfig,
    vocab_size: int,
    report: Callable[[str], None] = lambda _: None,
    companions: Companions | None = None,
) -> Corpus:
    """Tokenizer and both splits, from the cache where it holds them; `report` gets a line about what takes time.

    `companions` say which tokens begin and end a text; None: the files beside `data.tokenizer`.
    Raises `UserError` when the data are missing, empty or bad, when a split holds no document, or when the tokenizer does
    not fit the vocabulary.
    """
    corpus_key = fingerprint(config)
    report("tokenizer: training or loading")
    tokenizer = _tokenizer_for(config, vocab_size, corpus_key)
    if companions is None and config.tokenizer is not None:
        companions = beside(config.tokenizer)
    special = special_tokens(tokenizer, companions)

    def build(directory: Path) -> None:
        report("corpus: tokenising")
        with _StoreWriter(directory / "train", special) as train, _StoreWriter(directory / "validation", special) as rest:
            found = ((rest if held_out else train, document) for held_out, document in split_documents(config, report))
            _write_encoded(found, text_encoder(tokenizer, special, config.special_tokens), report)
        _check_not_empty(config, {split: len(_read_store(directory / split)) for split in ("train", "validation")})

    parts = (corpus_key, validation_fingerprint(config), tokenizer_hash(tokenizer), repr(special), str(config.special_tokens))
    key = _key("tokens", *parts, *_split_key(config))
    directory = cached(cache_root(config), key, build)
    return Corpus(tokenizer, special, _read_store(directory / "train"), _read_store(directory / "validation"))


def _check_not_empty(config: DataConfig, documents_in: dict[str, int]) -> None:
    found = sum(documents_in.values())
    where = config.path or "the standard library's source"
    if not found:
        raise UserError(f"data.path: {where} holds no text")
    if config.validation_path is not None:
        for split, path in (
            ("train", f"data.path: {where}"),
            ("validation", f"data.validation_path: {config.validation_path}"),
        ):
            if not documents_in[split]:
                raise UserError(f"{path} holds no text")
    for split, count in documents_in.items():
        if not count:
            raise UserError(
                f"data.validation_fraction={config.validation_fraction} leaves no {split} document out of {found} in "
                f"{where}; add documents or change the fraction"
            )


def read_documents(
    config: DataConfig,
    tokenizer: Tokenizer,
    report: Callable[[str], None] = lambda _: None,
    special: SpecialTokens | None = None,
) -> TokenStore:
    """All documents of `config.path`, not split (for `dsv3 eval --data`); `report` as for `load_corpus`.

    `special` frames them; None: the tokenizer's tokens that have known names.
    """
    special = special or special_tokens(tokenizer)
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "all"
        with _StoreWriter(directory, special) as writer:
            found = ((writer, document) for document in documents(config, report))
            _write_encoded(found, text_encoder(tokenizer, special, config.special_tokens), report)
        store = _read_store(directory)  # mapped files stay when their names are gone
    if not len(store):
        raise UserError(f"data.path: {config.path} holds no text")
    return store
