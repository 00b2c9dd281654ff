"""What compress.json and its page say: energies and sizes against NumPy, and text that comes from files."""

import json
from html.parser import HTMLParser

import jax.numpy as jnp
import numpy as np
import pytest

import dsv3_jax as dsv3
from dsv3_jax.compression.command import PAGE, report
from dsv3_jax.compression.container import integer_arrays_of
from dsv3_jax.compression.experts import Moments, expert_energies, expert_mesh, sharded
from dsv3_jax.compression.gptq import Rounded, gptq, output_energies
from dsv3_jax.compression.parts import PARTS, sizes_by_part
from dsv3_jax.compression.profile import load_profile
from dsv3_jax.compression.report import errors_by_part
from dsv3_jax.interop.arrays import abstract_variables
from dsv3_jax.progress import make_console
from pallas_kernels.integer_weight import IntegerFormat

W4 = IntegerFormat(4, 8)
EVIL = "<script>alert(1)</script>"


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def figure(value, ci95=0.001):
    return {"value": value, "ci95": ci95}


def made_up() -> dict:
    """A report of a model with one dense layer, one with experts of which one is starved, and an MTP module."""
    attention = {
        "attention/w_q_a_DQ": {"gptq": 0.001, "rounding": 0.004},
        "attention/w_q_b_QHX": {"gptq": 0.003, "rounding": 0.006},
    }
    experts = {"ffn/w_down_EMD": {"gptq": 0.01, "rounding": 0.05}}
    layers = [
        {"layer": "dense layer 0", "integer_weights": [], "output_error": attention},
        {
            "layer": "moe layer 0", "integer_weights": [], "output_error": experts, "tokens_per_expert": [0, 300, 4000, 255],
            "retries": [f"moe layer 0, {EVIL}: again"],
        },
        {"layer": "MTP module 0", "integer_weights": [], "output_error": experts, "tokens_per_expert": [300] * 4},
    ]  # fmt: skip
    return {
        "profile": {"name": EVIL, "linears": {"bits": 8, "group": 128, "symmetric": True}, "experts": None, "method": "gptq"},
        "calibration": {"windows": 12, "tokens": 3072, "starved_below": 256},
        "measured": {
            "windows": 20, "targets": 5000, "loss": 3.03, "original_loss": 3.0, "accuracy": 0.4, "loss_change": figure(0.01),
            "kl": figure(0.0123), "top1_kept": figure(0.987), "agreement": figure(0.9), "mtp_acceptance": [figure(0.55)],
            "original_mtp_acceptance": [figure(0.56)], "mtp_acceptance_change": [figure(-0.01, None)],
        },
        "sizes": {"q": {"original": 4000, "compressed": 1000}, "embedding": {"original": 2000, "compressed": 2000}},
        "output_error": errors_by_part(layers),
        "layers": layers,
    }  # fmt: skip


def energies_by_numpy(w, x, scale_GN, codes, group):
    """Squared outputs of x w, and of the errors by these codes and by the nearest of symmetric 4 bits, in float64."""
    s = np.repeat(np.asarray(scale_GN, np.float64), group, axis=0)
    nearest = np.clip(np.round(w / s), -8, 7)
    errors = (np.asarray(codes, np.float64) - 8) * s - w, nearest * s - w
    return [np.square(x @ a).sum() for a in (w, *errors)]


def test_energies_are_those_of_outputs(rng):
    """Float32 sums of 16 x 16 products: 1e-4. GPTQ's codes lose less than the nearest ones."""
    w = rng.normal(size=(16, 6)).astype(np.float32)
    x = (rng.normal(size=(200, 16)) @ rng.normal(size=(16, 16))).astype(np.float32)
    rounded = gptq(jnp.asarray(w), jnp.asarray(x.T @ x), W4, 0.01)
    found = output_energies(jnp.asarray(w), rounded, jnp.asarray(x.T @ x), W4)
    np.testing.assert_allclose(found, energies_by_numpy(w, x, rounded.scale_GN, rounded.codes_KN, 8), rtol=1e-4)
    assert found[1] < found[2]


def test_energies_of_experts_are_each_ones_own(rng):
    w = rng.normal(size=(4, 16, 6)).astype(np.float32)
    x = rng.normal(size=(4, 50, 16)).astype(np.float32)
    x[2] = 0  # no token
    codes, scale = rng.integers(0, 16, w.shape).astype(np.uint8), np.full((4, 2, 6), 0.25, np.float16)
    rounded = Rounded(codes, scale, np.full((4, 2, 6), 8, np.uint8), np.ones(4, bool))  # type: ignore[arg-type]
    mesh = expert_mesh(4)
    moments = Moments(sharded(mesh, np.einsum("etk,etl->ekl", x, x)), sharded(mesh, np.zeros(4, np.float32)))
    found = expert_energies(mesh, *sharded(mesh, (w, rounded)), moments, W4)
    for e in range(4):
        np.testing.assert_allclose(found[e], energies_by_numpy(w[e], x[e], scale[e], codes[e], 8), rtol=1e-4)


def test_errors_of_a_part_are_means_and_mtp_modules_are_apart():
    found = errors_by_part(made_up()["layers"])
    assert found == {
        "q": {"gptq": 0.002, "rounding": 0.005},
        "routed experts": {"gptq": 0.01, "rounding": 0.05},
        "MTP modules": {"gptq": 0.01, "rounding": 0.05},
    }


def test_sizes_are_counted_by_hand():
    """Experts: 4 bits and a float16 for each 16 inputs, 5 bits a weight; dropped ones count before only."""
    model = dsv3.ModelConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=3,
        num_attention_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
        n_routed_experts=16, max_position_embeddings=64,
    )  # fmt: skip
    pruned = dsv3.ModelConfig(**(vars(model) | {"n_routed_experts": 12}))
    profile = load_profile("mixed", ("experts.group=16", "linears.group=16"))
    sizes = sizes_by_part(model, pruned, integer_arrays_of(pruned, profile))
    weights = 3 * 32 * 16  # of an expert
    assert sizes["routed experts"] == {"original": 2 * 16 * weights * 2, "compressed": 2 * 12 * weights * 5 // 8}
    assert sizes["shared experts"] == {"original": 2 * weights * 2, "compressed": 2 * weights * 9 // 8}
    assert sizes["embedding"] == {"original": 300 * 32 * 2, "compressed": 300 * 32 * 2}
    assert list(sizes) == [part for part in PARTS if part in sizes]
    bias = 3 * 16  # of routers, in 32 bits
    total = sum(v.get_value().size for v in abstract_variables(model).values())
    assert sum(size["original"] for size in sizes.values()) == 2 * (total + bias)


class _Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        for key, value in attrs:
            outside = (value or "").startswith(("http", "//", "file"))
            assert not (outside and key in ("src", "href", "xlink:href")), (tag, key, value)


@pytest.mark.filterwarnings("error")
def test_report_is_a_table_of_80_columns_and_a_page_by_itself(tmp_path, capsys):
    (tmp_path / "compress.json").write_text(json.dumps(made_up()))
    assert report(tmp_path, make_console()) == tmp_path / PAGE
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    for text in ("3.0000", "+1.00% ± 0.10%", "98.70% ± 0.10%", "0.01230 ± 0.00100", "0.200%", "0.500%", "56.00%", "-1.00%"):
        assert text in printed
    assert "2 of 8 experts saw fewer than 256 tokens" in printed
    assert max(len(line) for line in lines if line.startswith(("┃", "│"))) <= 80
    tags, text = _Tags(), (tmp_path / PAGE).read_text()
    tags.feed(text)
    assert "script" not in tags.seen
    assert tags.seen.count("svg") == 3
    assert "currentColor" in text
    report(tmp_path, make_console())
    assert (tmp_path / PAGE).read_text() == text


def test_report_of_an_earlier_version_has_what_there_is(tmp_path, capsys):
    old = made_up()
    for key in ("measured", "sizes", "output_error"):
        del old[key]
    for line in old["layers"]:
        del line["output_error"]
    (tmp_path / "compress.json").write_text(json.dumps(old))
    report(tmp_path, make_console())
    assert "not measured: an earlier version" in capsys.readouterr().out


@pytest.mark.parametrize(
    "damage", ["[]", "{}", '{"profile": 3, "calibration": {}, "layers": []}', json.dumps(made_up())[:99], "null"]
)
def test_damaged_reports_are_refused(damage, tmp_path):
    (tmp_path / "compress.json").write_text(damage)
    with pytest.raises(dsv3.UserError, match=r"compress\.json"):
        report(tmp_path, make_console())
    assert not (tmp_path / PAGE).exists()
