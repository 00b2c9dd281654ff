"""Integer weights as every export has them, without its clients: scripts/tools/check_compressed.py runs those.

Formats are read back by their formulas, written here again; GGUF by the package of llama.cpp's authors. All of it is exact.
"""

import json
from dataclasses import replace

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer

import dsv3_jax as dsv3
from dsv3_jax.errors import UserError
from dsv3_jax.interop import gguf_blocks
from dsv3_jax.interop.gguf_file import write_gguf
from dsv3_jax.interop.hf_export import export
from dsv3_jax.interop.hf_tensors import sources
from dsv3_jax.interop.hf_text import TextFiles
from dsv3_jax.interop.hf_writer import write_hf
from dsv3_jax.interop.quantized import QuantizedTensor, from_region, nibbles
from pallas_kernels.integer_weight import IntegerFormat, IntegerWeight, dequantize, pack
from tests.interop.cases import compressed_checkpoint, read_all

CONFIG = dsv3.ModelConfig(
    vocab_size=70, hidden_size=64, intermediate_size=128, moe_intermediate_size=32, num_hidden_layers=3,
    num_nextn_predict_layers=1, num_attention_heads=2, q_lora_rank=64, kv_lora_rank=32, qk_nope_head_dim=32,
    qk_rope_head_dim=16, v_head_dim=32, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1,
)  # fmt: skip
W4, W8, W2 = IntegerFormat(4, 32), IntegerFormat(8, 32), IntegerFormat(2, 32, symmetric=False)


def tensors(config: dsv3.ModelConfig, experts: IntegerFormat, rest: IntegerFormat) -> tuple[dict, dict]:
    """Every tensor, dense or as random integers, and the formats of those."""
    rng = np.random.default_rng(0)
    found, formats = {}, {}
    for s in sources(config):
        if not s.is_fp8:
            found[s.tensor] = rng.normal(0, 0.1, s.shape).astype(np.float32)
            continue
        formats[s.tensor] = format = (experts if ".experts." in s.tensor else rest).of(s.shape[1])
        groups = (s.shape[0], s.shape[1] // format.group)
        zero = None if format.symmetric else rng.integers(0, format.levels, groups, np.uint8)
        codes = rng.integers(0, format.levels, s.shape, np.uint8)
        scale = (rng.integers(128, 256, groups) * 2.0**-15).astype(np.float16)  # 8 significant bits
        found[s.tensor] = QuantizedTensor(codes, scale, zero, format)
    return found, formats


def meant(w: QuantizedTensor) -> np.ndarray:
    """w = scale * (code - zero), number by number."""
    group = np.arange(w.shape[1]) // w.format.group
    zero = 2 ** (w.format.bits - 1) if w.zero is None else w.zero[:, group].astype(np.int32)
    return w.scale[:, group].astype(np.float32) * (w.codes.astype(np.int32) - zero).astype(np.float32)


def write(path, format: str, experts=W4, rest=W4, config=CONFIG, text=None):
    found, formats = tensors(config, experts, rest)
    arguments = {"origin": {}, "text": text or TextFiles(), "formats": formats}
    if format.startswith("gguf"):
        write_gguf(path, config, format, lambda s: found[s.tensor], **arguments, name="test")
    else:
        write_hf(path, config, format, lambda s: found[s.tensor], **arguments)
    return path, found


def unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """Codes along the last axis, the first in the lowest bits."""
    parts = (words.view(np.uint32)[..., None] >> np.arange(0, 32, bits, dtype=np.uint32)) & (2**bits - 1)
    return parts.reshape(*words.shape[:-1], -1).astype(np.uint8)


@pytest.mark.parametrize(
    "suffix", ["kv_a_proj_with_mqa", "q_b_proj", "o_proj", "0.mlp.up_proj", "experts.3.gate_proj", "eh_proj"]
)
@pytest.mark.parametrize("format", [W4, W2])
def test_regions_become_tensors(suffix, format):
    """Codes move as numbers do: a layer of our array dequantised, then turned into Hugging Face's tensor by `Source`."""
    s = next(s for s in sources(CONFIG) if s.tensor.endswith(f"{suffix}.weight"))
    inputs = s.region[: len(s.split) - s.order[0]]
    outputs = s.region[len(inputs) :]
    K, rng = int(np.prod(inputs)), np.random.default_rng(1)
    lead = tuple(3 for i in s.index if isinstance(i, int))
    spread = outputs
    if ".up_proj" in s.tensor or ".gate_proj" in s.tensor:  # one of the two in our array
        lead, spread = lead[:-1], (2, *outputs)
    lead = (*lead[:-1], 4) if "experts" in s.tensor else lead
    codes = rng.integers(0, format.levels, (*lead, K, *spread), np.uint8)
    groups = (*lead, K // format.group, *spread)
    zero = None if format.symmetric else jnp.asarray(rng.integers(0, format.levels, groups, np.uint8))
    scale = jnp.asarray(rng.uniform(0.1, 1, groups), jnp.float16)
    axis = -1 - len(spread)
    whole = IntegerWeight(pack(jnp.asarray(codes), format.bits, axis), scale, zero, format, inputs, len(spread))
    at = s.integer_index
    region = IntegerWeight(
        whole.codes[at], scale[at], None if zero is None else zero[at], format, inputs, len(outputs)
    )  # fmt: skip
    found = from_region(s, region)
    np.testing.assert_array_equal(found.dequantize(), s.to_tensor(np.asarray(dequantize(whole))[s.full_index]))
    np.testing.assert_array_equal(found.dequantize(), meant(found))


def test_words_by_hand():
    np.testing.assert_array_equal(nibbles(np.arange(1, 10, dtype=np.uint8)[None], 4).view(np.uint32), [[0x87654321, 9]])
    np.testing.assert_array_equal(nibbles(np.array([[1, 255, 0, 128]], np.uint8), 8).view(np.uint32), [[0x8000FF01]])


def test_hf_w4_is_pack_quantized(tmp_path):
    directory, meant_tensors = write(tmp_path / "out", "hf-w4", W4, W8)
    found = read_all(directory)
    for name, w in meant_tensors.items():
        if isinstance(w, np.ndarray):
            assert name in found
            continue
        assert tuple(found[name + "_shape"]) == w.shape
        np.testing.assert_array_equal(unpacked(found[name + "_packed"], w.format.bits), w.codes, err_msg=name)
        np.testing.assert_array_equal(found[name + "_scale"], w.scale)
        assert name not in found
    its = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert (its["quant_method"], its["format"]) == ("compressed-tensors", "pack-quantized")
    assert {g["weights"]["num_bits"]: g["weights"]["group_size"] for g in its["config_groups"].values()} == {4: 32, 8: 32}


def test_asymmetric_linears_of_hf_w4(tmp_path):
    """Zero points are packed along the outputs."""
    asymmetric = IntegerFormat(4, 32, symmetric=False)
    directory, meant_tensors = write(tmp_path / "out", "hf-w4", W4, asymmetric)
    found = read_all(directory)
    w = meant_tensors["model.layers.0.mlp.up_proj.weight"]
    packed = found["model.layers.0.mlp.up_proj.weight_zero_point"]
    assert packed.shape == (128 // 8, 2)
    np.testing.assert_array_equal(unpacked(np.ascontiguousarray(packed.T), 4).T, w.zero)


def matched(patterns: list[str], name: str) -> bool:
    import re

    return any(re.match(pattern.removeprefix("re:"), name) for pattern in patterns)


def test_every_module_has_one_scheme(tmp_path):
    """The patterns of config.json give each module its own format, and those that are dense none; GPTQ's the same."""
    directory, found = write(tmp_path / "w4", "hf-w4", W4, W8)
    its = json.loads((directory / "config.json").read_text())["quantization_config"]
    gptq, _ = write(tmp_path / "gptq", "hf-gptq", W4, W8)
    its_gptq = json.loads((gptq / "quantize_config.json").read_text())
    assert its_gptq == json.loads((gptq / "config.json").read_text())["quantization_config"]
    for name, w in found.items():
        if w.ndim != 2 if isinstance(w, np.ndarray) else False:
            continue
        module = name.removesuffix(".weight")
        ignored = matched(its["ignore"], module) or "embed_tokens" in module
        groups = its["config_groups"].values()
        named = [g for g in groups if matched(g["targets"], module)] or [g for g in groups if g["targets"] == ["Linear"]]
        bits = [] if ignored else [g["weights"]["num_bits"] for g in named]
        assert (bits, ignored) == (([], True) if isinstance(w, np.ndarray) else ([w.format.bits], False)), name
        of_gptq = [v for k, v in its_gptq["dynamic"].items() if matched([k[2:]], module)]
        if not isinstance(w, np.ndarray):
            assert {**its_gptq, **(of_gptq[0] if of_gptq else {})}["bits"] == w.format.bits, name


@pytest.mark.parametrize("experts", [W4, W2])
def test_hf_gptq_is_the_tools_layout(experts, tmp_path):
    """The first version of the layout has zeros less one; with zero points it is the second."""
    directory, meant_tensors = write(tmp_path / "out", "hf-gptq", experts, W8)
    less = 1 if experts.symmetric else 0
    assert json.loads((directory / "quantize_config.json").read_text())["checkpoint_format"] == ("gptq" if less else "gptq_v2")
    found = read_all(directory)
    for name, w in meant_tensors.items():
        if isinstance(w, np.ndarray):
            continue
        module = name.removesuffix("weight")
        codes = unpacked(np.ascontiguousarray(found[module + "qweight"].T), w.format.bits)
        zeros = unpacked(found[module + "qzeros"], w.format.bits) + np.uint8(less)
        group = found[module + "g_idx"]
        scales = found[module + "scales"].astype(np.float32)
        back = scales[group] * (codes.T.astype(np.int32) - zeros[group].astype(np.int32))
        np.testing.assert_array_equal(back.T, meant(w), err_msg=name)


def gguf_tensors(path) -> dict[str, tuple[str, np.ndarray]]:
    """(type, numbers) by name, by gguf's own dequantiser."""
    return {t.name: (t.tensor_type.name, gguf.dequantize(t.data, t.tensor_type)) for t in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize(("experts", "type"), [(W4, "Q4_0"), (W2, "Q4_1"), (W8, "Q8_0"), (IntegerFormat(2, 32), "Q4_0")])
def test_gguf_has_the_same_numbers(experts, type, tmp_path):
    directory, found = write(tmp_path / "out", "gguf", experts, W8)
    trunk, both = (gguf_tensors(directory / name) for name in ("model.gguf", "model-mtp.gguf"))
    assert {name for name in both if name not in trunk} == {name for name in both if name.startswith("blk.3.")}
    for e in range(4):
        its, numbers = both["blk.3.ffn_down_exps.weight"]
        assert its == type
        np.testing.assert_array_equal(numbers[e], meant(found[f"model.layers.3.mlp.experts.{e}.down_proj.weight"]))
    np.testing.assert_array_equal(trunk["blk.1.attn_output.weight"][1], meant(found["model.layers.1.self_attn.o_proj.weight"]))
    kv_b = meant(found["model.layers.0.self_attn.kv_b_proj.weight"]).reshape(2, 64, 32)
    np.testing.assert_array_equal(trunk["blk.0.attn_v_b.weight"][1], kv_b[:, 32:])
    its, numbers = trunk["blk.0.attn_k_b.weight"]
    assert (its, numbers.shape) == ("Q8_0", (2, 32, 32))
    step = np.abs(kv_b[:, :32]).max(1, keepdims=True) / 127  # blocks are the nope dimensions of a head and an input
    assert (
        np.abs(numbers - kv_b[:, :32].swapaxes(1, 2)) <= 0.57 * step.swapaxes(1, 2)
    ).all()  # float16 rounds the step: 127 * 2^-11
    assert trunk["blk.1.ffn_gate_inp.weight"][0] == "F32"
    assert trunk["token_embd.weight"][0] == "F16"


def test_blocks_by_hand():
    codes = np.zeros((1, 64), np.uint8)
    codes[0, [0, 1, 16, 32, 63]] = 1, 2, 15, 7, 9
    scale = np.array([[0.5]], np.float16)
    found = gguf_blocks.encode(QuantizedTensor(codes, scale, None, IntegerFormat(4, 64)), gguf.GGMLQuantizationType.Q4_0)
    half = [0x00, 0x38]  # 0.5
    assert found[0, :4].tolist() == [*half, 0xF1, 0x02]
    assert found[0, 18:21].tolist() == [*half, 0x07]
    assert found[0, -1] == 0x90
    zero = np.array([[3]], np.uint8)
    found = gguf_blocks.encode(
        QuantizedTensor(codes[:, :32] % 4, scale, zero, IntegerFormat(2, 32, False)), gguf.GGMLQuantizationType.Q4_1
    )
    assert found[0, :6].tolist() == [*half, 0x00, 0xBE, 0x31, 0x02]  # -1.5


def test_gguf_header(tmp_path):
    rope = replace(CONFIG.rope_parameters, rope_type="yarn", factor=4.0, mscale=0.7, mscale_all_dim=0.7)
    directory, _ = write(tmp_path / "out", "gguf", config=replace(CONFIG, rope_parameters=rope))
    fields = {name: field.contents() for name, field in gguf.GGUFReader(directory / "model-mtp.gguf").fields.items()}
    keys = {name.removeprefix("deepseek2."): value for name, value in fields.items() if name.startswith("deepseek2.")}
    wanted = {
        "block_count": 4, "nextn_predict_layers": 1, "expert_gating_func": 2, "expert_group_count": 2,
        "expert_group_used_count": 1, "attention.head_count_kv": 1, "attention.key_length": 48, "attention.value_length": 32,
        "attention.key_length_mla": 48, "attention.value_length_mla": 32, "leading_dense_block_count": 1,
        "rope.dimension_count": 16, "rope.scaling.type": "yarn",
    }  # fmt: skip
    assert {name: keys[name] for name in wanted} == wanted
    assert keys["rope.scaling.yarn_log_multiplier"] == pytest.approx(0.07)
    assert fields["tokenizer.ggml.model"] == "none"


@pytest.mark.parametrize("format", ["gguf-f32", "gguf-f16", "gguf-q8_0"])
def test_gguf_of_any_checkpoint(format, tmp_path):
    """Numbers are within half a step of their type; a row that is no multiple of 32 stays in 16 bits."""
    config = replace(CONFIG, qk_nope_head_dim=24)
    weights = {s.tensor: np.random.default_rng(2).normal(0, 0.1, s.shape).astype(np.float32) for s in sources(config)}
    write_gguf(
        tmp_path / "out", config, format, lambda s: weights[s.tensor], origin={}, text=TextFiles(), formats={}, name="test"
    )
    found = gguf_tensors(tmp_path / "out/model.gguf")
    its, numbers = found["blk.1.ffn_down_exps.weight"]
    w = np.stack([weights[f"model.layers.1.mlp.experts.{e}.down_proj.weight"] for e in range(4)])
    assert its == format.removeprefix("gguf-").upper()
    bound = {"gguf-f32": 0, "gguf-f16": np.abs(w).max() * 2**-11, "gguf-q8_0": np.abs(w).max() / 127 * 0.57}[format]
    assert np.abs(numbers - w).max() <= bound
    assert found["blk.1.attn_k_b.weight"][0] == ("F32" if format == "gguf-f32" else "F16")


BAD = [
    ("hf-w4", W2, W8, {}, "2 bits in groups of 32, asymmetric; hf-w4 takes 4 or 8 bits"),
    ("hf-w4", IntegerFormat(4, 16), W8, {}, "groups of 16; hf-w4 takes groups of 32, 64, 128"),
    ("hf-w4", IntegerFormat(4, 32, False), W8, {}, "symmetric experts only"),
    ("hf-w4", IntegerFormat(4, 128), W8, {}, "groups of 64, and model.layers.1.mlp.experts.0.down_proj.weight has 4 bits in"),
    ("hf-gptq", IntegerFormat(4, 16), W8, {}, "groups of 16; hf-gptq takes groups of 32, 64, 128"),
    ("gguf", W4, IntegerFormat(8, 32, False), {}, "no type of 8 bits with zero points"),
    ("gguf", IntegerFormat(4, 16), W8, {}, "multiples of 32"),
    ("gguf", W4, W8, {"attention_bias": True}, "attention_bias=true"),
    ("gguf", W4, W8, {"num_hidden_layers": 27}, "num_hidden_layers=27"),
    ("gguf", W4, W8, {"rms_norm_eps": 1e-5}, "rms_norm_eps=1e-05"),
    ("gguf", W4, W8, {"num_nextn_predict_layers": 2}, "one MTP module"),
]


@pytest.mark.parametrize(("format", "experts", "rest", "changes", "reason"), BAD)
def test_what_a_client_does_not_take_is_refused(format, experts, rest, changes, reason, tmp_path):
    with pytest.raises(UserError, match=reason.replace("(", r"\(")):
        write(tmp_path / "out", format, experts, rest, replace(CONFIG, **changes))
    assert not any(tmp_path.iterdir())


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    config = replace(CONFIG, vocab_size=300)
    return compressed_checkpoint(tmp_path_factory.mktemp("mixed"), config, "mixed", "experts.group=32", "linears.group=32")


def test_a_compressed_checkpoint_is_exported(compressed, tmp_path):
    """Its integers, and the same numbers where a format has none; the tokenizer is in each."""
    dense = read_all(export(compressed, tmp_path / "f32", "hf-f32"))
    packed = read_all(export(compressed, tmp_path / "w4", "hf-w4"))
    assert (tmp_path / "w4/tokenizer.json").is_file()
    integer = [name for name in dense if name + "_packed" in packed]
    assert set(integer) == {s.tensor for s in sources(replace(CONFIG, vocab_size=300)) if s.is_fp8}
    for name in integer:
        bits = 4 if ".experts." in name else 8
        codes = unpacked(packed[name + "_packed"], bits)
        w = QuantizedTensor(codes, packed[name + "_scale"], None, IntegerFormat(bits, 32))
        np.testing.assert_array_equal(meant(w), dense[name], err_msg=name)
    file = export(compressed, tmp_path / "gguf", "gguf") / "model-mtp.gguf"
    np.testing.assert_array_equal(
        gguf_tensors(file)["blk.3.attn_q_a.weight"][1], dense["model.layers.3.self_attn.q_a_proj.weight"]
    )
    fields = {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    tokenizer = Tokenizer.from_file(str(tmp_path / "w4/tokenizer.json"))
    assert fields["tokenizer.ggml.tokens"][:290] == [tokenizer.id_to_token(i) for i in range(290)]
    assert fields["tokenizer.ggml.tokens"][fields["tokenizer.ggml.eos_token_id"]] == "<|end_of_text|>"


def test_dense_models_are_to_be_compressed_first(tmp_path):
    for format in ("hf-w4", "hf-gptq"):
        with pytest.raises(UserError, match="compress it first: dsv3 compress"):
            write_hf(tmp_path / "out", CONFIG, format, lambda s: np.zeros(s.shape), origin={}, text=TextFiles())
    assert not any(tmp_path.iterdir())
