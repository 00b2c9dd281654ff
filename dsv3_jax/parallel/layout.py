"""The model's layout on a mesh: constraints by name, weights gathered a layer at a time, and, written out with `shard_map`, the
operations in which tokens meet weights that live elsewhere (embedding.py, experts.py, head.py, linear.py).

No `shard_map` here is differentiated but that of attention, in which nothing is summed over devices: each has its own
gradient, so that every such sum is one that stands in this file. `data` and the pipeline's stages are axes of a `vmap` around
the model (see `training/step.py` and `pipeline.py`) and appear nowhere in here.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax.config import Config, ParallelConfig
from dsv3_jax.errors import UserError
from dsv3_jax.model.layout import Layout
from dsv3_jax.model.parameters import is_float32
from dsv3_jax.parallel import embedding, experts, head, linear
from dsv3_jax.parallel.mesh import make_mesh, ranks_per_node
from dsv3_jax.parallel.on_mesh import OnMesh
from dsv3_jax.parallel.rules import COMPUTED, OUTSIDE_PIPELINE, check, is_variable, mesh_axes, spec
from dsv3_jax.parallel.serving import ServingLayout
from pallas_kernels import causal_attention
from pallas_kernels.registry import PLAIN


def without_pipe(spec: P) -> P:
    return P(*(tuple(a for a in mesh_axes(entry) if a != "pipe") or None for entry in spec))


@dataclass(frozen=True)
class MeshLayout(OnMesh):
    """`ranks_per_node` neighbours along `expert` share fast links; `two_level` sends tokens across nodes first, then inside.
    `expert_parts` at most: pieces of a device's tokens that are sent by themselves."""

    ranks_per_node: int
    two_level: bool = False
    expert_parts: int = 1
    is_outside_pipeline: bool = False

    @property
    def outside_pipeline(self) -> "MeshLayout":
        return replace(self, is_outside_pipeline=True)

    @property
    def serving(self) -> ServingLayout:
        return ServingLayout(self.mesh)

    @property
    def decoding(self):
        return self.serving.decoding

    @property
    def _table(self):
        return OUTSIDE_PIPELINE if self.is_outside_pipeline else COMPUTED

    def axes(self, name: str) -> tuple[str, ...]:
        return tuple(a for a in self._table[name] if self.mesh.shape[a] > 1)

    def spec(self, *names: str | None) -> P:
        return P(*(self.axes(name) or None if name else None for name in names))

    def constrain(self, x, *axes):
        return lax.with_sharding_constraint(x, self.sharding(spec(axes, x.shape, self._table, self.mesh)))

    def gather(self, layer, dtype):
        def of(variable: nnx.Variable) -> Any:
            axes, w = variable.get_metadata("logical_axes"), variable.get_value()
            w = w if is_float32(variable) or not jnp.issubdtype(w.dtype, jnp.floating) else w.astype(dtype)
            if "experts" in axes:  # these are gathered where they meet their tokens
                return variable.replace(w)
            stored, computed = self.stored_spec(variable), spec(axes, w.shape, self._table, self.mesh)
            split = without_pipe(stored)
            steps = [split, computed]
            if self.is_outside_pipeline:  # `pipe` moves over to the axis that it will split, before the rest is gathered
                steps = [stored, P(*(after or before for after, before in zip(computed, split, strict=True))), computed]
            return variable.replace(_gathered(w, tuple(self.sharding(s) for s in steps)))

        return jax.tree.map(of, layer, is_leaf=is_variable)

    def tokenwise(self, f, *arrays):
        tokens = self.spec("batch", "sequence")
        specs = tuple(tokens if a.ndim > 1 else P() for a in arrays)
        return self.on_each_device(f, specs, tokens)(*arrays)

    def embed(self, table_VD, token_BL, dtype):
        return embedding.embed(self, dtype, table_VD, token_BL)

    def scaled_linear(self, x, w, gemms, axes):
        return linear.scaled(self, gemms, axes, x, w)

    def attention(self, q_BLHX, k_BLHX, v_BLHU, segment_BL, scale, implementation):
        attend = functools.partial(causal_attention, scale=scale, implementation=implementation)
        if implementation in PLAIN:  # XLA partitions it
            return attend(q_BLHX, k_BLHX, v_BLHU, segment_BL)
        heads, tokens = self.spec("batch", None, "heads", None), self.spec("batch", None)
        on_each = jax.shard_map(
            attend, mesh=self.mesh, in_specs=(heads, heads, heads, tokens), out_specs=heads, check_vma=False
        )
        return on_each(q_BLHX, k_BLHX, v_BLHU, segment_BL)

    def experts(self, x_BLD, w_gate_up_ED2M, w_down_EMD, expert_BLK, weight_BLK, gemms, implementation="auto"):
        return experts.routed(self, gemms, implementation, x_BLD, w_gate_up_ED2M, w_down_EMD, expert_BLK, weight_BLK)

    def cross_entropy(self, x_BLD, head_DV, target_BL, weight_BL, implementation):
        return head.cross_entropy(self, implementation, x_BLD, head_DV, target_BL, weight_BL)

    def divergence(self, x_BLD, head_DV, teacher_x_BLC, teacher_head_CV, weight_BL, temperature):
        return head.divergence(self, temperature, x_BLD, head_DV, teacher_x_BLC, teacher_head_CV, weight_BL)


def _constrain_along(w, steps: Sequence[NamedSharding]):
    for sharding in steps:
        w = lax.with_sharding_constraint(w, sharding)
    return w


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(w, steps: tuple[NamedSharding, ...]):
    """`w`, from the first sharding to the last. Its gradient goes back shard by shard: a reduce-scatter, no all-reduce."""
    return _constrain_along(w, steps)


_gathered.defvjp(lambda w, steps: (_gathered(w, steps), None), lambda steps, _, dw: (_constrain_along(dw, steps[-2::-1]),))


def make_layout(config: ParallelConfig, mesh: Mesh) -> MeshLayout:
    """The layout of a configuration's mesh. Raises `UserError` if its expert ranks don't fill nodes."""
    ranks = mesh.shape["expert"]
    per_node = min(config.expert_ranks_per_node or ranks_per_node(mesh), ranks)
    if ranks % per_node:
        raise UserError(f"parallel.expert={ranks} does not fill nodes of {per_node} ranks; use a multiple of {per_node}")
    # XLA's ragged all-to-all is reported to crash on GPUs beyond 32 ranks (openxla/xla#47283)
    large = mesh.devices.flat[0].platform in ("gpu", "cuda", "rocm") and ranks > 32
    two_level = config.expert_transport == "two_level" or (config.expert_transport == "auto" and large)
    return MeshLayout(mesh, per_node, two_level, config.expert_parts)


def layout_for(config: Config, devices: Sequence | None = None) -> Layout:
    """The layout of `config.parallel` on these devices (all of this run's by default), checked against the model.

    One device needs no mesh. Raises `UserError` for axes that don't fit the devices or the model.
    """
    mesh = make_mesh(config.parallel, devices)
    check(config, dict(mesh.shape))
    return Layout() if mesh.size == 1 else make_layout(config.parallel, mesh)
