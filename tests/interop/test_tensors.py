"""Which of Hugging Face's numbers goes where, by hand."""

import numpy as np
import pytest

from dsv3_jax.interop.hf_tensors import halves, pairs, sources
from tests.model.test_counts import SMALL

SOURCES = {s.tensor: s for s in sources(SMALL)}


def numbered(tensor: str) -> np.ndarray:
    """Entry (i, j) is 100 i + j."""
    rows, columns = SOURCES[tensor].shape
    return 100 * np.arange(rows)[:, None] + np.arange(columns)


def test_interleaved_pairs_become_halves():
    x = np.array([[9, 8, 10, 20, 11, 21]])  # 4 entries rotate: (10, 20) and (11, 21)
    assert halves(x, 4, -1).tolist() == [[9, 8, 10, 11, 20, 21]]
    assert pairs(halves(x, 4, -1), 4, -1).tolist() == x.tolist()


def test_heads_of_the_output_projection():
    source = SOURCES["model.layers.0.self_attn.o_proj.weight"]
    region = source.to_region(numbered(source.tensor))
    assert region.shape == (2, 3, 4)  # heads, a value's size, hidden
    assert region[1, 1, 3] == 100 * 3 + (3 * 1 + 1)  # of hidden 3: head 1's values begin at 3
    np.testing.assert_array_equal(source.to_tensor(region), numbered(source.tensor))


def test_heads_of_the_queries_turn_their_last_entries():
    source = SOURCES["model.layers.0.self_attn.q_proj.weight"]
    region = source.to_region(numbered(source.tensor))
    assert region.shape == (4, 2, 4)  # hidden, heads, a key's size
    assert region[1, 1].tolist() == [401, 501, 601, 701]  # one pair: halves and pairs are the same
    np.testing.assert_array_equal(source.to_tensor(region), numbered(source.tensor))


@pytest.mark.parametrize(
    ("tensor", "array", "index"),
    [
        ("layers.0.mlp.gate_proj", "dense_blocks/ffn/w_gate_up_D2F", (0, slice(None), 0)),
        ("layers.0.mlp.up_proj", "dense_blocks/ffn/w_gate_up_D2F", (0, slice(None), 1)),
        ("layers.1.mlp.experts.2.gate_proj", "moe_blocks/ffn/w_gate_up_ED2M", (0, 2, slice(None), 0)),
        ("layers.1.mlp.experts.3.up_proj", "moe_blocks/ffn/w_gate_up_ED2M", (0, 3, slice(None), 1)),
        ("layers.1.mlp.experts.1.down_proj", "moe_blocks/ffn/w_down_EMD", (0, 1)),
    ],
)
def test_places(tensor, array, index):
    source = SOURCES[f"model.{tensor}.weight"]
    assert (source.array, source.index) == (array, index)
    assert source.to_region(numbered(source.tensor))[1, 2] == 201  # inputs first


def test_what_released_checkpoints_have_in_8_bits():
    found = {name.removeprefix("model.layers.1.") for name, s in SOURCES.items() if s.is_fp8 and "layers.1." in name}
    attention = {f"self_attn.{name}.weight" for name in ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")}
    experts = {f"mlp.{e}.{p}_proj.weight" for e in ("experts.0", "shared_experts") for p in ("gate", "up", "down")}
    assert found >= attention | experts
    assert not any(s.is_fp8 for name, s in SOURCES.items() if ".mlp.gate." in name or "norm" in name or "embed" in name)
