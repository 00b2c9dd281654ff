"""`dsv3 compress` from a checkpoint to one that loads: what is in it, on any mesh, after interruptions, and what is refused."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorstore
from flax import nnx

import dsv3_jax as dsv3
from dsv3_jax.checkpoint.load import load_for_evaluation, open_checkpoint
from dsv3_jax.checkpoint.storage import load_weights
from dsv3_jax.compression import compress as driver
from dsv3_jax.compression import experts, layer
from dsv3_jax.compression.blocks import BlockReader, places
from dsv3_jax.compression.held_out import MeasureConfig, held_out_batches
from dsv3_jax.compression.layer import LayerCompressor
from dsv3_jax.compression.profile import known_profiles, load_profile
from dsv3_jax.config import load_config
from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.interop.hf_export import export
from dsv3_jax.interop.hf_tensors import sources
from dsv3_jax.model.names import variables_by_name
from dsv3_jax.parallel.layout import layout_for
from dsv3_jax.state.train_state import abstract_state
from pallas_kernels.integer_weight import IntegerWeight
from tests.interop.cases import random_model, read_all

ROOT = Path(__file__).parents[2]
MODEL = dsv3.ModelConfig(
    vocab_size=300, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=3,
    num_attention_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
    n_routed_experts=16, max_position_embeddings=64,
)  # fmt: skip
TEXT = " ".join(f"the {word} of {n} seas" for n, word in enumerate(["ship", "line", "port", "wind"] * 200))


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """An imported checkpoint of random weights, with a tokenizer."""
    root = tmp_path_factory.mktemp("source")
    directory = dsv3.save_hf(random_model(MODEL), root / "hf", "hf-f32")
    train_tokenizer([TEXT], 300).save(str(directory / "tokenizer.json"))
    return dsv3.import_hf(directory, root / "ckpt", ("data.seq_len=16",))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def options(text) -> tuple[str, ...]:
    return f"calibration.path={text}", "calibration.tokens=128", "linears.group=16", "experts.group=16"


@pytest.fixture(scope="module")
def w4_options(options, tmp_path_factory) -> tuple[str, ...]:
    """With text to measure on."""
    path = tmp_path_factory.mktemp("held_out") / "text.txt"
    path.write_text(" ".join(f"no {word} of the {n} ports" for n, word in enumerate(["sail", "line", "wind"] * 40)))
    return *options, f"measure.path={path}", "measure.tokens=128"


@pytest.fixture(scope="module")
def w4(source, w4_options, tmp_path_factory) -> Path:
    return dsv3.compress(source, tmp_path_factory.mktemp("compressed") / "w4", "w4", w4_options)


def stored(checkpoint: Path, name: str) -> np.ndarray:
    """An array of a checkpoint, read without any code of this project's."""
    path = f"{checkpoint}/weights/params/{name}/"
    return np.asarray(
        tensorstore.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}).result().read().result()
    )


def values(model) -> dict[str, np.ndarray]:
    return {name: np.asarray(v.get_value()) for name, v in variables_by_name(nnx.state(model)).items()}


def test_weights_are_what_the_formula_says(source, w4):
    """scale * (code - 8), the codes two to a byte along the inputs, low bits first; w_o has inputs of two axes."""
    found, original = values(dsv3.load(w4)), values(dsv3.load(source))
    codes, scale = (stored(w4, f"moe_blocks/ffn/w_down_EMD/value/{field}") for field in ("codes", "scale"))
    assert (codes.dtype, codes.shape, scale.dtype, scale.shape) == (np.uint8, (2, 16, 8, 32), np.float16, (2, 16, 1, 32))
    w = found["moe_blocks/ffn/w_down_EMD"]
    for layer_, expert, i, o in ((0, 0, 0, 0), (1, 7, 15, 31), (1, 3, 6, 9)):
        code = codes[layer_, expert, i // 2, o] >> 4 * (i % 2) & 15
        assert w[layer_, expert, i, o] == np.float32(scale[layer_, expert, 0, o]) * (int(code) - 8)
    codes, scale = (stored(w4, f"dense_blocks/attention/w_o_HUD/value/{field}") for field in ("codes", "scale"))
    assert codes.shape == (1, 8, 32)
    assert found["dense_blocks/attention/w_o_HUD"][0, 1, 3, 5] == np.float32(scale[0, 0, 5]) * (int(codes[0, 5, 5] >> 4) - 8)
    for name in original:  # what 4 bits leave of random weights
        if name.split("/")[-1].startswith("w_") and "router" not in name and name != "mtp/0/w_XD":
            error = np.linalg.norm(found[name] - original[name]) / np.linalg.norm(original[name])
            assert 0.01 < error < 0.2, name


def test_every_linear_layer_is_in_integers_and_nothing_else(w4):
    names = {p.parents[2].name for p in w4.glob("weights/**/codes/zarr.json")}
    assert names == {s.array.split("/")[-1] for s in sources(MODEL) if s.is_fp8}
    report = json.loads((w4 / "compress.json").read_text())
    assert [line["layer"] for line in report["layers"]] == ["dense layer 0", "moe layer 0", "moe layer 1", "MTP module 0"]
    tokens = report["layers"][1]["tokens_per_expert"]
    assert sum(tokens) == MODEL.num_experts_per_tok * 128
    assert not any("retries" in line for line in report["layers"])


def test_what_is_kept_has_16_bits_but_the_routers_bias(source, w4):
    found, original = values(dsv3.load(w4)), values(dsv3.load(source))
    for name in ("embed_VD", "head_DV", "moe_blocks/ffn/router/w_DE", "norm/scale", "mtp/0/w_XD"):
        np.testing.assert_array_equal(found[name], original[name].astype(jax.numpy.bfloat16).astype(np.float32))
    np.testing.assert_array_equal(found["moe_blocks/ffn/router/bias_E"], original["moe_blocks/ffn/router/bias_E"])


def test_integers_can_be_loaded_as_they_are(w4):
    opened = open_checkpoint(w4)
    state = abstract_state(opened.config)
    params, _ = load_weights(w4, state.params, state.router_bias, keep_integers=True)
    weight = variables_by_name(params)["moe_blocks/ffn/w_gate_up_ED2M"].get_value()
    assert isinstance(weight, IntegerWeight)
    assert weight.shape == (2, 16, 32, 2, 16)
    dense = values(dsv3.load(w4))["moe_blocks/ffn/w_gate_up_ED2M"]
    np.testing.assert_array_equal(weight.astype(np.float32), dense)


def test_it_is_a_checkpoint_like_any_other(w4, text):
    assert dsv3.evaluate(w4, str(text))["tokens"] > 100
    config = open_checkpoint(w4).config
    assert config.model == MODEL
    model = dsv3.load(w4, keep_integers=True)
    assert isinstance(variables_by_name(nnx.state(model))["moe_blocks/ffn/w_down_EMD"].get_value(), IntegerWeight)
    tokens = np.array([[1, 2, 3]])
    # the same weights, multiplied in bfloat16 as the configuration has it, in other orders
    np.testing.assert_allclose(model(tokens), dsv3.load(w4)(tokens), atol=0.05)
    np.testing.assert_array_equal(dsv3.generate(model, tokens, 4), dsv3.generate(dsv3.load(w4), tokens, 4))


def test_it_loads_on_a_mesh(w4, tmp_path):
    """Codes are sharded as the weights are, where they can be."""
    there = load_for_evaluation(w4)
    config = replace(there.config, parallel=dsv3.ParallelConfig(fsdp=2, expert=2, tensor=2))
    layout = layout_for(config)
    state = abstract_state(config, layout)
    params, _ = load_weights(w4, state.params, state.router_bias)
    for name, variable in variables_by_name(params).items():
        value = variable.get_value()
        assert value.sharding == variables_by_name(state.params)[name].get_value().sharding
        np.testing.assert_array_equal(value, variables_by_name(there.params)[name].get_value())


def test_its_report_measures_it_and_says_where_the_error_is(source, w4, text):
    """The loss is evaluate's; GPTQ's error is below that of rounding in each part, far below where inputs have a low rank."""
    report = json.loads((w4 / "compress.json").read_text())
    found = report["measured"]
    assert found["windows"] == 8
    assert found["loss"] == pytest.approx(dsv3.evaluate(w4, report["profile"]["measure"]["path"])["loss"], rel=0.02)
    assert 0 < found["kl"]["value"] < 0.1
    assert len(found["mtp_acceptance"]) == len(found["original_mtp_acceptance"]) == 1
    errors = report["output_error"]
    assert set(errors) == {"q", "kv", "o", "dense FFN", "shared experts", "routed experts", "MTP modules"}
    for part, error in errors.items():
        assert 0 < error["gptq"] < error["rounding"] < 0.1, part
    names = (p for p in w4.glob("weights/**/c/**/*") if p.is_file())
    assert sum(size["compressed"] for size in report["sizes"].values()) == sum(p.stat().st_size for p in names)
    opened = open_checkpoint(source)
    assert "give measure.path" in str(held_out_batches(opened, MeasureConfig()))
    assert held_out_batches(opened, MeasureConfig(tokens=0)) == "measure.tokens=0"
    with pytest.raises(dsv3.UserError, match="is what calibration reads"):
        load_profile("w4", (f"calibration.path={text}", f"measure.path={text}"))


def all_bytes(checkpoint: Path) -> dict[str, bytes]:
    return {str(p.relative_to(checkpoint)): p.read_bytes() for p in sorted(checkpoint.glob("weights/**/*")) if p.is_file()}


def compress_with_an_interruption(source, target, profile, options, monkeypatch) -> list[str]:
    """Interrupt it in the third block, and go on; returns the blocks that were begun."""
    seen, compress_block = [], LayerCompressor.__call__

    def stops_at_the_third(self, block, stream, where, *rest):
        seen.append(where)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return compress_block(self, block, stream, where, *rest)

    monkeypatch.setattr(LayerCompressor, "__call__", stops_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        dsv3.compress(source, target, profile, options)
    assert not target.exists()
    dsv3.compress(source, target, profile, options)
    return seen


def test_an_interrupted_call_goes_on_and_ends_with_the_same_bytes(source, w4_options, w4, tmp_path, monkeypatch):
    target = tmp_path / "w4"
    seen = compress_with_an_interruption(source, target, "w4", w4_options, monkeypatch)
    assert seen == ["dense layer 0", "moe layer 0", "moe layer 1", "moe layer 1", "MTP module 0"]
    assert all_bytes(target) == all_bytes(w4)
    assert json.loads((target / "compress.json").read_text()) == json.loads((w4 / "compress.json").read_text())


@pytest.mark.slow
def test_kills_leave_nothing_that_loads_and_are_gone_on_after(source, options, w4, tmp_path):
    program = [sys.executable, str(ROOT / "tests/interop/kill_storm.py"), "compress", str(source), str(tmp_path / "out"), "8"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*program, *options], capture_output=True, text=True, check=True, env=environment)
    storm = json.loads(done.stdout.strip().splitlines()[-1])
    assert storm["killed"] >= 4
    assert storm["chunks"] == sorted(storm["chunks"])  # what was written stays
    assert all_bytes(tmp_path / "out") == all_bytes(w4)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_other_options_do_not_go_on_with_what_lies_there(source, options, tmp_path, monkeypatch):
    def stops(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(LayerCompressor, "__call__", stops)
        with pytest.raises(KeyboardInterrupt):
            dsv3.compress(source, tmp_path / "out", "w4", options)
    dsv3.compress(source, tmp_path / "out", "w4", (*options, "method=round"))
    assert json.loads((tmp_path / "out" / "compress.json").read_text())["profile"]["method"] == "round"


def test_any_number_of_devices_gives_the_same_bytes(source, options, w4, tmp_path, monkeypatch):
    """The module's checkpoint was made on 8 devices."""
    assert layer.expert_mesh(16).size == 8
    monkeypatch.setattr(layer, "expert_mesh", lambda count: experts.Mesh(np.array(jax.devices()[:1]), ("experts",)))
    dsv3.compress(source, tmp_path / "one", "w4", options)
    assert all_bytes(tmp_path / "one") == all_bytes(w4)


@pytest.mark.parametrize("profile", ["bits", pytest.param("mixed", marks=pytest.mark.slow)])
def test_parts_have_the_formats_of_the_profile(source, options, profile, tmp_path):
    """Two bits with zero points for experts; codes of four to a byte."""
    found = dsv3.compress(source, tmp_path / "out", profile, (*options, "method=round", "experts.group=8"))
    integers = json.loads((found / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]["integers"]
    bits = {name: entry["bits"] for name, entry in integers.items()}
    expected = {"bits": 2, "mixed": 4}[profile]
    assert bits["moe_blocks/ffn/w_down_EMD"] == bits["mtp/0/block/ffn/w_gate_up_ED2M"] == expected
    assert bits["dense_blocks/ffn/w_down_FD"] == bits["moe_blocks/ffn/shared/w_down_FD"] == 8
    zero = found / "weights/params/moe_blocks/ffn/w_down_EMD/value/zero"
    assert zero.exists() == (profile == "bits")
    original, w = values(dsv3.load(source))["moe_blocks/ffn/w_down_EMD"], values(dsv3.load(found))["moe_blocks/ffn/w_down_EMD"]
    assert np.linalg.norm(w - original) / np.linalg.norm(original) < {2: 0.6, 4: 0.15}[expected]


def test_8_bit_floats_are_exported_as_they_are(source, options, tmp_path):
    found = dsv3.compress(source, tmp_path / "out", "fp8", options[:2])
    export(found, tmp_path / "hf", "hf-fp8")
    tensors = read_all(tmp_path / "hf")
    name = "model.layers.2.mlp.experts.15.down_proj.weight"
    value, scale = tensors[name].astype(np.float32), tensors[f"{name}_scale_inv"]
    assert (np.log2(scale) % 1 == 0).all()
    w = values(dsv3.load(found))["moe_blocks/ffn/w_down_EMD"][1, 15]
    np.testing.assert_array_equal(value.T * scale[0, 0], w)
    original = values(dsv3.load(source))["moe_blocks/ffn/w_down_EMD"][1, 15]
    assert 0.01 < np.linalg.norm(w - original) / np.linalg.norm(original) < 0.04  # 4 significant bits


@pytest.mark.slow
def test_experts_are_dropped_before_the_rest_is_rounded(source, options, tmp_path, monkeypatch):
    """3 of 4 in each group; their router's columns and bias are the original's, and an interruption changes nothing."""
    found = dsv3.compress(source, tmp_path / "pruned", "pruned", options)
    config = open_checkpoint(found).config.model
    assert config == replace(MODEL, n_routed_experts=12)
    original, w = values(dsv3.load(source)), values(dsv3.load(found))
    lines = json.loads((found / "compress.json").read_text())["layers"]
    for stack, index, line in (("moe_blocks", 1, lines[2]), ("mtp/0/block", ..., lines[3])):
        kept = np.array(line["pruning"]["kept"])
        assert (np.bincount(kept // 4) == 3).all()
        assert line["pruning"]["lacking"][1] < line["pruning"]["lacking"][0]
        np.testing.assert_array_equal(
            w[f"{stack}/ffn/router/bias_E"][index], original[f"{stack}/ffn/router/bias_E"][index][kept]
        )
        router, before = w[f"{stack}/ffn/router/w_DE"][index], original[f"{stack}/ffn/router/w_DE"][index][:, kept]
        np.testing.assert_array_equal(router, before.astype(jax.numpy.bfloat16).astype(np.float32))
        assert len(line["tokens_per_expert"]) == 12
    compress_with_an_interruption(source, tmp_path / "again", "pruned", options, monkeypatch)
    assert all_bytes(tmp_path / "again") == all_bytes(found)


def test_a_failed_factorisation_is_tried_again_by_name_and_never_rounded(source, options, tmp_path, monkeypatch):
    dampings = []

    def fails(until):
        real = layer._round_one

        def round_one(w_KN, xx_KK, format, damping):
            dampings.append(damping)
            rounded = real(w_KN, xx_KK, format, damping)
            return rounded if damping >= until else rounded._replace(sound=np.False_)

        return round_one

    with monkeypatch.context() as patched:
        patched.setattr(layer, "_round_one", fails(until=0.1))
        found = dsv3.compress(source, tmp_path / "retried", "w4", options)
    line = json.loads((found / "compress.json").read_text())["layers"][0]
    assert line["retries"][0] == "dense layer 0, attention/w_q_a_DQ: the factorisation failed with damping 0.01"
    assert dampings[:2] == [0.01, 0.1]
    monkeypatch.setattr(layer, "_round_one", fails(until=1e9))
    with pytest.raises(
        dsv3.UserError, match=r"dense layer 0, attention/w_q_a_DQ: .* cannot be factorised, even with damping=1"
    ):
        dsv3.compress(source, tmp_path / "failed", "w4", options)
    assert not (tmp_path / "failed").exists()


@pytest.mark.parametrize(
    ("profile", "overrides", "says"),
    [
        ("w5", (), "profile 'w5' is unknown; use one of w4, mixed"),
        ("w4", ("linears.bits=3",), "linears.bits=3; use one of 2, 4, 8"),
        (
            "w4",
            ("linears.group=24",),
            "linears.group=24 does not divide the 32 inputs of model.layers.0.self_attn.q_a_proj.weight",
        ),
        ("w4", ("lineers.group=16",), "profile w4: lineers"),
        ("w4", ("damping=-1",), "damping=-1.0 must be positive"),
        ("w4", ("calibration.tokens=0",), "calibration.tokens=0 must be positive"),
        ("w4", ("experts",), "override 'experts' is not key=value"),
    ],
)
def test_bad_profiles_are_refused(source, profile, overrides, says, tmp_path):
    with pytest.raises(dsv3.UserError) as raised:
        dsv3.compress(source, tmp_path / "out", profile, overrides)
    assert says in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_bad_inputs_are_refused(source, options, w4, tmp_path):
    with pytest.raises(dsv3.UserError, match="is compressed already"):
        dsv3.compress(w4, tmp_path / "again", "w4", options)
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(dsv3.UserError, match="holds no text"):
        dsv3.compress(source, tmp_path / "out", "w4", (*options, f"calibration.path={empty}"))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text("{}")
    with pytest.raises(dsv3.UserError, match="as Hugging Face's checkpoints do: make it one of dsv3_jax's with `dsv3 import"):
        dsv3.compress(tmp_path / "foreign", tmp_path / "out", "w4", options)
    with pytest.raises(dsv3.UserError, match="exists already"):
        dsv3.compress(source, w4, "w4", options)


def test_profiles_fit_the_released_model():
    model = load_config(ROOT / "configs" / "v3_671b.yaml").model
    for name in known_profiles():
        load_profile(name).check_fits(model)


def test_blocks_come_in_the_order_of_the_tokens_way(source):
    assert [place.name for place in places(MODEL)] == ["dense layer 0", "moe layer 0", "moe layer 1", "MTP module 0"]
    reader = BlockReader(open_checkpoint(source))
    assert sum(reader.size(place) for place in places(MODEL)) == 4 * (
        sum(a.size for name, a in values(dsv3.load(source)).items() if "/" in name and name != "norm/scale")
    )
    assert driver.REPORT == "compress.json"
