"""Tokenizers: a byte-level BPE trained once on the corpus and cached, or any tokenizer.json."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dsv3_jax.errors import UserError

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
# names under which a foreign tokenizer.json may hold them, ours first
_BOS_NAMES = (BOS, "<｜begin▁of▁sentence｜>", "<s>", "<|endoftext|>", "<bos>")
_EOS_NAMES = (EOS, "<｜end▁of▁sentence｜>", "</s>", "<|endoftext|>", "<eos>")
_TRAINING_CHARACTERS = 16 * 2**20  # more text changes a small vocabulary little, and training is linear in it


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


def load_tokenizer(path: str | Path, vocab_size: int) -> Tokenizer:
    """Read a tokenizer.json and check that its ids fit the model's vocabulary."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for every failure
        raise UserError(f"data.tokenizer: cannot read {path}: {error}") from None
    size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if size > vocab_size:
        raise UserError(f"data.tokenizer: {path} has {size} tokens, model.vocab_size={vocab_size} is smaller")
    special_ids(tokenizer)
    return tokenizer


def special_ids(tokenizer: Tokenizer) -> tuple[int, int]:
    """Ids of the begin- and end-of-text tokens, which frame every document."""
    found = []
    for what, names in (("begin", _BOS_NAMES), ("end", _EOS_NAMES)):
        ids = [i for name in names if (i := tokenizer.token_to_id(name)) is not None]
        if not ids:
            raise UserError(f"data.tokenizer: no {what}-of-text token; known names: {', '.join(names)}")
        found.append(ids[0])
    return found[0], found[1]


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """A digest of everything that decides how text becomes ids."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()[:16]
