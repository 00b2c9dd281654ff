"""The tokenised corpus on disk: one flat array of ids and document offsets, made once and memory-mapped.

A cache entry is a directory named by a hash of everything that decides its contents; it is written beside its final path and
renamed, so that it is complete or absent.
"""

import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from dsv3_jax.config import DataConfig
from dsv3_jax.data.corpus import Document, documents, fingerprint, is_validation
from dsv3_jax.data.tokenizer import load_tokenizer, special_ids, tokenizer_hash, train_tokenizer
from dsv3_jax.errors import UserError
from dsv3_jax.files import user_cache

_FORMAT = "1"  # part of every cache key: raise it when the files' meaning changes
_ENCODE_BATCH = 256


@dataclass(frozen=True)
class TokenStore:
    """Documents as token ids. Invariants: offsets[0] = 0, offsets[-1] = len(tokens), every document is bos .. eos."""

    tokens: np.ndarray  # i32[total], memory-mapped
    offsets: np.ndarray  # i64[documents + 1]
    ids: list[str]  # a name per document
    text_bytes: np.ndarray  # i64[documents], UTF-8 bytes of the text

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Corpus:
    """A tokenised corpus in its two splits."""

    tokenizer: Tokenizer
    train: TokenStore
    validation: TokenStore


def cache_root(config: DataConfig) -> Path:
    """The directory of cache entries: `data.cache_dir`, or one in the user's cache."""
    if config.cache_dir is not None:
        return Path(config.cache_dir).expanduser()
    return user_cache()


def cached(root: Path, key: str, build: Callable[[Path], None]) -> Path:
    """Directory `root/key`, made by `build` in a temporary sibling first if it does not exist."""
    target = root / key
    if target.is_dir():
        return target
    try:
        root.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=root))
    except OSError as error:
        raise UserError(f"data.cache_dir: cannot write {root}: {error.strerror}") from None
    try:
        build(scratch)
        try:
            scratch.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was faster, with the same contents
                raise
    except OSError as error:
        raise UserError(f"data.cache_dir: cannot write {target}: {error.strerror}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _write_store(directory: Path, encoded: Iterator[tuple[str, int, list[int]]]) -> None:
    directory.mkdir()
    offsets, ids, sizes = [0], [], []
    with open(directory / "tokens.bin", "wb") as out:
        for name, size, token_ids in encoded:
            out.write(np.asarray(token_ids, np.int32).tobytes())
            offsets.append(offsets[-1] + len(token_ids))
            ids.append(name)
            sizes.append(size)
    np.save(directory / "offsets.npy", np.asarray(offsets, np.int64))
    np.save(directory / "text_bytes.npy", np.asarray(sizes, np.int64))
    (directory / "ids.json").write_text(json.dumps(ids))


def _read_store(directory: Path) -> TokenStore:
    offsets = np.load(directory / "offsets.npy")
    tokens = np.memmap(directory / "tokens.bin", np.int32, "r") if offsets[-1] else np.zeros(0, np.int32)
    ids = json.loads((directory / "ids.json").read_text())
    return TokenStore(tokens, offsets, ids, np.load(directory / "text_bytes.npy"))


def _encode(found: Iterator[Document], tokenizer: Tokenizer) -> Iterator[tuple[str, int, list[int]]]:
    """(name, UTF-8 bytes, ids) of each document, framed by begin and end of text."""
    bos, eos = special_ids(tokenizer)
    batch = []

    def flush():
        encodings = tokenizer.encode_batch_fast([d.text for d in batch], add_special_tokens=False)
        for document, encoding in zip(batch, encodings, strict=True):
            yield document.id, len(document.text.encode()), [bos, *encoding.ids, eos]
        batch.clear()

    for document in found:
        batch.append(document)
        if len(batch) == _ENCODE_BATCH:
            yield from flush()
    yield from flush()


def _tokenizer_for(config: DataConfig, vocab_size: int, corpus_key: str) -> Tokenizer:
    if config.tokenizer is not None:
        return load_tokenizer(config.tokenizer, vocab_size)

    def build(directory: Path) -> None:
        texts = (d.text for d in documents(config) if not is_validation(d.text, config.validation_fraction))
        train_tokenizer(texts, vocab_size).save(str(directory / "tokenizer.json"))

    key = _key("tokenizer", corpus_key, str(vocab_size), str(config.validation_fraction))
    return load_tokenizer(cached(cache_root(config), key, build) / "tokenizer.json", vocab_size)


def _key(kind: str, *parts: str) -> str:
    return f"{kind}-" + hashlib.sha256("\0".join((_FORMAT, *parts)).encode()).hexdigest()[:16]


def load_corpus(config: DataConfig, vocab_size: int, report: Callable[[str], None] = lambda _: None) -> Corpus:
    """Tokenizer and both splits, from the cache where it holds them; `report` gets a line about what takes time.

    Raises `UserError` when the data are missing, empty or bad, when a split holds no document, or when the tokenizer does
    not fit the vocabulary.
    """
    corpus_key = fingerprint(config)
    report("tokenizer: training or loading")
    tokenizer = _tokenizer_for(config, vocab_size, corpus_key)

    def build(directory: Path) -> None:
        report("corpus: tokenising")
        for split, validation in (("train", False), ("validation", True)):
            found = (d for d in documents(config) if is_validation(d.text, config.validation_fraction) == validation)
            _write_store(directory / split, _encode(found, tokenizer))
        _check_not_empty(config, {split: len(_read_store(directory / split)) for split in ("train", "validation")})

    key = _key("tokens", corpus_key, tokenizer_hash(tokenizer), str(config.validation_fraction))
    directory = cached(cache_root(config), key, build)
    return Corpus(tokenizer, _read_store(directory / "train"), _read_store(directory / "validation"))


def _check_not_empty(config: DataConfig, documents_in: dict[str, int]) -> None:
    found = sum(documents_in.values())
    where = config.path or "the standard library's source"
    if not found:
        raise UserError(f"data.path: {where} holds no text")
    for split, count in documents_in.items():
        if not count:
            raise UserError(
                f"data.validation_fraction={config.validation_fraction} leaves no {split} document out of {found} in "
                f"{where}; add documents or change the fraction"
            )


def read_documents(config: DataConfig, tokenizer: Tokenizer) -> TokenStore:
    """All documents of `config.path`, not split, in memory (for `dsv3 eval --data`)."""
    with tempfile.TemporaryDirectory() as scratch:
        _write_store(Path(scratch) / "all", _encode(documents(config), tokenizer))
        store = _read_store(Path(scratch) / "all")
        store = dataclasses.replace(store, tokens=np.array(store.tokens))
    if not len(store):
        raise UserError(f"data.path: {config.path} holds no text")
    return store
