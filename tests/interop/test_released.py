"""Checkpoints as they are released: other names, left-over tensors and fields, other dtypes. Their own bytes come back."""

import json
import shutil

import chex
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import dsv3_jax as dsv3
from dsv3_jax.checkpoint.storage import read_metadata
from dsv3_jax.config import load_config
from dsv3_jax.errors import UserError
from dsv3_jax.interop import fp8
from dsv3_jax.interop.hf_config import hf_config, ignored_fields, model_config
from dsv3_jax.interop.hf_export import export
from dsv3_jax.interop.hf_files import open_hf
from dsv3_jax.interop.hf_formats import describe_layout
from dsv3_jax.interop.hf_import import import_hf
from dsv3_jax.interop.hf_tensors import copies, sources
from dsv3_jax.interop.hf_text import TextFiles
from dsv3_jax.interop.hf_writer import Before, write_hf
from tests.interop.cases import BF16, F8, FP8_CONFIG, is_fp8, read_all, write

# few shapes, each with a second block that ends early
SMALL = dsv3.ModelConfig(
    vocab_size=40, hidden_size=144, intermediate_size=144, moe_intermediate_size=144, num_hidden_layers=2,
    num_nextn_predict_layers=1, num_attention_heads=1, q_lora_rank=None, kv_lora_rank=80, qk_nope_head_dim=64,
    qk_rope_head_dim=16, v_head_dim=144, n_routed_experts=2, num_experts_per_tok=1, n_group=1, topk_group=1,
)  # fmt: skip
E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
RNG = np.random.default_rng(0)


def bf16_tensors(config: dsv3.ModelConfig = SMALL) -> dict[str, np.ndarray]:
    """Random weights; the balancing bias in float32, copies of embedding and head with MTP modules."""
    found = {s.tensor: RNG.normal(0, 0.1, s.shape).astype(BF16) for s in sources(config)}
    found |= {name: t.astype(np.float32) for name, t in found.items() if name.endswith("e_score_correction_bias")}
    return found | {c.tensor: found[c.of] for c in copies(config)}


def fp8_tensors(kind: str) -> dict[str, np.ndarray]:
    """Projections and experts as any 8-bit codes with any scales, which no formula gives."""
    found = {}
    for name, w in bf16_tensors().items():
        if not is_fp8(name):
            found[name] = w
            continue
        codes = RNG.integers(0, 254, w.shape, np.uint8)
        codes[(codes & 0x7F) == 0x7F] = 0x80  # NaN becomes -0
        exponents = RNG.integers(-20, 5, fp8.scale_shape(w.shape))
        scales = 2.0**exponents if kind != "float" else RNG.uniform(1e-6, 1, exponents.shape)
        found[name], found[name + "_scale_inv"] = codes.view(F8), scales.astype(E8M0 if kind == "e8m0" else np.float32)
    return found


def config_json(config: dsv3.ModelConfig = SMALL, **fields) -> dict:
    return hf_config(config) | fields


def assert_bytes_come_back(tensors: dict[str, np.ndarray], config: dict, format: str, tmp_path, bfloat16: bool = False) -> None:
    import_hf(write(tmp_path / "hf", tensors, config), tmp_path / "ckpt", bfloat16=bfloat16)
    export(tmp_path / "ckpt", tmp_path / "back", format)
    back = read_all(tmp_path / "back")
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        assert (back[name].dtype, back[name].tobytes()) == (tensor.dtype, tensor.tobytes()), name


@pytest.mark.parametrize("kind", ["float", "ue8m0", "e8m0"])
def test_block_fp8_gives_every_byte_back(kind, tmp_path):
    """Values and scales, whatever made them; matrices that were left in 16 bits too, and config.json's settings of it."""
    tensors = fp8_tensors(kind)
    kept = "model.layers.0.mlp.up_proj.weight"
    tensors[kept] = RNG.normal(0, 1, tensors[kept].shape).astype(BF16)
    del tensors[kept + "_scale_inv"]
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float32) + 1e-5
    quantization = FP8_CONFIG | ({} if kind == "float" else {"scale_fmt": "ue8m0"})
    quantization |= {"modules_to_not_convert": ["model.layers.0.mlp.up_proj"]}
    assert_bytes_come_back(tensors, config_json(quantization_config=quantization), "hf-fp8", tmp_path)
    assert json.loads((tmp_path / "back/config.json").read_text())["quantization_config"] == quantization
    assert open_hf(tmp_path / "back").config == SMALL


def test_block_fp8_comes_back_from_bfloat16_too(tmp_path):
    """`--dtype bfloat16` rounds the products of values and scales, and each is still nearest to its own value."""
    assert_bytes_come_back(
        fp8_tensors("float"), config_json(quantization_config=FP8_CONFIG), "hf-fp8", tmp_path, bfloat16=True
    )  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "scales", "bfloat16"),
    [(np.float32, [0.0, 1e-45, 2e-38], False), (np.float32, [0.0, 1e-45, 2e-38], True), (E8M0, [2.0**-127, 1.0, 1.0], False)],
)
def test_values_that_their_weights_do_not_say_come_back(dtype, scales, bfloat16, tmp_path):
    """Times a scale of 0 all are 0, and times 1e-45 most."""
    tensors = fp8_tensors("e8m0" if dtype == E8M0 else "float")
    for name in filter(lambda name: name.endswith("_scale_inv"), tensors):
        tensors[name].flat[: tensors[name].size - 1] = scales[: tensors[name].size - 1]
    quantization = FP8_CONFIG | ({"scale_fmt": "ue8m0"} if dtype == E8M0 else {})
    assert_bytes_come_back(tensors, config_json(quantization_config=quantization), "hf-fp8", tmp_path, bfloat16)


def test_kept_values_are_those_of_blocks_that_did_not_change():
    """A weight of a block that was all zeros is set: its block is rounded anew, the block beside keeps what it had."""
    codes = np.full((130, 200), 5.0, np.float32).astype(F8)
    scales = np.array([[0.0, 1e-45], [1.0, 0.0]], np.float32)
    w = fp8.dequantize(codes, scales)
    w[3, 4] = 7.0
    values, found = fp8.quantize(w, scales, values_before=codes)
    assert found[0, 0] == pytest.approx(7 / 448)
    assert (values[3, 4], values[0, 0]) == (448, 0)
    np.testing.assert_array_equal(found.ravel()[1:], scales.ravel()[1:])
    np.testing.assert_array_equal(values[:, 128:].view(np.uint8), codes[:, 128:].view(np.uint8))
    np.testing.assert_array_equal(values[128:].view(np.uint8), codes[128:].view(np.uint8))


def test_what_a_format_usually_has_otherwise_comes_back(tmp_path):
    """A balancing bias in 16 bits and norms in 32; another format has what it usually has."""
    tensors = bf16_tensors()
    bias, norm = "model.layers.1.mlp.gate.e_score_correction_bias", "model.layers.0.input_layernorm.weight"
    tensors[bias], tensors[norm] = tensors[bias].astype(BF16), np.full(144, 1 + 2**-20, np.float32)
    assert_bytes_come_back(tensors, config_json(), "hf-bf16", tmp_path)
    assert read_metadata(tmp_path / "ckpt")["hf_layout"] == {
        "format": "hf-bf16", "others": {bias: "BF16", norm: "F32"}, "scales": "F32",
    }  # fmt: skip
    export(tmp_path / "ckpt", tmp_path / "f32", "hf-f32")
    assert {t.dtype for t in read_all(tmp_path / "f32").values()} == {np.dtype(np.float32)}


def test_blocks_that_changed_have_new_scales_of_their_kind():
    """By hand: 3 / 448 = 0.0067, of which the next power of two is 2^-7; the block beside keeps what it had."""
    codes = np.full((130, 200), 5.0, np.float32).astype(F8)
    scales = np.array([[0.5, 0.25], [2.0, 4.0]], np.float32)
    w = fp8.dequantize(codes, scales)
    w[:128, :128], w[0, 0] = 2.9, 3.0  # 2.9 is no code times 0.5; it is nearest to the code of 3
    for power_of_two, scale, code in ((False, 3 / 448, 448), (True, 2.0**-7, 384)):
        values, found = fp8.quantize(w, scales, power_of_two)
        assert found[0, 0] == pytest.approx(scale, rel=2e-7)
        assert set(values[:128, :128].astype(np.float32).ravel()) == {code}
        np.testing.assert_array_equal(found.ravel()[1:], scales.ravel()[1:])
        np.testing.assert_array_equal(values[:, 128:].view(np.uint8), codes[:, 128:].view(np.uint8))
    # without scales of before, those of the kind: powers of two lose nothing of weights that came from such
    pairs = fp8.quantize(fp8.dequantize(codes, scales), None, True)
    np.testing.assert_array_equal(fp8.dequantize(*pairs), fp8.dequantize(codes, scales))


def test_a_run_writes_the_kind_of_scales_that_it_began_with(tmp_path):
    """Its config.json came along from an import of an earlier version, which did not say what else was in 8 bits."""
    quantization = FP8_CONFIG | {"scale_fmt": "ue8m0", "modules_to_not_convert": ["model.layers.0.mlp.up_proj"]}
    text = TextFiles(companions={"config.json": json.dumps(config_json(quantization_config=quantization)).encode()})
    tensors = {name: t.astype(np.float32) for name, t in bf16_tensors().items()}
    write_hf(tmp_path / "out", SMALL, "hf-fp8", lambda s: tensors[s.tensor], origin={}, text=text)
    back = read_all(tmp_path / "out")
    scales = [t for name, t in back.items() if name.endswith("_scale_inv")]
    assert len(scales) == sum(map(is_fp8, tensors))
    assert all(t.dtype == np.float32 and (np.frexp(t)[0] == 0.5).all() for t in scales)
    found = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert found == FP8_CONFIG | {"scale_fmt": "ue8m0"}


def test_a_run_writes_the_dtypes_that_it_began_with(tmp_path):
    """Its checkpoints say which tensors an import had in another dtype; its weights are others, and so are its scales."""
    config = config_json(quantization_config=FP8_CONFIG | {"scale_fmt": "ue8m0"})
    kept, norm = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
    source = fp8_tensors("e8m0")
    source |= {kept: np.ones(source[kept].shape, BF16), norm: np.ones(source[norm].shape, np.float32)}
    del source[kept + "_scale_inv"]
    layout = describe_layout(SMALL, lambda name: {BF16: "BF16", F8: "F8_E4M3", E8M0: "F8_E8M0"}.get(source[name].dtype, "F32"))
    text = TextFiles(companions={"config.json": json.dumps(config).encode()})
    tensors = bf16_tensors()
    write_hf(
        tmp_path / "out", SMALL, "hf-fp8", lambda s: tensors[s.tensor], origin={}, text=text, before=Before(layout, {})
    )  # fmt: skip
    assert {name: t.dtype for name, t in read_all(tmp_path / "out").items()} == {name: t.dtype for name, t in source.items()}


def test_kimi_k2_is_a_deepseek_v3(tmp_path):
    """Under its own name; it is written back under the one that clients know."""
    config = config_json(model_type="kimi_k2", quantization_config=FP8_CONFIG)
    assert_bytes_come_back(fp8_tensors("float"), config, "hf-fp8", tmp_path)
    back = json.loads((tmp_path / "back/config.json").read_text())
    assert (back["model_type"], back["architectures"]) == ("deepseek_v3", ["DeepseekV3ForCausalLM"])
    (tmp_path / "hf/config.json").write_text(json.dumps(config | {"architectures": ["KimiK25ForConditionalGeneration"]}))
    with pytest.raises(UserError, match=r"architectures=\['KimiK25.* can be loaded"):
        open_hf(tmp_path / "hf")


def test_tensors_that_are_computed_are_left_out(tmp_path, capsys):
    """Moonlight has rotary frequencies in every layer, older code saved their tables; shapes and dtypes do not matter."""
    tensors = bf16_tensors()
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32),
        "model.layers.1.self_attn.rotary_emb.inv_freq": np.ones((2, 3), np.int64),
        "model.layers.1.self_attn.rotary_emb.cos_cached": np.ones((2, 8), BF16),
        "model.layers.1.self_attn.rotary_emb.sin_cached": np.ones((2, 8), BF16),
        "model.rotary_emb.inv_freq": np.ones(8, BF16),
    }
    write(tmp_path / "with", tensors | extra, config_json())
    write(tmp_path / "without", tensors, config_json())
    loaded = (nnx.state(dsv3.load_hf(tmp_path / name)) for name in ("with", "without"))
    chex.assert_trees_all_equal(*loaded)
    printed = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[2] for line in printed] == [
        "5 tensors are left out, which follow from config.json: model.layers.0.self_attn.rotary_emb.inv_freq ..."
    ]


def test_mtp_modules_that_config_json_does_not_count_are_left_out(tmp_path, capsys):
    write(tmp_path / "hf", fp8_tensors("float"), config_json(num_nextn_predict_layers=0, quantization_config=FP8_CONFIG))
    found = open_hf(tmp_path / "hf")
    assert found.config.num_nextn_predict_layers == 0
    assert not [s for s in found.sources if "layers.2." in s.tensor]
    import_hf(tmp_path / "hf", tmp_path / "ckpt")
    assert "tensors of 1 multi-token-prediction modules are left out: config.json has num_n" in capsys.readouterr().err
    # a layer that is none is a layer too many
    tensors = {name: t for name, t in bf16_tensors().items() if "eh_proj" not in name}
    with pytest.raises(UserError, match=r"tensor model\.layers\.2\..* is unexpected"):
        open_hf(write(tmp_path / "more", tensors, config_json(num_nextn_predict_layers=0)))


def test_float16_and_float64_are_read_exactly(tmp_path):
    tensors = {name: t.astype(np.float16) for name, t in bf16_tensors().items()}
    tensors["lm_head.weight"] = RNG.normal(0, 1, (40, 144)).astype(np.float32).astype(np.float64)
    tensors["model.layers.2.shared_head.head.weight"] = tensors["lm_head.weight"]
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(BF16)
    import_hf(write(tmp_path / "hf", tensors, config_json()), tmp_path / "ckpt")
    export(tmp_path / "ckpt", tmp_path / "back", "hf-f32")
    loaded = dsv3.load_hf(tmp_path / "hf")
    for name, tensor in read_all(tmp_path / "back").items():
        np.testing.assert_array_equal(tensor, tensors[name].astype(np.float32), err_msg=name)
    np.testing.assert_array_equal(np.asarray(loaded.head_DV[...]).T, tensors["lm_head.weight"])
    tensors["lm_head.weight"][3, 5] = 0.1
    del tensors["model.layers.2.shared_head.head.weight"]
    write(tmp_path / "bad", tensors, config_json())
    for read in (dsv3.load_hf, lambda path: import_hf(path, tmp_path / "other")):
        with pytest.raises(UserError, match=r"lm_head\.weight is in float64 and holds .*0\.1.*, which float32 does not"):
            read(tmp_path / "bad")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "bad", "ckpt", "hf"]


BY_TRANSFORMERS = {
    "quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "dequantize": False,
    "modules_to_not_convert": None, "modules_to_convert": None, "scale_fmt": "float", "expert_dtype": "fp8",
}  # fmt: skip


def test_settings_of_fp8_that_say_nothing_about_the_numbers():
    for quantization in (
        BY_TRANSFORMERS,
        BY_TRANSFORMERS | {"scale_fmt": "ue8m0", "dequantize": True, "modules_to_not_convert": ["lm_head"]},
        BY_TRANSFORMERS | {"fmt": None, "expert_dtype": None, "something_new": None},
    ):
        assert model_config(config_json(quantization_config=quantization), "x") == SMALL
    for change, text in (
        ({"expert_dtype": "fp4"}, "expert_dtype='fp4' is not supported; only 'fp8'"),
        ({"scale_fmt": "e5m2"}, "scale_fmt='e5m2' is not supported; only 'float' and 'ue8m0'"),
        ({"quant_method": None}, "quant_method=None"),
        ({"activation_scheme": "static"}, "activation_scheme='static'"),
        ({"something_new": False}, "something_new is unknown"),
    ):
        with pytest.raises(UserError, match=text):
            model_config(config_json(quantization_config=BY_TRANSFORMERS | change), "x")


def test_fields_of_uploaders_are_ignored_with_a_line(tmp_path, capsys):
    """And null, which says nothing. What is no known marker may change the model, and is refused."""
    fields = {"unsloth_fixed": True, "temperature": 0.6, "sliding_window": None, "_name_or_path": "x"}
    assert model_config(config_json(**fields), "x") == SMALL
    assert ignored_fields(config_json(**fields)) == ["sliding_window", "temperature", "unsloth_fixed"]
    import_hf(write(tmp_path / "hf", bf16_tensors(), config_json(**fields)), tmp_path / "ckpt")
    line = "config.json: ignored sliding_window, temperature, unsloth_fixed, which say nothing about the numbers"
    assert line in capsys.readouterr().err
    with pytest.raises(UserError, match="field 'sliding_window' is unknown"):
        model_config(config_json(sliding_window=4096), "x")


def test_one_field_under_two_names():
    config = config_json() | {"num_local_experts": 2}
    assert model_config(config, "x") == SMALL
    del config["n_routed_experts"]
    assert model_config(config, "x") == SMALL
    with pytest.raises(UserError, match="num_mtp_layers=2 and num_nextn_predict_layers=1 are two names of one field"):
        model_config(config | {"num_mtp_layers": 2}, "x")


def with_nan(dtype):
    def change(tensors, name="model.layers.1.mlp.experts.1.down_proj.weight"):
        tensors[name] = np.where(np.arange(144) == 77, np.nan, tensors[name].astype(np.float32)).astype(dtype)

    return change


def with_scale(value):
    def change(tensors):
        tensors["model.layers.1.mlp.experts.1.down_proj.weight_scale_inv"][1, 0] = value

    return change


def with_fp8_nan(tensors):
    tensors["model.layers.1.mlp.experts.1.down_proj.weight"].view(np.uint8)[99, 99] = 0xFF


@pytest.mark.parametrize(
    ("change", "tensors", "text"),
    [
        (with_nan(BF16), bf16_tensors, "down_proj.weight holds NaN or infinity"),
        (with_nan(np.float32), bf16_tensors, "down_proj.weight holds NaN or infinity"),
        (with_nan(np.float16), bf16_tensors, "down_proj.weight holds NaN or infinity"),
        (with_nan(np.float64), bf16_tensors, "down_proj.weight holds NaN or infinity"),
        (with_fp8_nan, lambda: fp8_tensors("float"), "down_proj.weight holds NaN or infinity"),
        (with_scale(np.nan), lambda: fp8_tensors("float"), "down_proj.weight_scale_inv holds a scale of nan"),
        (with_scale(np.inf), lambda: fp8_tensors("float"), "down_proj.weight_scale_inv holds a scale of inf"),
        (with_scale(-1.5), lambda: fp8_tensors("float"), "down_proj.weight_scale_inv holds a scale of -1.5"),
        (with_scale(np.nan), lambda: fp8_tensors("e8m0"), "down_proj.weight_scale_inv holds a scale of nan"),
    ],
    ids=["bf16", "f32", "f16", "f64", "fp8", "scale nan", "scale inf", "scale negative", "e8m0"],
)
def test_weights_and_scales_that_are_no_numbers_are_refused(change, tensors, text, tmp_path):
    """When they are read, by loading and importing alike; nothing stays behind."""
    found = tensors()
    change(found)
    write(tmp_path / "hf", found, config_json(quantization_config=FP8_CONFIG))
    for read in (dsv3.load_hf, lambda path: import_hf(path, tmp_path / "ckpt")):
        with pytest.raises(UserError) as error:
            read(tmp_path / "hf")
        assert text in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_infinities_are_refused_but_in_a_balancing_bias(tmp_path):
    """Where -infinity takes an expert out of the choice."""
    tensors = bf16_tensors()
    tensors["model.layers.1.mlp.gate.e_score_correction_bias"][1] = -np.inf
    import_hf(write(tmp_path / "hf", tensors, config_json()), tmp_path / "ckpt")
    for value in (np.inf, -np.inf):
        tensors["model.norm.weight"][-1] = value
        with pytest.raises(UserError, match=r"model\.norm\.weight holds NaN or infinity"):
            dsv3.load_hf(write(tmp_path / "bad", tensors, config_json()))
    shutil.rmtree(tmp_path / "bad")
    tensors["model.norm.weight"][-1] = ml_dtypes.finfo(BF16).max  # is a number
    tensors["model.layers.1.mlp.gate.e_score_correction_bias"][1] = np.nan
    with pytest.raises(UserError, match=r"e_score_correction_bias holds NaN"):
        dsv3.load_hf(write(tmp_path / "bad", tensors, config_json()))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"rope_scaling": {"type": "default", "rope_type": "yarn", "factor": 4}}, "rope_type is 'default', and 'yarn'"),
        ({"rope_scaling": {"type": "yarn"}, "rope_parameters": {"rope_type": "default"}}, "'yarn' as type of rope_scaling"),
        ({"rope_parameters": {"rope_theta": 10000.0}, "rope_theta": 50000.0}, "50000.0 as rope_theta of config.json"),
    ],
)  # fmt: skip
def test_fields_of_rope_that_contradict_each_other_are_refused(fields, expected):
    with pytest.raises(UserError, match=expected):
        model_config({"rope_theta": None, "rope_scaling": None} | config_json() | {"rope_theta": None} | fields, "config.json")


def test_fields_of_rope_may_stand_twice():
    """As transformers 5 saves a file of 4: nothing is lost of either."""
    yarn = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 64}
    both = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e4}, "rope_scaling": yarn, "rope_theta": 50000}
    found = model_config(config_json() | both, "config.json").rope_parameters
    assert (found.rope_type, found.rope_theta, found.factor, found.original_max_position_embeddings) == ("yarn", 5e4, 4.0, 64)


def test_scales_with_which_weights_could_be_infinite_are_refused(tmp_path):
    """By hand: 448 times 7.6e35 is 3.405e38, and float32 ends at 3.403e38."""
    tensors = fp8_tensors("float")
    name = min(name for name in tensors if name.endswith("_scale_inv"))
    tensors[name][0, 0] = 7.5e35
    open_hf(write(tmp_path / "hf", tensors, config_json(quantization_config=FP8_CONFIG))).files.read(name[:-10])
    tensors[name][0, 0] = 7.6e35
    found = open_hf(write(tmp_path / "hf", tensors, config_json(quantization_config=FP8_CONFIG)))
    with pytest.raises(UserError, match=r"holds a scale of 7\.6\d*e\+35; scales are 0 to 7\.6"):
        found.files.read(name[:-10])


def test_scales_of_other_dtypes_are_refused_with_those_that_are_right(tmp_path):
    tensors = fp8_tensors("float")
    name = min(name for name in tensors if name.endswith("_scale_inv"))
    tensors[name] = tensors[name].astype(BF16)
    with pytest.raises(UserError, match=f"{name} has dtype BF16; use one of F32, F8_E8M0$"):
        open_hf(write(tmp_path / "hf", tensors, config_json(quantization_config=FP8_CONFIG)))


def test_directories_of_any_name_are_written(tmp_path):
    """Through links, one that leads nowhere yet too; a run's default name is of the characters that runs' names have."""
    write(tmp_path / "hf", bf16_tensors(), config_json())
    (tmp_path / "empty").mkdir()
    (tmp_path / "there").symlink_to("empty")
    (tmp_path / "not yet").symlink_to("V3.1 (copy)")
    import_hf(tmp_path / "hf", tmp_path / "not yet")
    assert load_config(tmp_path / "V3.1 (copy)/config.yaml").name == "V3.1-copy"
    export(tmp_path / "V3.1 (copy)", tmp_path / "there", "hf-bf16")
    assert (tmp_path / "empty/model.safetensors").is_file()
    (tmp_path / "loop").symlink_to("loop")
    for taken in ("loop", "none/.."):
        with pytest.raises(UserError, match="exists already"):
            export(tmp_path / "not yet", tmp_path / taken, "hf-bf16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["V3.1 (copy)", "empty", "hf", "loop", "not yet", "there"]
