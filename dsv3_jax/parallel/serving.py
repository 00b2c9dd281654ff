"""A mesh's layout for decoding, and for notebooks: batches and lengths of any size.

A step has few tokens and reads all weights, so it is the tokens that travel. They are whole on every device; weights stay
where training has stored them, and XLA adds up what devices make of their parts. The routed experts, most of the weights,
are spread out once, before the first step; each device runs its own and the results are added up.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax.model.layout import Layout, Traffic
from dsv3_jax.parallel.layout import MeshLayout
from dsv3_jax.parallel.rules import SERVED, spec
from pallas_kernels import grouped_swiglu


def _axes(place) -> tuple[str, ...]:
    """Mesh axes of one entry of a PartitionSpec."""
    return (place,) if isinstance(place, str) else tuple(place or ())


@dataclass(frozen=True)
class ServingLayout(Layout):
    mesh: Mesh

    def constrain(self, x, *axes):
        return lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec(axes, x.shape, SERVED, self.mesh)))

    def tokenwise(self, f, *arrays):
        # XLA's partitioner would gather top_k's operand from where it finds it
        return jax.shard_map(f, mesh=self.mesh, in_specs=P(), out_specs=P(), check_vma=False)(*arrays)

    def experts(self, x_BLD, w_gate_up_ED2M, w_down_EMD, expert_BLK, weight_BLK, gemms):
        def held(w_gate_up_ED2M, w_down_EMD, x_TD, expert_TK, weight_TK):
            return grouped_swiglu(x_TD, w_gate_up_ED2M, w_down_EMD, expert_TK, weight_TK, gemms)

        (B, L, D), K = x_BLD.shape, expert_BLK.shape[-1]
        weights = w_gate_up_ED2M.astype(x_BLD.dtype), w_down_EMD.astype(x_BLD.dtype)
        axes = ("experts", None, None, "moe_ffn"), ("experts", "moe_ffn", None)
        tokens = (x_BLD.reshape(B * L, D), expert_BLK.reshape(B * L, K), weight_BLK.reshape(B * L, K))
        return self.held_experts(held, weights, axes, *tokens).reshape(B, L, D), Traffic(jnp.float32(0), jnp.float32(0))

    def held_experts(self, f, weights, axes, x_TD, expert_TK, weight_TK):
        specs = tuple(spec(a, w.shape, SERVED, self.mesh) for a, w in zip(axes, weights, strict=True))
        where = axes[1].index("experts")
        ranks, ffn = _axes(specs[1][where]), _axes(specs[1][axes[1].index("moe_ffn")])

        def local(weights, x_TD, expert_TK, weight_TK):
            here = weights[1].shape[where]
            expert_TK = expert_TK - (lax.axis_index(ranks) * here if ranks else 0)
            expert_TK = jnp.where((expert_TK < 0) | (expert_TK >= here), here, expert_TK)
            y_TD = f(*weights, x_TD, expert_TK, weight_TK).astype(jnp.float32)
            return (lax.psum(y_TD, ranks + ffn) if ranks + ffn else y_TD).astype(x_TD.dtype)

        run = jax.shard_map(
            local, mesh=self.mesh, in_specs=(specs, P(), P(), P()), out_specs=P(), check_vma=False
        )  # fmt: skip
        return run(weights, x_TD, expert_TK, weight_TK)


def for_serving(layout: Layout) -> Layout:
    """The layout with which a model decodes whose weights are stored for training with `layout`."""
    return ServingLayout(layout.mesh) if isinstance(layout, MeshLayout) else layout
