"""What every layout on a mesh answers about its devices and about where arrays are stored."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from jax.custom_batching import custom_vmap
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax.model.layout import Layout
from dsv3_jax.parallel import rules


@dataclass(frozen=True)
class OnMesh(Layout):
    mesh: Mesh

    @property
    def devices(self) -> tuple[Any, ...]:
        return tuple(self.mesh.devices.flat)

    @property
    def axis_sizes(self) -> dict[str, int]:
        return {axis: size for axis, size in self.mesh.shape.items() if size > 1}

    def sharding(self, spec: P) -> NamedSharding:
        return NamedSharding(self.mesh, spec)

    @property
    def batch_sharding(self) -> NamedSharding:
        return self.sharding(P(rules.BATCH))

    def stored_spec(self, variable: nnx.Variable) -> P:
        return rules.stored_spec(variable, self.mesh)

    def jit(self, f: Callable, arguments: Any, results: Any, donate: tuple[int, ...] = ()) -> Callable:
        return jax.jit(f, in_shardings=arguments, out_shardings=results, donate_argnums=donate)

    def on_each_device(self, f: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """`shard_map` of `f` over all axes of the mesh. Under `vmap` over a mesh axis, `f` still sees arrays without that axis.

        That keeps what `vmap` would make of a loop or a dynamic slice (selects, gathers) away from code that runs on one
        device, where such an axis has size 1 anyway.
        """

        @custom_vmap
        def body(*args):
            return f(*args)

        @body.def_vmap
        def _(axis_size, batched, *args):
            assert axis_size == 1, f"{axis_size} replicas or stages on one device"
            args = jax.tree.map(lambda a, b: a[0] if b else a, args, tuple(batched))
            out = body(*args)
            return jax.tree.map(lambda a: a[None], out), jax.tree.map(lambda _: True, out)

        return jax.shard_map(body, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
