"""The engine beside transformers + torch on a trained model's held-out text; prints a table and one JSON line.

All requests are there at once. The peer serves them by `generate` in batches of 8, and by its continuous batching. Greedy,
float32, each in a process of its own, in turns. `dsv3 bench RUN` compares with our own static batches.
Example: python scripts/bench/bench_serve.py runs/tiny --requests 100
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

from dsv3_jax.bench.command import processor
from dsv3_jax.bench.workload import Lengths, Prompts, draw_requests
from dsv3_jax.checkpoint.load import load, open_checkpoint
from dsv3_jax.interop.hf_export import save_hf

sys.path.append(str(Path(__file__).parents[1]))
from tools._peer import ask, peer_python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run whose held-out documents can be read")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--slots", type=int, default=64, help="of the engine, and of the peer's continuous batching")
    parser.add_argument("--rounds", type=int, default=1, help="how often each measurement is repeated")
    args = parser.parse_args()
    checkpoint = open_checkpoint(args.run)
    prompts = Prompts(checkpoint.config.model.vocab_size, checkpoint.corpus().validation.tokens)
    requests = draw_requests(prompts, Lengths(8, 50, 128), Lengths(4, 40, 120), args.requests, 0)
    with tempfile.TemporaryDirectory() as directory:
        save_hf(load(args.run), Path(directory) / "model", "hf-f32")
        file = Path(directory) / "requests.json"
        file.write_text(json.dumps([[r.prompt, r.max_tokens] for r in requests]))
        shared = {"task": "serve", "requests": str(file), "threads": os.cpu_count(), "preset": ""}
        peer = shared | {"model": f"{directory}/model"}
        sides = {
            "dsv3_jax": (Path(sys.executable), "bench/_ours.py", shared | {"model": str(args.run), "batch": args.slots}),
            "torch, continuous": (peer_python(), "bench/_peer_torch.py", peer | {"way": "continuous", "batch": args.slots}),
            "torch, generate (8)": (peer_python(), "bench/_peer_torch.py", peer | {"way": "generate", "batch": 8}),
        }
        results = {name: [] for name in sides}
        for _ in range(args.rounds):
            for name, (python, script, request) in sides.items():
                results[name].append(ask(python, script, request, False))
    tokens = sum(r.max_tokens for r in requests)
    rates = {name: tokens / statistics.median(r["seconds"] for r in runs) for name, runs in results.items()}
    ours = results["dsv3_jax"][0]["texts"]
    print("                      tokens/s   ours / it   equal texts")
    for name, rate in rates.items():
        equal = sum(a == b for a, b in zip(ours, results[name][0]["texts"], strict=True))
        print(f"{name:<20s}{rate:10.0f}{rates['dsv3_jax'] / rate:11.2f}x{equal:9d} of {len(ours)}")
    load_average = os.getloadavg()[0]
    print(f"{processor()}, load average {load_average:.1f}")
    print(json.dumps({"tokens_per_s": rates, "processor": processor(), "load_average": load_average}))


if __name__ == "__main__":
    main()
