"""Tokenizers: a byte-level BPE trained once on the corpus and cached, or any tokenizer.json."""

import contextlib
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dsv3_jax.data.special_tokens import BOS, EOS, SpecialTokens
from dsv3_jax.errors import UserError
from dsv3_jax.files import expand_home, read_regular

_TRAINING_CHARACTERS = 16 * 2**20  # more text changes a small vocabulary little, and training is linear in it
_MOST_BYTES = 2**28  # of a tokenizer.json; those of the largest vocabularies have 30 MB
_IN_BARS = re.compile(r"<([|｜]).+\1>", re.DOTALL)
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer on the first texts: every string can be encoded and decodes to itself exactly."""
    smallest = 256 + 2
    if vocab_size < smallest:
        raise UserError(f"model.vocab_size={vocab_size} is too small for a byte-level tokenizer; use at least {smallest}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def enough():
        total = 0
        for text in texts:
            yield text
            total += len(text)
            if total > _TRAINING_CHARACTERS:
                return

    tokenizer.train_from_iterator(enough(), trainer)
    return tokenizer


@contextlib.contextmanager
def tokenizer_errors(what: str) -> Iterator[None]:
    """Turns whatever the tokenizers library raises into a `UserError` that begins with `what`."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:  # for most failures it raises bare Exception, and its panics are no Exceptions
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what}: {' '.join(str(error).split())}") from None


@contextlib.contextmanager
def _without_backtraces() -> Iterator[None]:
    """Rust prints a panic's backtrace to the process's standard error before Python hears of it: here it goes nowhere."""
    with contextlib.ExitStack() as until_end:
        try:
            saved = os.dup(2)
        except OSError:  # it is closed
            yield
            return
        until_end.callback(os.close, saved)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        until_end.callback(os.close, nowhere)
        os.dup2(nowhere, 2)
        until_end.callback(os.dup2, saved, 2)
        yield


def load_tokenizer(path: str | Path, vocab_size: int) -> Tokenizer:
    """Read a tokenizer.json and check that its ids fit the model's vocabulary.

    Truncation and padding that it may ask for are left out: they are settings of somebody's batches, and would cut documents.
    """
    path = expand_home(path)
    try:
        content = read_regular(path, _MOST_BYTES).removeprefix(_BYTE_ORDER_MARK)
    except UserError as error:
        raise UserError(f"data.tokenizer: {error}") from None
    with tokenizer_errors(f"data.tokenizer: cannot read {path}"), _without_backtraces():
        tokenizer = Tokenizer.from_buffer(content)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if size > vocab_size:
        raise UserError(f"data.tokenizer: {path} has {size} tokens, model.vocab_size={vocab_size} is smaller")
    return tokenizer


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """A digest of everything that decides how text becomes ids."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()[:16]


def text_encoder(tokenizer: Tokenizer, special: SpecialTokens, special_tokens: bool) -> Tokenizer:
    """A copy of a tokenizer for documents. Without `special_tokens` the names of control tokens in a text are text.

    Otherwise a document that quotes `<|end_of_text|>` would end there. Control tokens are those marked as special, those that
    frame documents, and others whose names stand in bars, which released tokenizers do not all mark.
    """
    with tokenizer_errors("data.tokenizer"), _without_backtraces():  # the library reads some that it does not read again
        encoder = Tokenizer.from_str(tokenizer.to_str())
    if not special_tokens:
        framing = [name for i in (special.begin, *special.ends) if i is not None and (name := tokenizer.id_to_token(i))]
        added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
        encoder.add_special_tokens(framing + [name for name in added if _IN_BARS.fullmatch(name)])
        encoder.encode_special_tokens = True
    return encoder
