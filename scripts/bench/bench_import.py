"""Importing a synthetic checkpoint beside copying its files: time, ratio, and peak memory; a table and one JSON line.

Random bfloat16 weights in shards of 1 GB, made once in --dir (which needs three times --gb of room). Copies and imports
alternate, each in a process of its own; what each has written is removed before the next.

Example: python scripts/bench/bench_import.py --gb 8 --dir runs/bench_import
"""

import argparse
import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.interop.hf_config import hf_config
from dsv3_jax.interop.hf_directory import INDEX
from dsv3_jax.interop.hf_tensors import sources
from dsv3_jax.interop.safetensors_file import write_safetensors

_BF16 = np.dtype(ml_dtypes.bfloat16)
_SHARD_BYTES = 10**9
# a layer of 64 experts is 0.83 GB
_MODEL = ModelConfig(
    vocab_size=32768, hidden_size=2048, intermediate_size=8192, moe_intermediate_size=1024, first_k_dense_replace=1,
    num_nextn_predict_layers=0, num_attention_heads=16, q_lora_rank=768, kv_lora_rank=512, qk_nope_head_dim=128,
    qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=64, num_experts_per_tok=6, n_group=8, topk_group=4,
)  # fmt: skip


def make(directory: Path, gb: float) -> None:
    """The checkpoint, in shards with an index."""
    import dataclasses

    config = dataclasses.replace(_MODEL, num_hidden_layers=1 + max(1, round(gb / 0.83)))
    noise = np.random.default_rng(0).standard_normal(1 << 24, np.float32).astype(_BF16)
    shards: list[list] = [[]]
    size = 0
    for s in sources(config):
        size += 2 * math.prod(s.shape)
        if size > _SHARD_BYTES:
            shards.append([])
            size = 2 * math.prod(s.shape)
        shards[-1].append(s)
    scratch, weight_map = directory.with_name(directory.name + ".tmp"), {}
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        shapes = {s.tensor: (_BF16, s.shape) for s in shard}
        write_safetensors(scratch / name, shapes, lambda tensor, shapes=shapes: np.resize(noise, shapes[tensor][1]))
        weight_map |= dict.fromkeys(shapes, name)
    (scratch / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (scratch / "config.json").write_text(json.dumps(hf_config(config)))
    scratch.rename(directory)


def timed(command: list[str], target: Path) -> dict:
    """Seconds and peak resident memory of a process that writes `target`."""
    shutil.rmtree(target, ignore_errors=True)
    os.sync()  # what was written and removed before is no part of this
    began = time.perf_counter()
    watched = [sys.executable, __file__, "--watch", *command]
    done = subprocess.run(watched, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    shutil.rmtree(target)
    return {"seconds": seconds, "peak_gb": float(done.stdout.strip().splitlines()[-1])}


def watch(command: list[str]) -> None:
    """Run a command and print the peak memory of it and its children, in GB."""
    subprocess.run(command, check=True, stdout=sys.stderr)
    print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9)


def main() -> None:
    if sys.argv[1:2] == ["--watch"]:
        watch(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=8.0)
    parser.add_argument("--dir", type=Path, default=Path("runs/bench_import"))
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    source, target = args.dir / f"hf-{args.gb:g}gb", args.dir / "written"
    if not source.exists():
        make(source, args.gb)
    size = sum(p.stat().st_size for p in source.iterdir()) / 1e9
    dsv3 = str(Path(sys.executable).with_name("dsv3"))
    commands = {"copy": ["cp", "-r", str(source), str(target)], "import": [dsv3, "import", str(source), str(target)]}
    runs: dict[str, list[dict]] = {name: [] for name in commands}
    for _ in range(args.repeats):
        for name, command in commands.items():
            runs[name].append(timed(command, target))
            print(f"{name:6s} {runs[name][-1]['seconds']:6.2f} s, peak {runs[name][-1]['peak_gb']:.2f} GB", flush=True)
    seconds = {name: statistics.median(r["seconds"] for r in found) for name, found in runs.items()}
    peak = max(r["peak_gb"] for r in runs["import"])
    ratio = seconds["copy"] / seconds["import"]
    print(
        f"{size:.2f} GB: copy {size / seconds['copy']:.2f} GB/s, import {size / seconds['import']:.2f} GB/s: {ratio:.0%} of it"
    )
    print(json.dumps({"gb": size, "seconds": seconds, "speed_ratio": ratio, "peak_gb": peak, "runs": runs}))


if __name__ == "__main__":
    main()
