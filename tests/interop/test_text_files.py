"""The files of an export that are about text, for tokenizers with and without special tokens."""

import json

import pytest
from tokenizers import Tokenizer, models

from dsv3_jax.config import ModelConfig
from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.interop.hf_text import TextFiles

CONFIG = ModelConfig(vocab_size=300)


@pytest.fixture
def tokenizer(tmp_path):
    (tmp_path / "source").mkdir()
    train_tokenizer(["the sea"], 270).save(str(tmp_path / "source/tokenizer.json"))
    return tmp_path / "source/tokenizer.json"


@pytest.fixture
def written(tmp_path):
    """Writes text files, and gives the fields for config.json and a reader of JSON files."""

    def write(files: TextFiles):
        (tmp_path / "out").mkdir()
        fields = files.write(tmp_path / "out", CONFIG)
        return fields, {p.name: json.loads(p.read_text()) for p in (tmp_path / "out").glob("*.json")}

    return write


def as_bytes(**files) -> dict[str, bytes]:
    return {f"{name}.json": json.dumps(its).encode() for name, its in files.items()}


def test_a_tokenizer_without_begin_and_end_tokens_is_exported(tmp_path, written):
    Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")).save(str(tmp_path / "tokenizer.json"))
    for trained in (False, True):
        fields, files = written(TextFiles(tmp_path / "tokenizer.json", trained=trained))
        assert fields == files["generation_config.json"] == {}
        assert not {"bos_token", "eos_token"} & files["tokenizer_config.json"].keys()
        assert Tokenizer.from_file(str(tmp_path / "out/tokenizer.json")).encode("a").ids == [0]
        (tmp_path / "out").rename(tmp_path / str(trained))


def test_without_a_tokenizer_there_are_only_ids(written):
    fields, files = written(TextFiles(companions=as_bytes(config={"eos_token_id": [163586], "pad_token_id": 3, "dtype": "x"})))
    assert fields == {}
    assert files == {"generation_config.json": {"eos_token_id": [163586], "pad_token_id": 3}}


@pytest.mark.parametrize(("ends", "found"), [([1, 7], [1, 7]), ([7], 7), (7, 7), (None, 1)])
def test_one_end_token_is_a_number_and_several_are_a_list(tokenizer, written, ends, found):
    fields, files = written(TextFiles(tokenizer, as_bytes(config={"eos_token_id": ends})))
    assert fields == {"bos_token_id": 0, "eos_token_id": found}
    assert files["tokenizer_config.json"]["bos_token"] == "<|begin_of_text|>"


SETTINGS = {"bos_token": "a", "eos_token": "<|end_of_text|>", "pad_token": "b", "add_bos_token": False, "add_eos_token": True}


@pytest.mark.parametrize("trained", [False, True])
def test_settings_that_would_undo_the_begin_token_follow_it(tokenizer, written, trained):
    """transformers makes a post-processor of add_bos_token and add_eos_token, where tokenizer_config.json has one of them."""
    _, files = written(TextFiles(tokenizer, as_bytes(tokenizer_config=SETTINGS, config={"bos_token_id": 0}), trained))
    changes = {"bos_token": "<|begin_of_text|>", "add_bos_token": True, "add_eos_token": False} if trained else {}
    assert files["tokenizer_config.json"] == SETTINGS | changes
    assert (files["tokenizer.json"]["post_processor"] is not None) == trained


@pytest.mark.parametrize(
    "came",
    [
        b'{"eos_token":   "<|end_of_text|>"}\n',
        b'{"add_bos_token": true,  "add_eos_token": false, "bos_token": {"content": "<|begin_of_text|>"}}',
    ],
)
def test_settings_that_agree_with_it_stay_as_they_came(tokenizer, tmp_path, written, came):
    """Those that say nothing of a begin token, and those of the released model."""
    written(TextFiles(tokenizer, {"tokenizer_config.json": came}, trained=True))
    assert (tmp_path / "out/tokenizer_config.json").read_bytes() == came
