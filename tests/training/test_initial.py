"""What a fresh run takes along from `train.init_from` and from its tokenizer."""

import json
import shutil
from dataclasses import replace

import pytest

import dsv3_jax as dsv3
from dsv3_jax.checkpoint.load import Checkpoint, open_checkpoint
from dsv3_jax.checkpoint.storage import read_metadata
from dsv3_jax.config import Config, DataConfig, TrainConfig, load_config
from dsv3_jax.data.companions import Companions
from dsv3_jax.data.special_tokens import SpecialTokens, special_tokens
from dsv3_jax.data.tokenizer import load_tokenizer, train_tokenizer
from dsv3_jax.interop.hf_export import export
from dsv3_jax.interop.hf_import import import_hf
from dsv3_jax.training.initial import initial_companions, open_initial
from dsv3_jax.training.loop import train
from tests.interop.cases import BF16, RAGGED, random_model, read_all, write

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


def test_a_run_keeps_the_dtypes_of_the_import_that_it_began_with(source, corpus_dir, tmp_path):
    """Also once it was resumed: its exports have a norm in 16 bits, as the import's have."""
    tensors, norm = dict(read_all(source)), "model.norm.weight"
    tensors[norm] = tensors[norm].astype(BF16)
    write(tmp_path / "hf", tensors, json.loads((source / "config.json").read_text()))
    shutil.copy(source / "tokenizer.json", tmp_path / "hf")
    ckpt = import_hf(tmp_path / "hf", tmp_path / "ckpt", ("data.seq_len=8",))
    overrides = [
        f"train.init_from={ckpt}", "name=run", "train.eval_every=1", "train.eval_batches=1", "data.batch_size=1",
        f"data.path={corpus_dir}/*.txt", f"data.cache_dir={tmp_path}/cache",
    ]  # fmt: skip
    for steps in (1, 2):
        run = train(load_config(ckpt / "config.yaml", [*overrides, f"train.steps={steps}"]), tmp_path).run.path
        assert read_metadata(open_checkpoint(run).path)["hf_layout"]["others"] == {norm: "BF16"}
    written = read_all(export(run, tmp_path / "out", "hf-f32"))
    assert {name: tensor.dtype for name, tensor in written.items()} == {name: tensor.dtype for name, tensor in tensors.items()}
