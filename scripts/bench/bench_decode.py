"""Decoding speed of configs/small.yaml with a cache beside transformers + torch; prints a table and one JSON line.

128 greedy tokens after a prompt of 16, prompt included in the time, batch 1 and 8, float32, alternating processes.
Example: python scripts/bench/bench_decode.py --rounds 3
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

from dsv3_jax.config import load_config

sys.path.append(str(Path(__file__).parents[1]))
from tools._peer import ROOT, ask, hf_fields, peer_python

_NEW_TOKENS = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="how often each measurement is repeated")
    args = parser.parse_args()
    config = load_config(ROOT / "configs" / "small.yaml")
    request = {
        "task": "decode", "preset": "small.yaml", "config": hf_fields(config.model), "batch_sizes": [1, 8],
        "prompt_len": 16, "new_tokens": _NEW_TOKENS, "repeats": 3, "threads": os.cpu_count(),
    }  # fmt: skip
    sides = {"dsv3_jax": (Path(sys.executable), "bench/_ours.py"), "torch": (peer_python(), "bench/_peer_torch.py")}
    results = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, (python, script) in sides.items():
            results[name].append(ask(python, script, request, False))
    summary, ratios = {}, {}
    print("batch  " + "".join(f"{name:>12s}" for name in sides) + "   ratio   (tokens/s)")
    for batch in ("1", "8"):
        rates = {
            name: _NEW_TOKENS * int(batch) / statistics.median(r["seconds"][batch] for r in runs)
            for name, runs in results.items()
        }
        summary[batch], ratios[batch] = rates, rates["dsv3_jax"] / rates["torch"]
        print(f"{batch:>5s}  " + "".join(f"{rate:12.0f}" for rate in rates.values()) + f"   {ratios[batch]:.2f}x")
    print(json.dumps({"tokens_per_s": summary, "ratios": ratios}))


if __name__ == "__main__":
    main()
