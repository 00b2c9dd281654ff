"""Make a model that can judge compression: one whose routed experts matter, with the control that shows it.

`configs/tiny.yaml` cannot: with all routed experts zeroed, its top-1 rises. Here most parameters lie in routed experts, and
some 30 epochs of a small text make them remember most of it. Half of the text, calibration.txt, is for what compression reads,
and the other, heldout.txt, for measuring. Both were trained on: what is measured is how much a compressed model still knows of
text that compression did not see. Every linear layer's inputs are a multiple of 128 numbers. The run is an ordinary one.

Prints the control, the same run with every routed expert zeroed, and keeps the line in judge.json. Repeat the command to go
on after an interruption.

Example: python scripts/studies/judge_model.py --seed 0     # 2 CPU cores: some 6 minutes; runs/judge-0
"""

import argparse
import json
import random
import sys
from pathlib import Path

from compare_compression import measure

from dsv3_jax.config import Config, load_config
from dsv3_jax.data.corpus import stdlib_files
from dsv3_jax.errors import EXIT_STOPPED
from dsv3_jax.files import write_atomically
from dsv3_jax.training.loop import train

_ROOT = Path(__file__).resolve().parents[2]
# Groups of 128 divide the inputs of every linear. Nothing but routed experts is large: no shared or dense width to spare.
_MODEL = [
    "model.vocab_size=2048", "model.hidden_size=128", "model.intermediate_size=128", "model.moe_intermediate_size=128",
    "model.q_lora_rank=128", "model.kv_lora_rank=128",
]  # fmt: skip
_TRAINING = [
    "data.seq_len=256", "data.batch_size=8", "train.bias_update_speed=0.001", "train.eval_every=200",
    "optim.lr=3e-3", "optim.lr_final=1e-4", "optim.warmup_steps=20", "optim.weight_decay=0",
]  # fmt: skip
_PIECE = 3000  # characters of a source file, at most, in each half
_HALF = 48_000  # characters of each half


def write_halves(directory: Path, seed: int) -> None:
    """calibration.txt and heldout.txt: lines of the standard library's source, in turns from the same files."""
    files = list(stdlib_files())
    random.Random(seed).shuffle(files)
    halves = {"calibration.txt": "", "heldout.txt": ""}
    for file in files:
        text = file.read_text(encoding="utf-8", errors="replace")
        if len(text) < 4 * _PIECE:
            continue
        begins = len(text) // 4, len(text) // 2  # neither a licence at the begin nor a self-test at the end
        for name, begin in zip(halves, begins, strict=True):
            halves[name] += text[begin : begin + _PIECE].partition("\n")[2].rpartition("\n")[0] + "\n"
        if len(halves["heldout.txt"]) > _HALF:
            break
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in halves.items():
        if not (directory / name).exists():
            write_atomically(directory / name, text[:_HALF])


def judge_config(texts: Path, seed: int, steps: int) -> Config:
    """The run of a seed, over the texts that `write_halves` wrote."""
    schedule = [f"train.steps={steps}", f"optim.decay_start={steps // 2}", f"optim.decay_steps={steps // 2}"]
    halves = [f"data.path={texts / 'calibration.txt'},{texts / 'heldout.txt'}", f"data.validation_path={texts / 'heldout.txt'}"]
    length = [f"train.mtp_switch_step={steps}", f"train.seed={seed}", f"name=judge-{seed}"]
    return load_config(_ROOT / "configs" / "tiny.yaml", [*_MODEL, *_TRAINING, *schedule, *halves, *length])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--root", type=Path, default=Path("runs"))
    args = parser.parse_args()
    run = (args.root / f"judge-{args.seed}").absolute()
    texts = run.with_name(f"{run.name}-text")
    write_halves(texts, args.seed)
    if train(judge_config(texts, args.seed, args.steps), args.root).interrupted:
        sys.exit(EXIT_STOPPED)
    found = measure(str(run), str(texts / "heldout.txt"), {})
    (run / "judge.json").write_text(json.dumps(found, indent=1) + "\n")
    kept = found["zeroed"]["top1_kept"]
    print(json.dumps({name: {k: row[k] for k in ("loss", "accuracy", "mtp_acceptance")} for name, row in found.items()}))
    print(f"with every routed expert zeroed: {kept['value']:.1%} +- {kept['ci95']:.1%} of top-1 is kept; runs: {run}, {texts}")


if __name__ == "__main__":
    main()
