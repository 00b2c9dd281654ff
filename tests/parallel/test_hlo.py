"""What the compiled programs say: weights are gathered a layer at a time, and only gradients cross `data`."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import load_config
from dsv3_jax.parallel.layout import layout_for
from dsv3_jax.plan.communication import groups_of
from dsv3_jax.train.state import abstract_state
from dsv3_jax.train.step import make_train_step
from tests.conftest import ROOT
from tests.parallel.cases import config_of

COLLECTIVE = re.compile(
    r"= (\(?[^=]*?\)?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\((.*)$", re.M
)


def compiled(overrides: list[str]) -> tuple[str, dict[str, int]]:
    """Text of the compiled training step, and the mesh's axis sizes."""
    config = config_of(overrides)
    layout = layout_for(config)
    shape = (config.data.batch_size, config.data.seq_len + 1 + config.model.num_nextn_predict_layers)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
    step = make_train_step(config, layout)
    text = step.lower(abstract_state(config, layout), {"tokens": tokens, "segments": tokens}).compile().as_text()
    text = re.sub(r"/\*.*?\*/", "", text)  # comments inside tuples
    return text, dict(layout.mesh.shape)


def dimensions(shapes: str) -> list[list[int]]:
    return [[int(d) for d in dims.split(",") if d] for dims in re.findall(r"\w+\[([\d,]*)\]", shapes)]


@pytest.mark.parametrize("remat", ["none", "selective", "full"])
def test_weights_are_gathered_one_layer_at_a_time(remat):
    """7 MoE layers of 40 x 4 x 10 and so on: no result of a gather has a leading axis of 7 layers, and none is larger than the
    head or one layer's largest matrix."""
    overrides = ["parallel.fsdp=8", f"remat.policy={remat}", "train.grad_accum_steps=1", "model.num_hidden_layers=8"]
    text, _ = compiled(overrides)
    largest = max(72 * 40, 8 * 40 * 2 * 24)  # the head, and a layer's experts' first weights
    found = [dims for shapes, kind, _ in COLLECTIVE.findall(text) if kind == "all-gather" for dims in dimensions(shapes)]
    assert found
    assert not [dims for dims in found if dims and dims[0] == 7]
    assert max(np.prod(dims) for dims in found) <= largest
    # nor are gathered weights kept from forward to backward: no stack of all layers' whole matrices exists at all
    assert not re.search(r"f32\[7,40,2,56\]|f32\[7,4,5,40\]|f32\[7,8,40,2,24\]", text)


def test_only_gradients_cross_data():
    """Once a step, as all-reduces of what the parameters are, and of scalars and loads for the metrics."""
    text, mesh = compiled(["parallel.data=2", "parallel.fsdp=2", "parallel.expert=2"])
    config = config_of(["parallel.data=2", "parallel.fsdp=2", "parallel.expert=2"])
    ids = np.arange(8).reshape(list(mesh.values()))
    replica = {int(i): r for r in range(2) for i in ids[r].reshape(-1)}
    crossing = [
        (kind, dims)
        for shapes, kind, line in COLLECTIVE.findall(text)
        if any(len({replica[i] for i in g}) > 1 for g in groups_of(line, ids.size))
        for dims in dimensions(shapes)
    ]
    layout = layout_for(config)
    parameters = sum(
        int(np.prod(a.sharding.shard_shape(a.shape))) for a in jax.tree.leaves(abstract_state(config, layout).params)
    )
    moved = sum(int(np.prod(dims)) for _, dims in crossing)
    assert {kind for kind, _ in crossing} == {"all-reduce"}
    assert parameters <= moved <= parameters + 2000  # metrics, loads of 6 layers, counts, rounds of the expert exchange


def test_zero3_and_selective_remat_save_memory():
    """Against replicas that recompute nothing: at least 40% less of a device's peak. scripts/bench_remat.py has real widths."""

    def peak(overrides: list[str]) -> int:
        config = load_config(ROOT / "configs" / "small.yaml", ["model.num_hidden_layers=3", "data.batch_size=8", *overrides])
        layout = layout_for(config)
        tokens = jax.ShapeDtypeStruct((8, config.data.seq_len + 1), jnp.int32)
        batch = {"tokens": tokens, "segments": tokens}
        memory = make_train_step(config, layout).lower(abstract_state(config, layout), batch).compile().memory_analysis()
        return memory.argument_size_in_bytes + memory.temp_size_in_bytes

    zero3 = peak(["parallel.fsdp=8", "remat.policy=selective"])
    assert zero3 <= 0.6 * peak(["parallel.data=8", "remat.policy=none"])
