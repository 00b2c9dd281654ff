"""The end of a run: what is written before what may fail, and training and decoding with 64-bit numbers switched on."""

import json
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.model.transformer import Transformer
from dsv3_jax.parallel.layout import layout_for
from dsv3_jax.serve.generate import generate
from dsv3_jax.state.train_state import abstract_state
from dsv3_jax.training import finish as ending
from dsv3_jax.training.resolve import abstract_batch
from dsv3_jax.training.step import make_train_step
from tests.commands import dsv3_process
from tests.conftest import ROOT
from tests.model.test_model import MICRO
from tests.parallel.cases import config_of


def test_a_failing_sample_leaves_the_report(tmp_path, monkeypatch):
    figures = {"held_out_bytes": 7}
    monkeypatch.setattr(ending, "compression", lambda result: figures)
    monkeypatch.setattr(ending, "plot_loss", lambda metrics, path, title: path.write_text(title))

    def sample(result):
        raise TypeError("index arguments must be integers of the same type")

    monkeypatch.setattr(ending, "sample", sample)
    run = SimpleNamespace(path=tmp_path, metrics_file=tmp_path / "metrics.jsonl")
    result: Any = SimpleNamespace(run=run, config=SimpleNamespace(name="tiny"), state=SimpleNamespace(step=3))
    with pytest.raises(TypeError, match="index arguments"):
        ending.finish(result)
    assert json.loads((tmp_path / "report.json").read_text()) == figures
    assert (tmp_path / "loss.png").read_text() == "tiny: step 3"


@pytest.mark.parametrize(
    "overrides",
    [
        ["precision.recipe=deepseek", "precision.controller=true"],
        ["parallel.data=2", "parallel.fsdp=2", "parallel.compress=2"],
    ],
)
def test_a_training_step_with_64_bits_switched_on(overrides):
    """The state keeps its dtypes, before and after, or no checkpoint of the other kind could be read."""
    config = config_of([*overrides, "train.grad_accum_steps=1", "model.num_hidden_layers=2"])
    layout = layout_for(config)
    expected = jax.tree.map(lambda a: a.dtype, abstract_state(config, layout))
    with jax.enable_x64(True):
        state = abstract_state(config, layout)
        after, _ = jax.eval_shape(make_train_step(config, layout), state, abstract_batch(config, layout))
        assert jax.tree.map(lambda a: a.dtype, state) == expected
        assert jax.tree.map(lambda a: a.dtype, after) == expected


def test_decoding_with_64_bits_switched_on():
    model = nnx.jit(lambda: Transformer(MICRO, rngs=nnx.Rngs(0)))()
    prompt = np.arange(5)[None]
    expected = generate(model, prompt, 4)
    with jax.enable_x64(True):
        found = generate(model, prompt, 4)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
def test_a_run_with_64_bits_switched_on(micro_overrides, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    config = str(ROOT / "configs" / "tiny.yaml")
    short = "precision.recipe=deepseek", "model.num_hidden_layers=2", "train.steps=2", "train.eval_every=2", "name=wide"
    done = dsv3_process("train", config, *micro_overrides, *short, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "runs" / "wide" / "sample.txt").read_text()
