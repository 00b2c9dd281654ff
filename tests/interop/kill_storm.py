"""Run by tests: imports, exports or compressions in children that are killed at random moments; prints one JSON line.

kill_storm.py import|export|compress SOURCE TARGET KILLS [FORMAT, or the profile's overrides]. Children are forked after
everything is imported and before any thread or device exists, so that a kill falls into the work: a quarter at any time of the
start, the others once a random part is on disk, so that slow machines see the same storm. After each, the target is complete or
not there; exports that finish are removed and begun again, another verb that finishes ends the storm. Then one is let finish,
unless LEAVE is set.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from dsv3_jax.compression.compress import compress
from dsv3_jax.interop.hf_export import export
from dsv3_jax.interop.hf_files import open_hf
from dsv3_jax.interop.hf_import import import_hf

START_S = 0.3  # about what a child takes before it writes
# of the source's bytes, at most, between two kills: an export begins again, the others go on, and compressing writes a third
PART = {"import": 1 / 8, "compress": 1 / 24, "export": 1.1}


def child(work: Callable) -> int:
    pid = os.fork()
    if pid == 0:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (of a process that is killed)
        work()
        os._exit(0)
    return pid


def size(directory: Path) -> int:
    """Bytes in it, while somebody else writes and renames there."""
    found = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                found += os.stat(os.path.join(folder, name)).st_size
    return found


def kill_once_written(pid: int, scratch: Path, enough: float) -> bool:
    """Kill the child when `scratch` has `enough` bytes, unless it ends before that; whether it was killed."""
    while size(scratch) < enough:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)  # of one that has ended, and has not been waited for: nothing
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def main() -> None:
    verb, source, target, kills = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    rng, scratch = random.Random(3), target.with_name(f".{target.name}.partial")

    def work():
        if verb == "import":
            return import_hf(source, target)
        if verb == "compress":
            return compress(source, target, "w4", sys.argv[5:])
        return export(source, target, sys.argv[5], 20_000_000)

    total = sum(p.stat().st_size for p in Path(source).rglob("*") if p.is_file())
    if verb == "export":
        total //= {"hf-f32": 1, "hf-bf16": 2, "hf-fp8": 4}[sys.argv[5]]  # sources are in float32
    found = {"killed": 0, "finished": 0, "chunks": []}
    for n in range(kills):
        before, pid = size(scratch), child(work)
        if n % 4 == 3:
            time.sleep(rng.uniform(0, START_S))
            killed = kill_once_written(pid, scratch, 0)
        else:
            killed = kill_once_written(pid, scratch, (0 if verb == "export" else before) + rng.uniform(0, PART[verb]) * total)
        found["killed"] += killed
        if verb != "export":
            if target.exists():
                break
            begun = (scratch / "identity").exists()  # before that, chunks are placeholders of Orbax's
            found["chunks"].append(sum(1 for p in scratch.rglob("*") if begun and "/c/" in str(p) and p.is_file()))
        elif target.exists():
            open_hf(target)  # all files are there, and every header is right
            assert (target / "README.md").is_file()
            shutil.rmtree(target)
            found["finished"] += not killed
    if not os.environ.get("LEAVE") and not target.exists():
        _, status = os.waitpid(child(work), 0)
        assert status == 0
    print(json.dumps(found))


if __name__ == "__main__":
    main()
