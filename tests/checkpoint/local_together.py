"""Run by a test in each of two processes, with a directory of its own for copies: both have theirs, one has lost its own."""

import json
import os
import shutil
import sys
from pathlib import Path

import jax

from dsv3_jax.checkpoint.manager import CheckpointManager
from dsv3_jax.cluster.processes import agree, join
from dsv3_jax.config import CheckpointConfig
from tests.checkpoint.cases import state_of
from tests.checkpoint.together import spread


def main() -> None:
    directory = Path(sys.argv[1])
    join()
    config, state = CheckpointConfig(local_dir=str(directory / "host-$DSV3_PROCESS_ID")), spread(state_of(1, 4096))
    manager = CheckpointManager(directory / "checkpoints", config)
    manager.save(state, {"config": {}, "data": {}})
    manager.wait()
    agree(False, False)
    template = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)
    shares = []
    for lost in (None, "1"):
        if os.environ["DSV3_PROCESS_ID"] == lost:
            shutil.rmtree(directory / f"host-{lost}")
        again = CheckpointManager(directory / "checkpoints", config)
        restored, _ = again.restore(template)
        for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
            assert a.sharding == b.sharding
            assert all((x.data == y.data).all() for x, y in zip(a.addressable_shards, b.addressable_shards, strict=True))
        shares.append(again.read_locally)
    (directory / f"shares-{jax.process_index()}").write_text(json.dumps(shares))


if __name__ == "__main__":
    main()
