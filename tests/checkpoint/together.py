"""Run by a test in each of two processes: a checkpoint that both save, list and verify; then one that is damaged."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax.checkpoint.manager import CheckpointManager
from dsv3_jax.checkpoint.manifest import MANIFEST
from dsv3_jax.cluster.processes import agree, broadcast_from_first, equals_first, first_nonempty, is_first, join
from dsv3_jax.config import CheckpointConfig
from tests.checkpoint.cases import assert_is, state_of


def spread(state):
    mesh = Mesh(jax.devices(), "x")

    def put(a):
        sharding = NamedSharding(mesh, P("x") if a.ndim and a.shape[0] % mesh.size == 0 else P())
        return jax.make_array_from_callback(a.shape, sharding, lambda index: a[index])

    return jax.tree.map(put, state)


def main() -> None:
    directory = Path(sys.argv[1])
    join()
    manager, said = CheckpointManager(directory, CheckpointConfig()), []
    for step in (1, 2):
        manager.save(spread(state_of(step, 4096)), {"config": {}, "data": {}})
    manager.wait()
    agree(False, False)
    listing = json.loads((directory / "2" / MANIFEST).read_text())["files"]
    files = sorted(p.relative_to(directory / "2").as_posix() for p in (directory / "2").rglob("*") if p.is_file())
    leftovers = [p.name for p in directory.iterdir() if not p.name.isdigit()]
    template = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), spread(state_of(0, 4096)))
    if is_first():  # one bit of a file that the other process verifies
        victim = directory / "2" / sorted(listing)[1]
        data = bytearray(victim.read_bytes())
        data[len(data) // 2] ^= 4
        victim.write_bytes(data)
    agree(False, False)
    state, _ = CheckpointManager(directory, CheckpointConfig()).restore(template, said.append)
    gathered = jax.jit(lambda x: x, out_shardings=NamedSharding(Mesh(jax.devices(), "x"), P()))
    local = jax.tree.map(lambda a: jnp.asarray(jax.device_get(gathered(a))), state)
    assert_is(local, 1, 4096)
    other = first_nonempty("" if equals_first(str(jax.process_index())) else f"process {jax.process_index()} has another one")
    same = equals_first("one corpus") and broadcast_from_first(lambda: True) == 1
    if is_first():
        print(json.dumps({
            "whole": sorted([*listing, MANIFEST]) == files, "leftovers": leftovers, "said": said,
            "aside": (directory / "2.damaged").is_dir(), "same": same, "other": other,
        }))  # fmt: skip


if __name__ == "__main__":
    main()
