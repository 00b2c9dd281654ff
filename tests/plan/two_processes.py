"""Run by test_trace.py in each of two processes with four devices: trace a program whose collectives are known."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from dsv3_jax.cluster.processes import join

ROUNDS = 5


def main() -> None:
    join()
    mesh = Mesh(np.array(jax.devices()), ("fsdp",))

    def layers(x, w):
        def layer(x, _):
            return jnp.tanh(x @ jax.lax.all_gather(w, "fsdp", tiled=True)), None

        x = jax.lax.scan(layer, x, length=ROUNDS)[0]
        return jax.lax.psum(x, "fsdp")

    program = jax.jit(jax.shard_map(layers, mesh=mesh, in_specs=(P("fsdp"), P("fsdp")), out_specs=P(), check_vma=False))
    arrays = [jax.device_put(np.full((512, 512), v, np.float32), jax.NamedSharding(mesh, P("fsdp"))) for v in (1e-2, 1e-3)]
    program(*arrays).block_until_ready()
    jax.profiler.start_trace(f"{sys.argv[1]}/{jax.process_index()}")  # files of one host have one name
    program(*arrays).block_until_ready()
    jax.profiler.stop_trace()


if __name__ == "__main__":
    main()
