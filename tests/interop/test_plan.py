"""`dsv3 import --plan`: the released model's tensors, counted by hand, all go somewhere, and every array is filled."""

import json
import math

import pytest
from rich.console import Console

import dsv3_jax as dsv3
from dsv3_jax.errors import UserError
from dsv3_jax.interop.hf_plan import plan_import, show_plan
from tests.commands import dsv3 as command
from tests.conftest import FIXTURES, ROOT
from tests.interop.cases import FP8_CONFIG, noise_checkpoint

RELEASED_FILES_BYTES = 688_586_727_753  # of the released model's 163 files, headers included
RELEASED_CONFIG = {
    "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "num_hidden_layers": 61, "first_k_dense_replace": 3, "num_nextn_predict_layers": 1,
    "num_attention_heads": 128, "num_key_value_heads": 128, "n_shared_experts": 1, "n_routed_experts": 256, "ep_size": 1,
    "routed_scaling_factor": 2.5, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "qk_nope_head_dim": 128, "topk_method": "noaux_tc", "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8,
    "moe_layer_freq": 1, "norm_topk_prob": True, "scoring_func": "sigmoid", "aux_loss_alpha": 0.001, "seq_aux": True,
    "hidden_act": "silu", "initializer_range": 0.02, "rms_norm_eps": 1e-06, "rope_theta": 10000,
    "max_position_embeddings": 163840,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                     "original_max_position_embeddings": 4096, "type": "yarn"},
    "attention_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "quantization_config": FP8_CONFIG,
}  # fmt: skip


def released_tensors() -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> shape and dtype, written down from the release's description, without this project's list."""
    found: dict[str, tuple[tuple[int, ...], str]] = {}

    def eight_bit(name: str, rows: int, columns: int) -> None:
        found[f"{name}.weight"] = (rows, columns), "F8_E4M3"
        found[f"{name}.weight_scale_inv"] = (math.ceil(rows / 128), math.ceil(columns / 128)), "F32"

    def mlp(name: str, ffn: int) -> None:
        eight_bit(f"{name}.gate_proj", ffn, 7168)
        eight_bit(f"{name}.up_proj", ffn, 7168)
        eight_bit(f"{name}.down_proj", 7168, ffn)

    found["model.embed_tokens.weight"] = (129280, 7168), "BF16"
    for layer in range(62):
        at = f"model.layers.{layer}"
        for norm, size in (
            ("input_layernorm", 7168), ("post_attention_layernorm", 7168), ("self_attn.q_a_layernorm", 1536),
            ("self_attn.kv_a_layernorm", 512),
        ):  # fmt: skip
            found[f"{at}.{norm}.weight"] = (size,), "BF16"
        eight_bit(f"{at}.self_attn.q_a_proj", 1536, 7168)
        eight_bit(f"{at}.self_attn.q_b_proj", 128 * 192, 1536)
        eight_bit(f"{at}.self_attn.kv_a_proj_with_mqa", 576, 7168)
        eight_bit(f"{at}.self_attn.kv_b_proj", 128 * 256, 512)
        eight_bit(f"{at}.self_attn.o_proj", 7168, 128 * 128)
        if layer < 3:
            mlp(f"{at}.mlp", 18432)
            continue
        found[f"{at}.mlp.gate.weight"] = (256, 7168), "BF16"
        found[f"{at}.mlp.gate.e_score_correction_bias"] = (256,), "F32"
        mlp(f"{at}.mlp.shared_experts", 2048)
        for expert in range(256):
            mlp(f"{at}.mlp.experts.{expert}", 2048)
    for name, shape in (
        ("eh_proj", (7168, 14336)), ("enorm", (7168,)), ("hnorm", (7168,)), ("shared_head.norm", (7168,)),
        ("shared_head.head", (129280, 7168)), ("embed_tokens", (129280, 7168)),
    ):  # fmt: skip
        found[f"model.layers.61.{name}.weight"] = shape, "BF16"
    found["model.norm.weight"] = (7168,), "BF16"
    found["lm_head.weight"] = (129280, 7168), "BF16"
    return found


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    directory = tmp_path_factory.mktemp("released")
    (directory / "config.json").write_text(json.dumps(RELEASED_CONFIG))
    names = list(released_tensors())
    files = {name: f"model-{i * 163 // len(names) + 1:05d}-of-000163.safetensors" for i, name in enumerate(names)}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return directory


def test_the_released_model_leaves_nothing_over(released):
    plan, expected = plan_import(released), released_tensors()
    assert len(expected) == 91_991
    assert {m.tensor: (m.shape, m.dtype) for m in plan.mapped} == expected
    assert (plan.tensors_left, plan.arrays_left) == ([], {})
    total = sum(m.bytes for m in plan.mapped)
    headers = RELEASED_FILES_BYTES - total
    assert 100 * 91_991 < headers < 200 * 91_991  # a header has a line of that length for each
    assert plan.host_bytes == 4 * 4 * 18432 * 7168  # the largest weight in 8 bits, as float32, in each thread
    assert plan.written_bytes["bfloat16"] == pytest.approx(2 * 682.5e9, rel=0.01)  # without what MTP shares
    places = [m.goes_to for m in plan.mapped]
    assert len(set(places)) == len(places)  # no region is filled twice


def test_the_command_prints_it(released):
    done = command("import", "--plan", str(released / "model.safetensors.index.json"), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert "91,991 of 91,991 have a place" in text
    assert "reads 689GB; writes 2.73TB with --dtype exact, 1.37TB with --dtype bfloat16" in text


def test_what_is_left_over_is_named(released, tmp_path):
    index = json.loads((released / "model.safetensors.index.json").read_text())
    (tmp_path / "config.json").write_text((released / "config.json").read_text())

    def shown(change) -> str:
        files = dict(index["weight_map"])
        change(files)
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        with pytest.raises(UserError) as error:
            show_plan(plan_import(tmp_path), Console(quiet=True))
        return str(error.value)

    assert shown(lambda f: f.update({"model.layers.3.extra": "model-00001-of-000163.safetensors"})) == (
        "1 tensors are left over, the first model.layers.3.extra"
    )
    missing = "model.layers.60.mlp.experts.255.up_proj.weight"
    assert f"moe_blocks/ffn/w_gate_up_ED2M misses tensor {missing}" in shown(lambda f: f.pop(missing))
    scale = "model.layers.5.self_attn.o_proj.weight_scale_inv"
    assert f"misses tensor {scale}" in shown(lambda f: f.pop(scale))


def test_of_files_that_are_there(tmp_path):
    """Shapes and dtypes are the files'."""
    directory = noise_checkpoint(tmp_path / "hf", 4)
    plan = plan_import(directory)
    assert {m.dtype for m in plan.mapped} == {"F32"}
    assert plan.written_bytes["exact"] == sum(m.bytes for m in plan.mapped)
    show_plan(plan, Console(quiet=True))
    for name in ("v3_tiny", "options_a", "options_b"):
        show_plan(plan_import(FIXTURES / name), Console(quiet=True))
    (tmp_path / "config.json").write_text(json.dumps(RELEASED_CONFIG))
    with pytest.raises(UserError, match="neither"):
        plan_import(tmp_path)
    assert dsv3.load_hf(directory).config.n_routed_experts == 4


def test_what_goes_where_is_readable_in_80_columns(capsys):
    """Names are not cut: a table where its rows fit, and two lines for each where they do not."""
    plan = plan_import(FIXTURES / "v3_tiny")
    for width in (80, 160):
        show_plan(plan, Console(width=width))
        out = capsys.readouterr().out
        assert "model.layers.N.self_attn.kv_a_proj_with_mqa.weight" in out
        assert "moe_blocks/attention/w_kv_b_CHX[N, :, :, :]" in out
        assert "…" not in out
        assert ("┃ how many ┃" in out) == (width == 160)
