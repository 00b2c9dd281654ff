"""Parity with transformers on checkpoints it wrote: logits, loss, gradients, greedy tokens, MTP, and refusals by name."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import dsv3_jax as dsv3
from dsv3_jax.config import load_config
from dsv3_jax.data.batch import Batch
from dsv3_jax.errors import UserError
from dsv3_jax.interop.hf_config import read_hf_config
from dsv3_jax.interop.hf_tensors import sources
from dsv3_jax.model.parameters import RouterBias
from dsv3_jax.training.objective import LossWeights, Share, objective
from tests.conftest import FIXTURES, ROOT

NAMES = sorted(p.parent.name for p in FIXTURES.glob("*/reference.npz"))


@pytest.fixture(scope="module", params=NAMES)
def case(request):
    directory = FIXTURES / request.param
    return dsv3.load_hf(directory), np.load(directory / "reference.npz")


def test_logits(case):
    model, reference = case
    logits = model(reference["input_ids_0"])
    assert logits.dtype == jnp.float32
    assert np.abs(np.asarray(logits) - reference["logits_0"]).max() <= 2e-4


def test_greedy_tokens_with_the_cache(case):
    model, reference = case
    new = reference["greedy_ids"].shape[1] - reference["prompt_ids"].shape[1]
    np.testing.assert_array_equal(dsv3.generate(model, reference["prompt_ids"], new), reference["greedy_ids"])


def gradients(model, ids):
    """Loss and gradients of the mean next-token cross-entropy, without balance and MTP terms."""
    model.mtp = nnx.List([])
    batch = Batch(jnp.asarray(ids, jnp.int32), jnp.zeros(ids.shape, jnp.int32))
    graph, params, bias = nnx.split(model, nnx.Param, RouterBias)
    counts = batch.target_counts(0)

    def loss(params):
        return objective(nnx.merge(graph, params, bias), batch, Share(LossWeights(0.0, 0.0), counts, ids.shape[0]))[0]

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    return float(value), nnx.to_pure_dict(grads)


def test_loss_and_gradients(case):
    model, reference = case
    loss, grads = gradients(nnx.clone(model), reference["train_ids"])
    assert abs(loss - float(reference["train_loss"])) <= 1e-5
    # the layout conversions are linear, so that they also turn theirs into our gradients
    theirs = {name.removeprefix("grad:"): reference[name] for name in reference.files if name.startswith("grad:")}
    compared = 0
    for source in sources(model.config):
        if source.tensor not in theirs:
            continue
        ours = grads
        for key in source.array.split("/"):
            ours = ours[int(key) if key.isdigit() else key]
        expected = source.to_region(theirs[source.tensor])
        difference = np.abs(np.asarray(ours)[source.full_index] - expected).max()
        assert difference <= 1e-4 * max(np.abs(expected).max(), 1e-6), source.tensor
        compared += 1
    assert compared >= 4


def test_mtp_module_equals_transformers():
    model = dsv3.load_hf(FIXTURES / "options_b")
    reference = np.load(FIXTURES / "options_b" / "reference.npz")
    ids = jnp.asarray(reference["mtp_ids"])
    segment_BL = jnp.zeros((2, ids.shape[1] - 1), jnp.int32)
    hidden_BLD, _ = model.hidden(ids[:, :-1], segment_BL)
    hidden_BLD, _ = model.mtp_hidden(0, hidden_BLD, ids[:, 1:], segment_BL)
    assert np.abs(np.asarray(hidden_BLD @ model.head_weight()) - reference["mtp_logits"]).max() <= 2e-4


def test_a_wrong_rope_layout_would_be_noticed(tmp_path):
    """The control: the same weights read with the other pairing give other logits."""
    shutil.copytree(FIXTURES / "v3_tiny", tmp_path / "m")
    edit_config(tmp_path / "m", rope_interleave=False)
    reference = np.load(FIXTURES / "v3_tiny" / "reference.npz")
    logits = dsv3.load_hf(tmp_path / "m")(reference["input_ids_0"])
    assert np.abs(np.asarray(logits) - reference["logits_0"]).max() > 1e-2


def test_bfloat16_checkpoint(tmp_path):
    import ml_dtypes

    shutil.copytree(FIXTURES / "v3_tiny", tmp_path / "m")
    tensors = {k: v.astype(ml_dtypes.bfloat16) for k, v in load_file(tmp_path / "m/model.safetensors").items()}
    save_file(tensors, tmp_path / "m/model.safetensors")
    model = dsv3.load_hf(tmp_path / "m")
    np.testing.assert_array_equal(np.asarray(model.embed_VD[...]), tensors["model.embed_tokens.weight"].astype(np.float32))


def test_sharded_checkpoint_with_an_index(tmp_path):
    shutil.copytree(FIXTURES / "v3_tiny", tmp_path / "m")
    tensors = load_file(tmp_path / "m/model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2])):
        save_file({n: tensors[n] for n in part}, tmp_path / f"m/model-{i}.safetensors")
        weight_map |= dict.fromkeys(part, f"model-{i}.safetensors")
    (tmp_path / "m/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "m/model.safetensors").unlink()
    ids = np.load(FIXTURES / "v3_tiny/reference.npz")["input_ids_0"]
    np.testing.assert_array_equal(dsv3.load_hf(tmp_path / "m")(ids), dsv3.load_hf(FIXTURES / "v3_tiny")(ids))


def edit_config(directory, **fields):
    raw = json.loads((directory / "config.json").read_text())
    raw |= fields
    (directory / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"model_type": "llama"}, "model_type='llama'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"num_key_value_heads": 2}, "num_key_value_heads=2"),
        ({"scoring_func": "softmax"}, "scoring_func='softmax'"),
        ({"a_new_switch": True}, "a_new_switch"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config.quant_method='gptq'"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}}, "weight_block_size=[64, 64]"),
        ({"quantization_config": {"quant_method": "fp8", "a_new_one": 1}}, "quantization_config.a_new_one"),
        ({"rope_parameters": 5}, "rope_parameters"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_type='llama3'"),
        ({"hidden_size": 72}, "tensor model.embed_tokens.weight has shape [256, 64]; config.json implies [256, 72]"),
        ({"n_routed_experts": 12, "n_group": 3}, "is missing (24 in all)"),
        ({"num_hidden_layers": 2}, "model.layers.2"),
    ],
    ids=str,
)
def test_what_cannot_be_honoured_is_refused_by_name(tmp_path, fields, expected):
    shutil.copytree(FIXTURES / "v3_tiny", tmp_path / "m")
    edit_config(tmp_path / "m", **fields)
    with pytest.raises(UserError) as error:
        dsv3.load_hf(tmp_path / "m")
    assert expected in str(error.value)


def test_fields_left_out_have_the_defaults_of_transformers(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v3", "max_position_embeddings": 163840}')
    ours, released = read_hf_config(tmp_path), load_config(ROOT / "configs" / "v3_671b.yaml").model
    assert ours == dataclasses.replace(released, initializer_range=0.02, max_position_embeddings=163840)
    edit_config(tmp_path, rope_scaling={"type": "yarn", "original_max_position_embeddings": 4096})
    assert read_hf_config(tmp_path).rope_parameters.factor == 40
    edit_config(tmp_path, rope_scaling={"type": "yarn", "factor": 4})
    assert read_hf_config(tmp_path).rope_parameters.original_max_position_embeddings == 163840
    edit_config(tmp_path, max_position_embeddings=None, rope_scaling={"type": "yarn", "original_max_position_embeddings": 4096})
    with pytest.raises(UserError, match=r"model\.max_position_embeddings=None"):
        read_hf_config(tmp_path)


def test_missing_unexpected_and_truncated_tensors(tmp_path):
    shutil.copytree(FIXTURES / "v3_tiny", tmp_path / "m")
    path = tmp_path / "m/model.safetensors"
    tensors = load_file(path)
    save_file({k: v for k, v in tensors.items() if k != "model.norm.weight"}, path)
    with pytest.raises(UserError, match=r"model\.norm\.weight is missing"):
        dsv3.load_hf(tmp_path / "m")
    save_file(tensors | {"model.extra": np.zeros(1, np.float32)}, path)
    with pytest.raises(UserError, match=r"model\.extra is unexpected"):
        dsv3.load_hf(tmp_path / "m")
    save_file(tensors, path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"model\.safetensors: tensor .* the file ends"):
        dsv3.load_hf(tmp_path / "m")
    path.unlink()
    with pytest.raises(UserError, match="neither"):
        dsv3.load_hf(tmp_path / "m")
