"""Training speed of configs/small.yaml beside transformers + torch, in one run, interleaved; prints a table and one JSON line.

Both sides do whole steps (forward, backward, clipping, AdamW) at batch 4 x 512 in float32, each in a fresh process, with and
without glibc's huge pages; the ratio is of each side's better median. Runs of the sides alternate, because a shared machine
drifts. Example: python scripts/bench/bench_train.py --rounds 3
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

from dsv3_jax.config import load_config
from dsv3_jax.model.counts import training_flops_per_token

sys.path.append(str(Path(__file__).parents[1]))
from tools._peer import ROOT, ask, hf_fields, peer_python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="how often each measurement is repeated")
    parser.add_argument("--steps", type=int, default=6, help="timed steps a measurement")
    parser.add_argument("--compiled", action="store_true", help="also torch.compile (a minute for its first step)")
    args = parser.parse_args()

    config = load_config(ROOT / "configs" / "small.yaml")
    tokens = config.data.batch_size * config.data.seq_len
    request = {
        "task": "train", "preset": "small.yaml", "steps": args.steps, "config": hf_fields(config.model), "compile": False,
        "dtype": "float32", "batch_size": config.data.batch_size, "seq_len": config.data.seq_len,
        "threads": os.cpu_count(),
    }  # fmt: skip
    sides = {
        "dsv3_jax, huge pages": (sys.executable, "bench/_ours.py", request, True),
        "torch": (peer_python(), "bench/_peer_torch.py", request, False),
        "torch, huge pages": (peer_python(), "bench/_peer_torch.py", request, True),
        "dsv3_jax": (sys.executable, "bench/_ours.py", request, False),
    }
    if args.compiled:
        sides["torch.compile"] = (peer_python(), "bench/_peer_torch.py", request | {"compile": True}, False)
    results: dict[str, list[dict]] = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, side in sides.items():
            results[name].append(ask(*side))
            print(f"  {name}: {results[name][-1]['step_s']:.3f} s a step", file=sys.stderr)
    rates = ask(sys.executable, "bench/_ours.py", request | {"task": "matmul"}, False)["gflops"]

    summary = {}
    print(f"{'':22s} tokens/s  first step  peak memory")
    for name, runs in results.items():
        step = statistics.median(r["step_s"] for r in runs)
        summary[name] = {"tokens_per_s": tokens / step, "peak_gb": max(r["peak_gb"] for r in runs)}
        first = statistics.median(r["first_step_s"] for r in runs)
        print(f"{name:22s} {tokens / step:8.0f}  {first:8.1f} s  {summary[name]['peak_gb']:8.2f} GB")
    ours = max(v["tokens_per_s"] for k, v in summary.items() if k.startswith("dsv3"))
    ratios = {"against torch": ours / max(summary["torch"]["tokens_per_s"], summary["torch, huge pages"]["tokens_per_s"])}
    if args.compiled:
        ratios["against torch.compile"] = ours / summary["torch.compile"]["tokens_per_s"]
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f}x")
    rate = training_flops_per_token(config.model, config.data.seq_len) * ours / 1e9
    machine = statistics.median(rates.values())
    print(f"model FLOP rate {rate:.0f} GFLOP/s, {rate / machine:.0%} of a plain float32 matmul's {machine:.0f} GFLOP/s")
    print(json.dumps({"sides": summary, "ratios": ratios, "gflops": rate, "matmul_gflops": rates}))


if __name__ == "__main__":
    main()
