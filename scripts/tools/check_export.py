"""Check that another program computes with an export what this project computes: transformers, in an environment of its own.

Loads the directory there (dtype "auto", then float32) and here, and compares logits (2e-4) and greedy tokens; no key may be
missing, and none unexpected but those of MTP modules, which transformers ignores in the released model alone. Then damages
copies of it, each in a way that loads without an error, and checks that the comparison notices: heads' rotated pairs in the
other order, and in hf-fp8 another scale.

transformers dequantises block-FP8 to bfloat16, and rightly only where every axis is a multiple of 128 or one block: other
hf-fp8 exports are refused here (tests compare them with the formula).

Prints a JSON line for each directory; one process of the client reads them all.

Example: python scripts/tools/check_export.py exported/tiny
"""

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from _peer import ask, peer_python
from flax import nnx

import dsv3_jax as dsv3
from dsv3_jax.interop import fp8
from dsv3_jax.interop.hf_files import HFCheckpoint, open_hf
from dsv3_jax.interop.safetensors_file import read_header

TOLERANCE = 2e-4
_NEW_TOKENS = 12
TEXT = "def main():\n    return 0\n"


def ours(directory: Path, ids: np.ndarray, eight_bit: bool) -> dict[str, np.ndarray]:
    """Logits and greedy tokens by this project, in float32; of weights in 8 bits as the client has them, in bfloat16."""
    model = dsv3.load_hf(directory)
    if eight_bit:
        bfloat16 = np.dtype(ml_dtypes.bfloat16)
        state = nnx.state(model, nnx.Param)
        nnx.update(model, nnx.map_state(lambda _, v: v.replace(v.get_value().astype(bfloat16).astype(np.float32)), state))
    return {"logits": np.asarray(model(jnp.asarray(ids))), "greedy": np.asarray(dsv3.generate(model, ids, _NEW_TOKENS))}


@dataclass(frozen=True)
class Case:
    """An export, damaged copies of it, and the prompts for all of them."""

    directory: Path
    export: HFCheckpoint
    copies: dict[str, Path]
    ids: np.ndarray
    eight_bit: bool


def theirs(cases: list[Case], scratch: Path) -> list[list[dict]]:
    """The same by the client, of each export and its copies, and what it says of its loading."""
    requests = []
    for i, case in enumerate(cases):
        out = scratch / f"client-{i}"
        out.mkdir()
        np.save(out / "ids.npy", case.ids)
        requests.append({
            "directories": [str(d) for d in (case.directory, *case.copies.values())], "ids": str(out / "ids.npy"),
            "new_tokens": _NEW_TOKENS, "out": str(out),
            "text": TEXT if (case.directory / "tokenizer.json").exists() else None,
        })  # fmt: skip
    loading = ask(peer_python(), "tools/_peer_export.py", {"requests": requests}, False)["loading"]
    return [
        [dict(np.load(Path(request["out"]) / f"{i}.npz")) | {"loading": said} for i, said in enumerate(of_case)]
        for request, of_case in zip(requests, loading, strict=True)
    ]


def is_aligned(found: HFCheckpoint) -> bool:
    """Whether the client takes its blocks rightly."""
    sizes = {n for s in found.sources if s.is_fp8 for n in s.shape}
    return all(n <= 128 or n % 128 == 0 for n in sizes)


def wrong_pairs(found: HFCheckpoint) -> tuple[str, np.ndarray]:
    """Rotated entries of the latents' projection as halves rather than pairs (or the reverse)."""
    name, R = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight", found.config.qk_rope_head_dim
    w = found.files.raw(name)
    return name, np.concatenate([w[:-R], w[-R:][0::2], w[-R:][1::2]])


def other_scales(found: HFCheckpoint) -> tuple[str, np.ndarray]:
    """One weight's scales doubled."""
    name = "model.layers.0.self_attn.o_proj.weight" + fp8.SUFFIX
    return name, 2 * found.files.raw(name)


def damaged(directory: Path, copy: Path, name: str, tensor: np.ndarray) -> None:
    """A copy of an export with another tensor in the place of one."""
    shutil.copytree(directory, copy)
    for file in copy.glob("*.safetensors"):
        entry = read_header(file).get(name)
        if entry:
            with open(file, "r+b") as opened:
                opened.seek(entry.begin)
                opened.write(tensor.tobytes())


def compare(ours: dict, theirs: dict) -> dict:
    return {
        "max_logit_difference": float(np.abs(ours["logits"] - theirs["logits"]).max()),
        "same_greedy_tokens": bool(np.array_equal(ours["greedy"], theirs["greedy"])),
    }


def is_same(compared: dict) -> bool:
    return compared["max_logit_difference"] <= TOLERANCE and compared["same_greedy_tokens"]


def prepare(directory: Path, scratch: Path) -> Case:
    """Raises `UserError` for what is no export, or one that the client would read wrongly."""
    found = open_hf(directory)
    eight_bit = any(found.is_fp8(s.tensor) for s in found.sources)
    if eight_bit and not is_aligned(found):
        problem = "an axis is neither a multiple of 128 nor one block, which transformers reads wrongly"
        raise dsv3.UserError(f"{directory}: {problem}")
    controls = {"pairs in the other order": wrong_pairs} | ({"other scales": other_scales} if eight_bit else {})
    copies = {what: scratch / what.replace(" ", "-") for what in controls}
    for what, change in controls.items():
        damaged(directory, copies[what], *change(found))
    ids = np.random.default_rng(0).integers(2, found.config.vocab_size, (2, 24))
    return Case(directory, found, copies, ids, eight_bit)


def judge(case: Case, here: dict, there: list[dict]) -> bool:
    """Print what was found; whether the export is good and every damage was noticed."""
    result: dict = {"export": compare(here, there[0]) | there[0]["loading"]}
    result |= {what: compare(here, damage) for what, damage in zip(case.copies, there[1:], strict=True)}
    mtp = f"model.layers.{case.export.config.num_hidden_layers}."
    export = result["export"]
    unexpected = [key for key in export["unexpected_keys"] if not key.startswith(mtp)]
    good = is_same(export) and not export["missing_keys"] and not export["mismatched_keys"] and not unexpected
    noticed = {what: not is_same(result[what]) for what in case.copies}
    tokens = "the same" if export["same_greedy_tokens"] else "OTHER"
    of_mtp = len(export["unexpected_keys"]) - len(unexpected)
    print(
        f"{case.directory}: logits differ by {export['max_logit_difference']:.1e} (at most {TOLERANCE}), {tokens} greedy "
        f"tokens; missing keys: {len(export['missing_keys'])}, unexpected: {len(unexpected)} (and {of_mtp} of MTP)"
    )
    for what, seen in noticed.items():
        print(f"control, {what}: {'noticed' if seen else 'NOT NOTICED'} ({result[what]['max_logit_difference']:.1e})")
    print(json.dumps(result))
    return good and all(noticed.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", type=Path, nargs="+")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        try:
            cases = [prepare(directory, scratch / str(i)) for i, directory in enumerate(args.directories)]
        except dsv3.UserError as error:
            parser.error(str(error))
        here = [ours(case.directory, case.ids, case.eight_bit) for case in cases]
        there = theirs(cases, scratch)
    good = [judge(*found) for found in zip(cases, here, there, strict=True)]
    sys.exit(0 if all(good) else 1)


if __name__ == "__main__":
    main()
