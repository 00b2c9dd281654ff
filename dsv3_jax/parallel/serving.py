"""A mesh's layout for decoding, and for notebooks: batches and lengths of any size.

A step has few tokens and reads all weights, so it is the tokens that travel. Every device has all of them; weights stay
where training has stored them, and XLA adds up what devices make of their parts. The routed experts, most of the weights,
are spread out once, before the first step; each device runs its own and the results are added up.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from dsv3_jax.parallel.collectives import all_reduce, index
from dsv3_jax.parallel.on_mesh import OnMesh
from dsv3_jax.parallel.rules import DECODED, SERVED, mesh_axes, spec


@dataclass(frozen=True)
class ServingLayout(OnMesh):
    @property
    def _table(self):
        return SERVED

    @property
    def decoding(self) -> "DecodingLayout":
        return DecodingLayout(self.mesh)

    def place(self, shape, *axes):
        return self.sharding(spec(axes, shape, self._table, self.mesh))

    def constrain(self, x, *axes):
        return lax.with_sharding_constraint(x, self.place(x.shape, *axes))

    def tokenwise(self, f, *arrays):
        # XLA's partitioner would gather top_k's operand from where it finds it
        return jax.shard_map(f, mesh=self.mesh, in_specs=P(), out_specs=P(), check_vma=False)(*arrays)

    def held_experts(self, f, weights, axes, x_TD, expert_TK, weight_TK):
        specs = tuple(spec(a, w.shape, self._table, self.mesh) for a, w in zip(axes, weights, strict=True))
        where = axes[1].index("experts")
        ranks, ffn = mesh_axes(specs[1][where]), mesh_axes(specs[1][axes[1].index("moe_ffn")])

        def local(weights, x_TD, expert_TK, weight_TK):
            here = weights[1].shape[where]
            expert_TK = expert_TK - index(ranks) * here
            expert_TK = jnp.where((expert_TK < 0) | (expert_TK >= here), here, expert_TK)
            y_TD = f(*weights, x_TD, expert_TK, weight_TK).astype(jnp.float32)
            return all_reduce(y_TD, ranks + ffn).astype(x_TD.dtype)

        run = jax.shard_map(local, mesh=self.mesh, in_specs=(specs, P(), P(), P()), out_specs=P(), check_vma=False)
        return run(weights, x_TD, expert_TK, weight_TK)


@dataclass(frozen=True)
class DecodingLayout(ServingLayout):
    """That of an engine's decoder: its sequences are those of all devices, each with as many places."""

    @property
    def _table(self):
        return DECODED

    def axes(self, name):
        assert name in ("cache_batch", "moe_ffn"), name
        return tuple(a for a in DECODED[name] if self.mesh.shape[a] > 1)

    def spec(self, *names):
        return P(*(self.axes(name) or None if name else None for name in names))
