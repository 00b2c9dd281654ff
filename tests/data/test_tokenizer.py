"""Tokenizers that others wrote: what is read of them, what is left out, and what is refused in one line."""

import json
import os

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from dsv3_jax.config import DataConfig
from dsv3_jax.data.special_tokens import BOS, EOS, special_tokens
from dsv3_jax.data.store import read_documents
from dsv3_jax.data.tokenizer import (
    load_tokenizer,
    text_encoder,
    tokenizer_errors,
    tokenizer_hash,
    train_tokenizer,
)
from dsv3_jax.errors import UserError

TRUNCATION = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
PADDING = {"strategy": {"Fixed": 12}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 1, "pad_type_id": 0}
PADDING["pad_token"] = EOS


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(["the sea and the ships of the sea"], 300)


@pytest.fixture
def written(trained, tmp_path):
    """Writes tokenizer.json with other fields, and gives its path."""

    def write(**fields):
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps(json.loads(trained.to_str()) | fields))
        return path

    return write


def test_stored_truncation_and_padding_are_left_out(trained, written):
    loaded = load_tokenizer(written(truncation=TRUNCATION, padding=PADDING), 300)
    for text in ("the sea and the ships of the sea " * 9, "sea"):
        assert loaded.encode(text).ids == trained.encode(text).ids
    assert tokenizer_hash(loaded) == tokenizer_hash(trained)


def test_a_stride_beyond_the_truncation_panics_nowhere(trained, written):
    loaded = load_tokenizer(written(truncation=TRUNCATION | {"stride": 9}), 300)
    assert loaded.encode("the sea " * 30).ids == trained.encode("the sea " * 30).ids


def test_a_panic_becomes_one_line(written, capfd):
    path = written(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"})
    with pytest.raises(UserError) as error:
        load_tokenizer(path, 300)
    assert str(error.value).startswith(f"data.tokenizer: cannot read {path}: Precompiled")
    assert "\n" not in str(error.value)
    os.write(2, b"standard error is open\n")
    assert capfd.readouterr().err == "standard error is open\n"  # and nothing of Rust's before it


def test_only_the_librarys_own_failures_are_turned_into_lines():
    with pytest.raises(UserError, match="cannot encode: two lines"), tokenizer_errors("cannot encode"):
        raise Exception("two\nlines")
    with pytest.raises(KeyboardInterrupt), tokenizer_errors("cannot encode"):
        raise KeyboardInterrupt


def test_a_byte_order_mark_and_the_home_directory(trained, written, monkeypatch):
    path = written()
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    monkeypatch.setenv("HOME", str(path.parent))
    assert load_tokenizer("~/tokenizer.json", 300).to_str() == trained.to_str()


@pytest.mark.parametrize(("name", "expected"), [("", "is a directory"), ("none.json", "No such file")])
def test_what_is_no_file_is_refused(tmp_path, name, expected):
    with pytest.raises(UserError, match=rf"^data\.tokenizer: cannot read .*{expected}"):
        load_tokenizer(tmp_path / name, 300)


def test_names_of_control_tokens_in_a_text_are_text(trained):
    """Marked as special or not: the framing tokens, and names in bars as released tokenizers have them."""
    tokenizer = Tokenizer.from_str(trained.to_str())
    tokenizer.add_tokens(["<｜User｜>", "<|im_end|>", "ships of"])
    text = f"a {EOS} b {BOS} <｜User｜><|im_end|> the ships of <b> |x|"
    special = special_tokens(tokenizer)
    as_text = text_encoder(tokenizer, special, special_tokens=False).encode(text, add_special_tokens=False).ids
    control = {special.begin, *special.ends, tokenizer.token_to_id("<｜User｜>"), tokenizer.token_to_id("<|im_end|>")}
    assert not control & set(as_text)
    assert tokenizer.token_to_id("ships of") in as_text  # an added word is a word
    assert tokenizer.decode(as_text) == text
    as_tokens = text_encoder(tokenizer, special, special_tokens=True).encode(text, add_special_tokens=False).ids
    assert as_tokens == tokenizer.encode(text, add_special_tokens=False).ids
    assert control <= set(as_tokens)
    assert not tokenizer.encode_special_tokens  # the tokenizer itself is as it was: prompts hold control tokens


def plain_bpe(**options) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    names = [EOS, *options.values()]
    tokenizer.train_from_iterator(["abc ab"], trainers.BpeTrainer(special_tokens=names, show_progress=False))
    return tokenizer


def test_characters_without_a_token_are_said(tmp_path):
    """They were left out silently. A token for the unknown, or bytes, leave out nothing; white space is left out on purpose."""
    for name, text in (("a", "abc \n"), ("b", "ab\x1b cäb ä")):
        (tmp_path / f"{name}.txt").write_text(text)
    for tokenizer, expected in (
        (
            plain_bpe(),
            [f"it has no token for 3 characters of the text, such as '\\x1b' in {tmp_path}/b.txt, and leaves them out"],
        ),
        (plain_bpe(unk_token="<unk>"), []),
        (train_tokenizer(["abc"], 258), []),
    ):
        lines: list[str] = []
        read_documents(DataConfig(path=str(tmp_path)), tokenizer, lines.append)
        assert [line.removeprefix("data.tokenizer: ") for line in lines if "no token" in line] == expected
