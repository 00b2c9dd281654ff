"""Run by a test: children that go on from the last checkpoint and save, killed in the middle; prints one JSON line.

save_storm.py DIRECTORY KILLS. Children are forked after everything is imported and before JAX has a device or a thread. Each is
killed once a random part of a save is on disk; what it finds at its start must be the complete state of the step that it names.
"""

import ctypes
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import jax

from dsv3_jax.checkpoint.manager import CheckpointManager
from dsv3_jax.checkpoint.manifest import verify
from dsv3_jax.checkpoint.retention import complete_steps
from dsv3_jax.config import CheckpointConfig
from tests.checkpoint.cases import assert_is, state_of
from tests.interop.kill_storm import kill_once_written

SIZE = 2_000_000  # float32, twice in a checkpoint
CHECKPOINT_BYTES = 8 * SIZE


def go_on(directory: Path) -> None:
    """Restore, check, and save until killed."""
    manager, step = CheckpointManager(directory, CheckpointConfig(keep=2)), 0
    if manager.latest() is not None:
        state, _ = manager.restore(jax.eval_shape(lambda: state_of(0, SIZE)))
        step = int(state.step)
        assert_is(state, step, SIZE)
    assert not [p.name for p in directory.iterdir() if not p.name.removesuffix(".incomplete").isdigit()], "leftovers"
    (directory.parent / "starting").write_text(str(step))
    (directory.parent / "starting").rename(directory.parent / "started")
    while True:
        step += 1
        manager.save(state_of(step, SIZE), {"config": {}, "data": {}})
        manager.wait()


def main() -> None:
    directory, kills = Path(sys.argv[1]), int(sys.argv[2])
    rng, started = random.Random(5), directory.parent / "started"
    found = {"kills": 0, "in a save": 0, "steps": []}
    newest = 0
    for _ in range(kills):
        started.unlink(missing_ok=True)
        pid = os.fork()
        if pid == 0:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # end with the parent, should an assertion of its own fail
            go_on(directory)
        while not started.exists():
            assert not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT), "a child failed at its start"
            time.sleep(0.002)
        assert int(started.read_text()) == newest  # no complete checkpoint is lost
        found["steps"].append(newest)
        later = newest + rng.randrange(3)  # in its first save, or in one that follows
        while max(complete_steps(directory), default=0) < later:
            time.sleep(0.002)
        # beside what is kept, a part of the next; compression takes 7% of all three, so that 0.6 comes before its end
        enough = min(later, 2) + rng.uniform(0, 0.6)
        found["kills"] += kill_once_written(pid, directory, enough * CHECKPOINT_BYTES)
        steps = complete_steps(directory)
        for step in steps:
            verify(directory / str(step))
        found["in a save"] += any(not p.name.isdigit() or int(p.name) not in steps for p in directory.iterdir())
        assert (steps[-1] if steps else 0) >= newest
        newest = steps[-1] if steps else 0
    print(json.dumps(found))
    shutil.rmtree(directory)


if __name__ == "__main__":
    main()
