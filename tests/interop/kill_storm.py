"""Run by tests: imports or exports in children that are killed at random moments; prints what happened as one JSON line.

kill_storm.py import|export SOURCE TARGET KILLS [FORMAT]. Children are forked after everything is imported and before any
thread or device exists, so that a kill falls into the work. After each, the target must not be there, or be whole; exports that
finish are removed and begun again, an import that finishes ends the storm. Then one is let finish, unless LEAVE is set.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from dsv3_jax.interop.hf_export import export
from dsv3_jax.interop.hf_files import open_hf
from dsv3_jax.interop.hf_import import import_hf

LONGEST_S = 0.6  # about what an undisturbed child takes


def child(work: Callable) -> int:
    pid = os.fork()
    if pid == 0:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (of a process that is killed)
        work()
        os._exit(0)
    return pid


def main() -> None:
    verb, source, target, kills = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    rng, scratch = random.Random(3), target.with_name(f".{target.name}.partial")

    def work():
        return import_hf(source, target) if verb == "import" else export(source, target, sys.argv[5], 20_000_000)

    found = {"killed": 0, "finished": 0, "chunks": []}
    for _ in range(kills):
        pid = child(work)
        time.sleep(rng.uniform(0.05, LONGEST_S))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        found["killed"] += os.WIFSIGNALED(status)
        if verb == "import":
            if target.exists():
                break
            begun = (scratch / "identity").exists()  # before that, chunks are placeholders of Orbax's
            found["chunks"].append(sum(1 for p in scratch.rglob("*") if begun and "/c/" in str(p) and p.is_file()))
        elif target.exists():
            open_hf(target)  # all files are there, and every header is right
            assert (target / "README.md").is_file()
            shutil.rmtree(target)
            found["finished"] += not os.WIFSIGNALED(status)
    if not os.environ.get("LEAVE") and not target.exists():
        _, status = os.waitpid(child(work), 0)
        assert status == 0
    print(json.dumps(found))


if __name__ == "__main__":
    main()
