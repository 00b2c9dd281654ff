"""The table of axes: what is sharded, and what is refused with what would divide."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dsv3_jax.config import ParallelConfig, load_config
from dsv3_jax.errors import UserError
from dsv3_jax.parallel.layout import layout_for
from dsv3_jax.parallel.mesh import AXES, axis_sizes, make_mesh, ordered
from dsv3_jax.parallel.rules import COMPUTED, STORED, spec
from dsv3_jax.state.train_state import abstract_state
from tests.conftest import ROOT
from tests.parallel.cases import MESHES, config_of


def test_one_axis_fills_up():
    assert axis_sizes(ParallelConfig(pipe=2, fsdp=-1, tensor=2), 16)["fsdp"] == 4
    assert make_mesh(ParallelConfig(expert=-1)).shape["expert"] == 8


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("fsdp=-1 tensor=-1", "parallel.fsdp and parallel.tensor are all -1"),
        ("fsdp=-1 tensor=3", r"parallel.fsdp=-1: .*tensor=3 = 3\) do not divide 8 devices.*\[1, 2, 4, 8\]"),
        ("data=16", "data=16 = 16 devices, but there are 8"),
        ("tensor=8", r"parallel.tensor=8 does not divide model.num_attention_heads=4; use one of \[1, 2, 4\]"),
        ("expert=4 model.n_routed_experts=6 model.n_group=1 model.topk_group=1", "model.n_routed_experts=6"),
        ("fsdp=8 data.batch_size=12", r"parallel.fsdp=8 does not divide data.batch_size .*=6; use one of \[1, 2, 3, 6\]"),
        ("pipe=2 tensor=2 data.seq_len=22", "parallel.pipe=2 . parallel.tensor=2 = 4 does not divide"),
        ("pipe=2 pipe_chunks=3", "the model has 5; use at most 5"),
        ("tensor=2 model.vocab_size=71", "model.vocab_size=71"),
        ("expert=8 expert_ranks_per_node=3", "parallel.expert=8 does not fill nodes of 3 ranks"),
    ],
)
def test_refused_with_what_would_do(overrides, message):
    with pytest.raises(UserError, match=message):
        layout_for(config_of([o if "." in o else f"parallel.{o}" for o in overrides.split()]))


def test_a_collision_is_refused():
    mesh = make_mesh(ParallelConfig(fsdp=2, tensor=2))
    with pytest.raises(UserError, match="heads and ffn of one array both map to mesh axis 'tensor'"):
        spec(("heads", "ffn"), (8, 8), COMPUTED, mesh)


def test_latents_that_do_not_divide_take_the_next_place():
    mesh = make_mesh(ParallelConfig(fsdp=2, expert=4))
    assert spec(("latent",), (16,), STORED, mesh) == P(("fsdp", "expert"))
    assert spec(("latent",), (6,), STORED, mesh) == P("fsdp")
    assert spec(("latent",), (7,), STORED, mesh) == P(None)


@pytest.mark.parametrize("mesh", ["fsdp=8", "fsdp=2 expert=4", "fsdp=2 expert=2 tensor=2", "pipe=2 fsdp=4"])
def test_everything_large_is_stored_in_pieces(mesh):
    """ZeRO-3: no device holds more than its share of the matrices and their moments, odd latents apart."""
    config = config_of(MESHES[mesh])
    layout = layout_for(config)
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_state(config, layout)):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        share = np.prod(leaf.sharding.shard_shape(leaf.shape)) * layout.size / max(np.prod(leaf.shape), 1)
        if leaf.ndim >= 2 and not any(small in name for small in ("norm", "bias", "w_kv_b", "w_q_b")):
            tensor = layout.axis_sizes.get("tensor", 1)  # what has neither heads nor ffn to split keeps a copy a tensor rank
            assert share <= (tensor if "_a_" in name or "router" in name or "mtp/0/w_XD" in name else 1), name


class Device:
    """What `ordered` looks at of a GPU."""

    def __init__(self, number: int, hosts: int):
        self.id, self.process_index, self.platform = number, number % hosts, "gpu"


def test_fast_axes_stay_inside_hosts():
    """16 devices on 4 hosts, listed in an order that mixes them: `tensor` and `expert` lie inside a host, `data` across."""
    mesh = ordered([Device(i, 4) for i in range(16)], (4, 1, 1, 2, 2))
    hosts = np.vectorize(lambda d: d.process_index)(mesh)
    assert all(len(np.unique(hosts[i])) == 1 for i in range(4))
    assert len(np.unique(hosts[:, 0, 0, 0, 0])) == 4


def test_axes_are_those_of_the_config():
    config = load_config(ROOT / "configs" / "tiny.yaml").parallel
    assert all(getattr(config, axis) == 1 for axis in AXES)
