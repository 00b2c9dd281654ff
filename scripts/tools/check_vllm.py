"""Check that vLLM's CPU build computes with a checkpoint's exports what this project computes with it.

Exports it as hf-f32 and, if it is compressed, as hf-w4, and compares vLLM's log-probabilities of every token at every place of
random prompts with those of our dequantised model: to 1e-4 of their spread in float32, to 5e-3 in float16 for hf-w4, whose
kernels on CPUs take no float32. A copy of each export with one damaged weight must be noticed. An export that vLLM does not
load is reported with its reason and counts as a failure.

vLLM takes MLA with the released model's sizes alone (kv_lora_rank 512, qk_rope_head_dim 64). On x86 it has linear layers in 4
bits, experts in 4 bits where the processor has AMX, and none in 8 bits. Prints a JSON line for each format.

Example: python scripts/tools/check_vllm.py compressed/w4
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from _peer import ask, peer_python
from check_compressed import damaged_copy
from check_export import damaged, wrong_pairs

import dsv3_jax as dsv3
from dsv3_jax.checkpoint.integers import integer_arrays
from dsv3_jax.checkpoint.load import open_checkpoint
from dsv3_jax.checkpoint.storage import read_metadata
from dsv3_jax.interop.hf_export import export
from dsv3_jax.interop.hf_files import open_hf

_DTYPES = {"hf-f32": "float32", "hf-w4": "float16"}
TOLERANCES = {"hf-f32": 1e-4, "hf-w4": 5e-3}  # of the spread of our log-probabilities


def theirs(path: Path, format: str, ids: np.ndarray, scratch: Path) -> np.ndarray | str:
    """vLLM's log-probabilities, or why it does not load the export."""
    np.save(scratch / "ids.npy", ids)
    out = scratch / "log_probabilities.npy"
    request = {"path": str(path), "ids": str(scratch / "ids.npy"), "dtype": _DTYPES[format], "out": str(out)}
    said = ask(peer_python("vllm"), "tools/_client_vllm.py", request, False)
    return said["refused"] if "refused" in said else np.load(out)


def check(path: Path, format: str, ids: np.ndarray, ours: np.ndarray, scratch: Path) -> dict:
    """What was found of one export; `good` says whether all of it is as it must be."""
    found = theirs(path, format, ids, scratch)
    if isinstance(found, str):
        return {"refused": found, "good": False}
    copy = scratch / f"{format}-damaged"
    if format == "hf-f32":
        damaged(path, copy, *wrong_pairs(open_hf(path)))
    else:
        damaged_copy(path, format, copy)
    control = theirs(copy, format, ids, scratch)
    assert not isinstance(control, str), control  # it has the same shapes
    difference, noticed = (float(np.abs(x - ours).max() / np.ptp(ours)) for x in (found, control))
    tolerance = TOLERANCES[format]
    good = difference <= tolerance and noticed > 5 * tolerance
    same = float((found.argmax(-1) == ours.argmax(-1)).mean())
    return {"difference": difference, "same_argmax": same, "control": {"difference": noticed}, "good": good}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    args = parser.parse_args()
    good = True
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        try:
            found = open_checkpoint(args.checkpoint)
            compressed = bool(integer_arrays(read_metadata(found.path), str(args.checkpoint)))
            exports = {
                format: export(args.checkpoint, scratch / format, format, float("inf"))
                for format in (_DTYPES if compressed else ["hf-f32"])
            }
        except dsv3.UserError as error:
            parser.error(str(error))
        ids = np.random.default_rng(0).integers(2, found.config.model.vocab_size, (2, 24))
        logits = dsv3.load_hf(exports["hf-f32"])(jnp.asarray(ids))
        ours = np.asarray(jax.nn.log_softmax(logits))[:, :-1]
        for format, path in exports.items():
            its = check(path, format, ids, ours, scratch)
            print(json.dumps({"format": format} | its), flush=True)
            good &= its["good"]
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
