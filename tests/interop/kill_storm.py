"""Run by tests: imports or exports in children that are killed at random moments; prints what happened as one JSON line.

kill_storm.py import|export SOURCE TARGET KILLS [FORMAT]. Children are forked after everything is imported and before any
thread or device exists, so that a kill falls into the work. The last child of an import may finish, unless LEAVE is set.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from dsv3_jax.interop.hf_export import export
from dsv3_jax.interop.hf_import import import_hf


def child(work) -> int:
    pid = os.fork()
    if pid == 0:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (of a process that is killed)
        work()
        os._exit(0)
    return pid


def main() -> None:
    verb, source, target, kills = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    rng = random.Random(3)
    if verb == "import":
        work = lambda: import_hf(source, target)  # noqa: E731
        longest = 0.6
    else:
        work = lambda: export(source, target, sys.argv[5], 2_000_000)  # noqa: E731
        longest = 1.2
    found = {"killed": 0, "finished": 0, "chunks": []}
    for _ in range(kills):
        pid = child(work)
        time.sleep(rng.uniform(0.05, longest))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if not os.WIFSIGNALED(status):
            found["finished"] += 1
            break
        found["killed"] += 1
        chunks = target.with_name(f".{target.name}.partial")
        found["chunks"].append(sum(1 for p in chunks.rglob("*") if "/c/" in str(p) and p.is_file()))
    if not os.environ.get("LEAVE") and not target.exists():
        _, status = os.waitpid(child(work), 0)
        assert status == 0
    print(json.dumps(found))


if __name__ == "__main__":
    main()
