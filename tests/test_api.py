"""The public Python API, from training to Hugging Face's layout and back, on one small run."""

import inspect
import json

import numpy as np
import pytest

import dsv3_jax as dsv3
from dsv3_jax import cli
from tests.conftest import ROOT

FUNCTIONS = ("evaluate", "generate", "import_hf", "load", "load_config", "load_hf", "save_hf", "train")


@pytest.fixture
def trained(micro_overrides, tmp_path):
    config = dsv3.load_config(ROOT / "configs" / "tiny.yaml", [*micro_overrides, "name=a", "train.steps=2"])
    return dsv3.train(config, tmp_path)


def test_train_evaluate_load_and_hugging_face(trained, tmp_path, corpus_dir, capsys):
    assert int(trained.state.step) == 2
    assert not trained.interrupted
    run = trained.run.path
    figures = dsv3.evaluate(run)
    assert set(figures) == {"loss", "perplexity", "accuracy", "tokens", "bits_per_byte", "max_load"}
    assert figures["perplexity"] == pytest.approx(np.exp(figures["loss"]))
    capsys.readouterr()
    cli.main(["eval", str(run)])
    assert json.loads(capsys.readouterr().out) == figures
    other = dsv3.evaluate(run, data=f"{corpus_dir}/00[0-3].txt")
    assert other["tokens"] != figures["tokens"]

    model = dsv3.load(run)
    tokens = np.arange(10, dtype=np.int32)[None]
    logits = model(tokens)
    assert (logits.shape, logits.dtype) == ((1, 10, trained.config.model.vocab_size), np.float32)
    ids = dsv3.generate(model, tokens, max_new_tokens=3)
    assert (ids.shape, ids.dtype) == ((1, 13), np.int32)
    np.testing.assert_array_equal(ids[:, :10], tokens)

    exported = dsv3.save_hf(model, tmp_path / "hf", "hf-f32")
    np.testing.assert_array_equal(dsv3.load_hf(exported)(tokens), logits)
    imported = dsv3.import_hf(exported, tmp_path / "imported")
    assert imported == tmp_path / "imported"
    np.testing.assert_array_equal(dsv3.load(imported)(tokens), logits)


def test_bad_input_raises_user_errors(tmp_path):
    for call in (dsv3.evaluate, dsv3.load, dsv3.load_hf, dsv3.load_config, lambda path: dsv3.import_hf(path, tmp_path / "x")):
        with pytest.raises(dsv3.UserError):
            call(tmp_path / "nothing")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstrings_say_what_is_taken_returned_and_raised(name):
    function = getattr(dsv3, name)
    text = inspect.getdoc(function)
    for section in ("Args:", "Returns:", "Raises:"):
        assert section in text
    arguments = text.partition("Args:")[2].partition("Returns:")[0]
    for parameter in inspect.signature(function).parameters:
        assert f"    {parameter}: " in arguments


def test_every_public_name_exists():
    assert {*FUNCTIONS, "UserError", "Config"} <= {*dsv3.__all__}
    for name in dsv3.__all__:
        assert getattr(dsv3, name) is not None
