"""What the compiled programs say: weights are gathered a layer at a time, and only gradients cross `data`."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import Config, load_config
from dsv3_jax.data.batch import Batch
from dsv3_jax.model.parameters import kind_of
from dsv3_jax.parallel.layout import layout_for
from dsv3_jax.parallel.rules import is_variable
from dsv3_jax.plan.communication import groups_of
from dsv3_jax.state.train_state import abstract_state
from dsv3_jax.training.step import make_train_step
from tests.conftest import ROOT
from tests.parallel.cases import WITHOUT_MTP, config_of

COLLECTIVE = re.compile(
    r"= (\(?[^=]*?\)?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\((.*)$", re.M
)


def compiled(overrides: list[str]) -> tuple[str, dict[str, int]]:
    """Text of the compiled training step, and the mesh's axis sizes."""
    return compiled_of(config_of(overrides))


def compiled_of(config: Config) -> tuple[str, dict[str, int]]:
    layout = layout_for(config)
    shape = (config.data.batch_size, config.data.seq_len + 1 + config.model.num_nextn_predict_layers)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
    step = make_train_step(config, layout)
    text = step.lower(abstract_state(config, layout), Batch(tokens, tokens)).compile().as_text()
    text = re.sub(r"/\*.*?\*/", "", text)  # comments inside tuples
    return text, dict(layout.mesh.shape)


def crossing_data(text: str, mesh: dict[str, int]) -> list[tuple[str, str]]:
    """(kind, shapes of the results) of the collectives between replicas; `data` is the mesh's first axis."""
    replicas = mesh["data"]
    ids = np.arange(np.prod(list(mesh.values()))).reshape(list(mesh.values()))
    replica = {int(i): r for r in range(replicas) for i in ids[r].reshape(-1)}
    return [
        (kind, shapes)
        for shapes, kind, line in COLLECTIVE.findall(text)
        if any(len({replica[i] for i in g}) > 1 for g in groups_of(line, ids.size))
    ]


def dimensions(shapes: str) -> list[list[int]]:
    return [[int(d) for d in dims.split(",") if d] for dims in re.findall(r"\w+\[([\d,]*)\]", shapes)]


@pytest.mark.parametrize("remat", ["none", "selective"])
def test_weights_are_gathered_one_layer_at_a_time(remat):
    """7 MoE layers of 40 x 4 x 10 and so on: no result of a gather has a leading axis of 7 layers, and none is larger than the
    head or one layer's largest matrix."""
    overrides = [
        "parallel.fsdp=8",
        f"remat.policy={remat}",
        "train.grad_accum_steps=1",
        "model.num_hidden_layers=8",
        WITHOUT_MTP,
    ]
    text, _ = compiled(overrides)
    largest = max(72 * 40, 8 * 40 * 2 * 24)  # the head, and a layer's experts' first weights
    found = [dims for shapes, kind, _ in COLLECTIVE.findall(text) if kind == "all-gather" for dims in dimensions(shapes)]
    assert found
    assert not [dims for dims in found if dims and dims[0] == 7]
    assert max(np.prod(dims) for dims in found) <= largest
    # nor are gathered weights kept from forward to backward: no stack of all layers' whole matrices exists at all
    assert not re.search(r"f32\[7,40,2,56\]|f32\[7,4,5,40\]|f32\[7,8,40,2,24\]", text)


def numbers_a_device(params, chosen=lambda variable: True) -> int:
    """Elements of the chosen parameters that a device holds."""
    leaves = [v for v in jax.tree.leaves(params, is_leaf=is_variable) if chosen(v)]
    return sum(int(np.prod(v.get_value().sharding.shard_shape(v.get_value().shape))) for v in leaves)


METRICS = 2000  # numbers that cross `data` for them: loads of 6 layers, counts, rounds of the expert exchange


def test_only_gradients_cross_data():
    """Once a step, as all-reduces of what the parameters are, and of scalars and loads for the metrics."""
    overrides = ["parallel.data=2", "parallel.fsdp=2", "parallel.expert=2", WITHOUT_MTP]
    crossing = crossing_data(*compiled(overrides))
    config = config_of(overrides)
    parameters = numbers_a_device(abstract_state(config, layout_for(config)).params)
    moved = sum(int(np.prod(dims)) for _, shapes in crossing for dims in dimensions(shapes))
    assert {kind for kind, _ in crossing} == {"all-reduce"}
    assert parameters <= moved <= parameters + METRICS


@pytest.mark.parametrize(("bits", "most"), [(2, 1 / 7), pytest.param(8, 0.52, marks=pytest.mark.slow)])
def test_only_codes_and_what_is_not_compressed_cross_data(bits, most):
    """A model of real widths: byte arrays there and back, of head, dense and MoE layers each one, scales included, against
    bfloat16's all-reduce, which sends each number twice; and all-reduces of vectors, router, embedding and metrics."""
    mesh = ["parallel.data=4", "parallel.fsdp=2", f"parallel.compress={bits}", "data.batch_size=8"]
    config = load_config(ROOT / "configs" / "small.yaml", [*mesh, "model.num_hidden_layers=2", "data.seq_len=64"])
    crossing = crossing_data(*compiled_of(config))
    params = abstract_state(config, layout_for(config)).params
    codes = [(kind, shapes) for kind, shapes in crossing if "u8[" in shapes]
    assert sorted(kind for kind, _ in codes) == ["all-gather"] * 3 + ["all-to-all"] * 3
    sent = sum(int(np.prod(dims)) for _, shapes in codes for dims in dimensions(shapes))
    assert sent <= most * 4 * numbers_a_device(params, lambda variable: kind_of(variable).compressible)
    rest = [(kind, shapes) for kind, shapes in crossing if "u8[" not in shapes]
    assert {kind for kind, _ in rest} == {"all-reduce"}
    whole = numbers_a_device(params, lambda variable: not kind_of(variable).compressible)
    assert whole <= sum(int(np.prod(dims)) for _, shapes in rest for dims in dimensions(shapes)) <= whole + METRICS


def test_zero3_and_selective_remat_save_memory():
    """At least 40% below the peak of replicas that recompute nothing; scripts/bench/bench_remat.py has real widths."""

    small = ["model.num_hidden_layers=3", "data.batch_size=8", WITHOUT_MTP]

    def peak(overrides: list[str]) -> int:
        config = load_config(ROOT / "configs" / "small.yaml", [*small, *overrides])
        layout = layout_for(config)
        tokens = jax.ShapeDtypeStruct((8, config.data.seq_len + 1), jnp.int32)
        batch = Batch(tokens, tokens)
        memory = make_train_step(config, layout).lower(abstract_state(config, layout), batch).compile().memory_analysis()
        return memory.argument_size_in_bytes + memory.temp_size_in_bytes

    zero3 = peak(["parallel.fsdp=8", "remat.policy=selective"])
    assert zero3 <= 0.6 * peak(["parallel.data=8", "remat.policy=none"])
