"""What a checkpoint costs training: one that is written beside it, and one that is waited for; a table and one JSON line.

Both sides alternate. While a save goes on beside training, steps run, and what they take more than usual counts too.
Example: python scripts/bench/bench_checkpoint.py configs/small.yaml --saves 5 --directory /data/scratch
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from bench_precision import batch_of

from dsv3_jax.checkpoint.manager import CheckpointManager
from dsv3_jax.config import load_config
from dsv3_jax.state.train_state import new_state
from dsv3_jax.training.step import make_train_step

INTERVAL_S = 600.0  # checkpoint.every_minutes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="configs/small.yaml")
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--saves", type=int, default=5, help="of each kind")
    parser.add_argument("--directory", type=Path, help="where to save; a temporary directory if not given")
    args = parser.parse_args()
    config = load_config(args.config, args.overrides)
    state, train_step = new_state(config), make_train_step(config)
    batch: Any = batch_of(config)
    directory = Path(tempfile.mkdtemp(prefix="checkpoints-", dir=args.directory))
    manager = CheckpointManager(directory, config.checkpoint)
    about = {"config": {}, "data": {}}

    def step() -> float:
        nonlocal state
        began = time.perf_counter()
        state, _ = jax.block_until_ready(train_step(state, batch))
        return time.perf_counter() - began

    def seconds_of(f) -> float:
        began = time.perf_counter()
        f()
        return time.perf_counter() - began

    step()  # compiles
    usual, stalls, slower, waited, steps_beside = [], [], [], [], []
    for save in range(args.saves + 1):
        usual += [step() for _ in range(3)]
        step()
        waited.append(seconds_of(lambda: (manager.save(state, about), manager.wait())))
        step()
        stalls.append(seconds_of(lambda: manager.save(state, about)))
        beside, running = [], manager._save
        while running is not None and running.thread.is_alive():
            beside.append(step())
        manager.wait()
        slower.append(sum(beside) - len(beside) * statistics.median(usual))
        steps_beside.append(len(beside))
        if save == 0:  # makes pools and threads
            for found in (waited, stalls, slower, steps_beside):
                found.clear()
    size = sum(p.stat().st_size for p in (directory / str(manager.latest())).rglob("*") if p.is_file())
    shutil.rmtree(directory)
    sync, stall, more = (statistics.median(x) for x in (waited, stalls, slower))
    print(f"{args.config}: {size / 1e6:.0f} MB; a step takes {statistics.median(usual):.2f} s")
    print(f"a save that is waited for     {sync:7.3f} s")
    print(f"stall of one beside training  {stall:7.3f} s, {stall / sync:.1%} of it")
    print(f"steps beside it take longer   {more:7.3f} s in all, over {statistics.median(steps_beside):g} steps")
    print(f"cost over ten minutes         {(stall + more) / INTERVAL_S:.2%} (the stall alone {stall / INTERVAL_S:.3%})")
    print(json.dumps({"bytes": size, "sync_s": sync, "stall_s": stall, "slower_s": more, "cost": (stall + more) / INTERVAL_S}))


if __name__ == "__main__":
    main()
