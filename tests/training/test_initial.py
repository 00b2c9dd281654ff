"""What a fresh run takes along from `train.init_from` and from its tokenizer."""

import json
from dataclasses import replace

import pytest

import dsv3_jax as dsv3
from dsv3_jax.checkpoint.load import Checkpoint
from dsv3_jax.config import Config, DataConfig, TrainConfig
from dsv3_jax.data.companions import Companions
from dsv3_jax.data.special_tokens import SpecialTokens, special_tokens
from dsv3_jax.data.tokenizer import load_tokenizer, train_tokenizer
from dsv3_jax.interop.hf_import import import_hf
from dsv3_jax.training.initial import initial_companions, open_initial
from tests.interop.cases import RAGGED, random_model

MODEL = replace(RAGGED, vocab_size=300, hidden_size=16, num_hidden_layers=1, num_nextn_predict_layers=0, kv_lora_rank=16)
GENERATION = b'{"eos_token_id": [7, 1]}'


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint as it is downloaded, with a tokenizer of another kind beside tokenizer.json."""
    directory = dsv3.save_hf(random_model(MODEL), tmp_path_factory.mktemp("source") / "hf", "hf-f32")
    train_tokenizer(["the sea"], 270).save(str(directory / "tokenizer.json"))
    (directory / "generation_config.json").write_bytes(GENERATION)
    (directory / "tiktoken.model").write_text("ranks")
    (directory / "LICENSE").write_text("may be used")
    return directory


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A tokenizer of its own, which says what ends a text."""
    directory = tmp_path_factory.mktemp("other")
    train_tokenizer(["ships of the line"], 280).save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"bos_token": null, "eos_token": "a"}')
    (directory / "config.json").write_text('{"model_type": "llama", "pad_token_id": 3}')
    (directory / "LICENSE").write_text("of other weights")
    return directory / "tokenizer.json"


def config(init_from=None, tokenizer=None) -> Config:
    chosen = Config(model=MODEL, data=DataConfig(seq_len=8, tokenizer=tokenizer and str(tokenizer)))
    return replace(chosen, train=TrainConfig(init_from=init_from and str(init_from)))


def taken_along(config: Config) -> Companions:
    return initial_companions(config, open_initial(config))


def test_a_models_own_files_go_along(source, tmp_path):
    ckpt = import_hf(source, tmp_path / "ckpt")
    for tokenizer in (ckpt / "tokenizer.json", source / "tokenizer.json"):  # the same, by two paths
        found = taken_along(config(ckpt, tokenizer))
        assert {name: found[name] for name in found if name != "config.json"} == {
            "generation_config.json": GENERATION, "tiktoken.model": b"ranks", "LICENSE": b"may be used",
        }  # fmt: skip
        assert json.loads(found["config.json"]) == json.loads((source / "config.json").read_text())
    assert Checkpoint(ckpt, config()).special_tokens() == SpecialTokens(0, (7, 1))


def test_another_tokenizer_brings_its_own(source, other, tmp_path):
    """With a tokenizer of other tokens, the model's files about text stay behind, and its licence does not."""
    ckpt = import_hf(source, tmp_path / "ckpt")
    found = taken_along(config(ckpt, other))
    assert set(found) == {"LICENSE", "tokenizer_config.json", "config.json"}
    assert found["LICENSE"] == b"may be used"
    fields = json.loads(found["config.json"])
    assert (fields["model_type"], fields["pad_token_id"]) == ("deepseek_v3", 3)
    loaded = load_tokenizer(other, 300)
    assert special_tokens(loaded, found) == SpecialTokens(0, (loaded.token_to_id("a"),))


def test_a_model_without_tokenizer_json_keeps_its_tokenizer(source, other, tmp_path):
    """As Kimi's: the tokenizer.json that is named stands for the model's own."""
    (source / "tokenizer.json").rename(tmp_path / "away.json")
    ckpt = import_hf(source, tmp_path / "ckpt")
    (tmp_path / "away.json").rename(source / "tokenizer.json")
    found = taken_along(config(ckpt, other))
    assert {"tiktoken.model", "generation_config.json", "tokenizer_config.json", "LICENSE"} < set(found)
    assert special_tokens(load_tokenizer(other, 300), found).ends[:2] == (7, 1)


def test_a_tokenizer_alone_brings_what_is_about_text(other):
    assert taken_along(config()) == {}
    found = taken_along(config(tokenizer=other))
    assert set(found) == {"tokenizer_config.json", "config.json"}
    assert json.loads(found["config.json"]) == {"pad_token_id": 3}
