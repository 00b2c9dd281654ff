"""Record what one version of dsv3_jax writes and computes, for tests/test_compatibility.py.

Makes a finished run, one on a mesh that was cut off, one with low precision, an imported checkpoint and an export, and
`expected.json`: a digest of every stored array, and what this version gets when it goes on with copies of the runs. Run it
from a checkout of the version to be recorded, with that version's own command:

    XLA_FLAGS=--xla_backend_optimization_level=0 .venv/bin/python PATH/TO/record_version.py tests/fixtures/version_0 \\
        --dsv3 .venv/bin/dsv3 --config configs/tiny.yaml

The flag is the one that tests/conftest.py sets: only the same program computes the same bits.
tests/fixtures/version_0 was recorded from commit aead573.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp

MODEL = [
    "model.vocab_size=264", "model.hidden_size=16", "model.intermediate_size=24", "model.moe_intermediate_size=8",
    "model.num_hidden_layers=3", "model.num_attention_heads=2", "model.q_lora_rank=8", "model.kv_lora_rank=8",
    "model.qk_nope_head_dim=8", "model.qk_rope_head_dim=4", "model.v_head_dim=8", "model.n_routed_experts=4",
    "model.n_group=2", "model.topk_group=1", "model.num_experts_per_tok=2", "data.seq_len=32", "data.batch_size=4",
    "data.path=corpus.jsonl", "data.validation_fraction=0.1", "data.cache_dir=cache", "train.eval_every=4",
    "train.eval_batches=2", "optim.warmup_steps=2", "optim.decay_start=3", "optim.decay_steps=6",
]  # fmt: skip


class Run(NamedTuple):
    devices: int
    steps: int
    overrides: list[str]
    cut_off: int | None = None  # the step after which it was cut off

    @property
    def saved(self) -> int:
        """The step of its latest checkpoint."""
        return self.cut_off or self.steps


SMALLER = ["model.num_nextn_predict_layers=0", "model.num_hidden_layers=2"]
RUNS = {
    "finished": Run(1, 4, []),
    "mesh": Run(
        4, 6, [*SMALLER, "parallel.data=2", "parallel.fsdp=2", "parallel.compress=2", "parallel.compress_after=2",
               "checkpoint.every_steps=4"], cut_off=4,
    ),
    "precision": Run(
        1, 4, [*SMALLER, "precision.recipe=deepseek", "precision.controller=true", "optim.moment_dtype=bfloat16",
               "optim.ema_decay=0.9"],
    ),
}  # fmt: skip
LAST = 8  # every run goes on to this step
WORDS = "the quick brown fox jumps over a lazy dog while seven wizards quietly judge my vow".split()  # noqa: SIM905


def machine() -> dict[str, object]:
    """What the bits of a computation follow from, beside the program."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return {
        "flags": hashlib.sha256(flags.encode()).hexdigest(),
        "cores": os.cpu_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "jax": jax.__version__,
    }


def digests(checkpoint: Path) -> dict[str, str]:
    """{set of arrays/name: "dtype[shape] sha256"} of everything stored."""
    path, found = str(checkpoint.absolute()), {}
    stored = {k: v for k, v in ocp.checkpointables_metadata(path).metadata.items() if k in ("weights", "optimizer", "ema")}
    templates = {part: {name: np.empty(a.shape, a.dtype) for name, a in arrays.items()} for part, arrays in stored.items()}
    for part, arrays in ocp.load_checkpointables(path, templates).items():
        for name, array in arrays.items():
            shape = ",".join(map(str, array.shape))
            found[f"{part}/{name}"] = f"{array.dtype}[{shape}] {hashlib.sha256(np.ascontiguousarray(array)).hexdigest()}"
    return found


def pack(folder: Path, file: Path) -> None:
    """One file of a folder's contents, under the folder's name."""
    with tarfile.open(file, "w:xz", preset=9) as archive:
        archive.add(folder, folder.name)


class Version:
    """The version's command, run in a folder."""

    def __init__(self, command: Path, folder: Path):
        self._command, self.folder = str(command.absolute()), folder

    def __call__(self, *args: str, devices: int = 1) -> str:
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(
            [self._command, *args], cwd=self.folder, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        return done.stdout


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def make_run(dsv3: Version, config: Path, name: str) -> Path:
    how = RUNS[name]
    steps = f"train.steps={how.steps}"
    dsv3("train", str(config.absolute()), *MODEL, *how.overrides, steps, f"name={name}", devices=how.devices)
    run = dsv3.folder / "runs" / name
    if how.cut_off is not None:  # as if it had been killed when it was about to save its last checkpoint
        shutil.rmtree(run / "checkpoints" / str(how.steps))
    shutil.rmtree(run / "tensorboard")  # large, and read by nothing here
    (run / "loss.png").unlink()
    return run


def expected_of(dsv3: Version, name: str, run: Path) -> dict[str, object]:
    """What is recorded of a run: its stored arrays and evaluation, and the metrics of going on with it."""
    how = RUNS[name]
    evaluation = json.loads(dsv3("eval", f"runs/{name}", devices=how.devices))
    arrays = digests(run / "checkpoints" / str(how.saved))
    dsv3("resume", f"runs/{name}", f"train.steps={LAST}", devices=how.devices)
    kept = {"step", "loss", "cross_entropy", "accuracy", "grad_norm", "lr", "batch_checksum", "eval_loss", "eval_loss_ema"}
    later = [{k: v for k, v in row.items() if k in kept} for row in rows(run)[how.saved :]]
    return {"step": how.saved, "devices": how.devices, "eval": evaluation, "arrays": arrays, "rows": later}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dsv3", type=Path, required=True, help="the version's command")
    parser.add_argument("--config", type=Path, required=True, help="the version's configs/tiny.yaml")
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    texts = (f"document {i}: " + " ".join(WORDS[(7 * i + j * (1 + i % 5)) % len(WORDS)] for j in range(30)) for i in range(80))
    corpus = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (args.out / "corpus.jsonl").write_text(corpus)
    with tempfile.TemporaryDirectory() as scratch:
        dsv3 = Version(args.dsv3, Path(scratch))
        shutil.copy(args.out / "corpus.jsonl", scratch)
        runs = {name: make_run(dsv3, args.config, name) for name in RUNS}
        dsv3("export", "runs/finished", "exported", "--format", "hf-fp8")
        dsv3("import", "exported", "imported", *(o for o in MODEL if o.startswith("data.")))
        for folder in (*runs.values(), dsv3.folder / "exported", dsv3.folder / "imported"):
            pack(folder, args.out / f"{folder.name}.tar.xz")
        expected = {"machine": machine(), "runs": {name: expected_of(dsv3, name, run) for name, run in runs.items()}}
        imported = json.loads(dsv3("eval", "imported", "--data", "corpus.jsonl"))
        expected["imported"] = {"eval": imported, "arrays": digests(dsv3.folder / "imported")}
    (args.out / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
