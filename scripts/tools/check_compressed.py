"""Check that other programs compute with a compressed checkpoint's exports what this project computes with it.

Exports it as hf-w4, hf-gptq and gguf, and compares them with the checkpoint's numbers in three ways:

- The files hold the same integers: read back by each format's formula, codes and scales are equal.
- transformers (compressed-tensors), gptqmodel and llama.cpp, in an environment of their own, compute the same logits.
  transformers and llama.cpp in float32, to 1e-4 of the largest logit; gptqmodel in float16, to 5e-3. llama.cpp is given the
  file as its own tool dequantises it, and our model the file's numbers (its float16 embedding and head, its Q8_0 `attn_k_b`);
  printed besides is what these cost, and what llama.cpp's products of integers do, whose activations are rounded to 8 bits.
- llama.cpp's drafting context has the same logits of the MTP module; printed is how many of its drafts the trunk accepts.
- A copy of each export in which one weight's bytes have their halves swapped is noticed by both.

No key may be missing, and none unexpected but those of MTP modules, which transformers ignores in the released model alone.
A format that refuses the checkpoint is reported with its reason. Of a checkpoint that is not compressed, gguf-f32, gguf-f16 and
gguf-q8_0 are checked in the same way. Prints a JSON line for each format.

Example: python scripts/tools/check_compressed.py compressed/tiny-w4
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import gguf
import jax.numpy as jnp
import numpy as np
from _packed import numbers_of_gguf, of_gguf, of_hf_gptq, of_hf_w4, tensors_of
from _peer import ask, peer_python
from check_export import TEXT, damaged
from tokenizers import Tokenizer

import dsv3_jax as dsv3
from dsv3_jax.checkpoint.integers import integer_arrays
from dsv3_jax.checkpoint.load import open_checkpoint
from dsv3_jax.checkpoint.storage import read_metadata
from dsv3_jax.config import ModelConfig
from dsv3_jax.interop.gguf_file import TRUNK, WITH_MTP
from dsv3_jax.interop.hf_export import export
from dsv3_jax.interop.safetensors_file import write_safetensors

FORMATS, OF_ANY = ("hf-w4", "hf-gptq", "gguf"), ("gguf-f32", "gguf-f16", "gguf-q8_0")
_CLIENTS = {"hf-w4": "transformers", "hf-gptq": "gptqmodel"} | dict.fromkeys(("gguf", *OF_ANY), "llama_cpp_f32")
TOLERANCES = {"transformers": 1e-4, "gptqmodel": 5e-3, "llama_cpp_f32": 1e-4}  # of the largest logit
_DAMAGED = "model.layers.0.self_attn.o_proj"  # which every token goes through
type Integers = dict[str, tuple[np.ndarray, np.ndarray]]  # codes and scales by the tensor's name


def integers_of(path: Path, format: str, config: ModelConfig) -> Integers:
    """Codes, and scales for each 32 inputs, of an export."""
    if format == "gguf":
        return of_gguf(path / TRUNK, config)
    less = 1
    if format == "hf-gptq":
        less = int(json.loads((path / "quantize_config.json").read_text())["checkpoint_format"] == "gptq")
    found = of_hf_w4(path) if format == "hf-w4" else of_hf_gptq(path, less)
    return {name: (w.codes, np.repeat(w.scale, max(w.format.group // 32, 1), axis=1)) for name, w in found.items()}


def agree(some: Integers, others: Integers, config: ModelConfig) -> int:
    """How many tensors two files both have, all with the same integers; 0 if one differs."""
    both = some.keys() & others.keys()
    for name in both:
        for a, b in zip(some[name], others[name], strict=True):
            if a.shape != b.shape and name.endswith("kv_b_proj.weight"):  # of which GGUF has the values' rows as integers
                a, b = (_values(x, config) for x in (a, b))
            if not np.array_equal(a, b):
                return 0
    return len(both)


def _values(rows: np.ndarray, config: ModelConfig) -> np.ndarray:
    H, N, U = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
    return rows if len(rows) == H * U else rows.reshape(H, N + U, -1)[:, N:].reshape(H * U, -1)


def swapped(x: np.ndarray) -> np.ndarray:
    """The two halves of each byte, exchanged."""
    raw = np.array(x).view(np.uint8)
    return (raw << 4 | raw >> 4).view(x.dtype)


def damaged_copy(path: Path, format: str, copy: Path) -> Path:
    """The export with one weight's bytes swapped, or its numbers in reverse order where they are no integers."""
    if not format.startswith("gguf"):
        name = _DAMAGED + (".weight_packed" if format == "hf-w4" else ".qweight")
        damaged(path, copy, name, swapped(tensors_of(path)[name]))
        return copy
    copy.mkdir()
    shutil.copyfile(path / TRUNK, copy / TRUNK)
    t = next(t for t in gguf.GGUFReader(path / TRUNK).tensors if t.name == "blk.0.attn_output.weight")
    blocks = np.array(t.data).view(np.uint8).reshape(-1, gguf.GGML_QUANT_SIZES[t.tensor_type][1])
    if format in OF_ANY:
        blocks = blocks[::-1]
    else:
        codes_at = 4 if t.tensor_type.name == "Q4_1" else 2
        blocks[:, codes_at:] = swapped(np.ascontiguousarray(blocks[:, codes_at:]))
    with (copy / TRUNK).open("r+b") as file:
        file.seek(t.data_offset)
        file.write(blocks.tobytes())
    return copy


def theirs(client: str, paths: list[Path], ids: np.ndarray, scratch: Path) -> tuple[list[np.ndarray], list[dict]]:
    out = Path(tempfile.mkdtemp(dir=scratch))
    np.save(out / "ids.npy", ids)
    request = {"client": client, "paths": list(map(str, paths)), "ids": str(out / "ids.npy"), "out": str(out)}
    said = ask(peer_python("clients"), "tools/_clients_compressed.py", request, False)["said"]
    return [np.load(out / f"{i}.npz")["logits"] for i in range(len(paths))], said


def ours(directory: Path, ids: np.ndarray) -> np.ndarray:
    return np.asarray(dsv3.load_hf(directory)(jnp.asarray(ids)))


def with_numbers_of(file: Path, dense: Path, config: ModelConfig, scratch: Path) -> Path:
    """Our float32 checkpoint with a GGUF file's numbers."""
    numbers = numbers_of_gguf(file, config, tensors_of(dense))
    copy = Path(tempfile.mkdtemp(dir=scratch))
    shutil.copyfile(dense / "config.json", copy / "config.json")
    described = {name: (np.dtype(np.float32), w.shape) for name, w in numbers.items()}
    write_safetensors(copy / "model.safetensors", described, lambda name: numbers[name].astype(np.float32))
    return copy


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference of logits, relative to the largest of `b`."""
    return float(np.abs(a - b).max() / np.abs(b).max())


class Check:
    """One checkpoint with its exports."""

    def __init__(self, checkpoint: Path, scratch: Path):
        self.scratch, self.config = scratch, open_checkpoint(checkpoint).config.model
        self.ids = np.random.default_rng(0).integers(2, self.config.vocab_size, (2, 24))
        self.dense = export(checkpoint, scratch / "dense", "hf-f32", float("inf"))
        self.logits = ours(self.dense, self.ids)
        self.exports, self.refused = {}, {}
        compressed = bool(integer_arrays(read_metadata(open_checkpoint(checkpoint).path), str(checkpoint)))
        for format in FORMATS if compressed else OF_ANY:
            try:
                self.exports[format] = export(checkpoint, scratch / format, format)
            except dsv3.UserError as error:
                self.refused[format] = str(error)
        self.integers = {
            format: integers_of(path, format, self.config) for format, path in self.exports.items() if format in FORMATS
        }

    def run(self, format: str) -> dict:
        """What was found of one format; `good` says whether all of it is as it must be."""
        path, client = self.exports[format], _CLIENTS[format]
        copy = damaged_copy(path, format, self.scratch / f"{format}-damaged")
        wanted, found = self.logits, {}
        files = [path, copy]
        if format.startswith("gguf"):
            wanted = ours(with_numbers_of(path / TRUNK, self.dense, self.config, self.scratch), self.ids)
            files = [path / TRUNK, copy / TRUNK, *([path / WITH_MTP] if (path / WITH_MTP).exists() else [])]
            found["cost_of_rounding_again"] = _difference(wanted, self.logits)
        logits, said = theirs(client, files, self.ids, self.scratch)
        if format.startswith("gguf"):
            products, _ = theirs("llama_cpp", files[:1], self.ids, self.scratch)
            found["cost_of_rounded_activations"] = _difference(products[0], wanted)
            found["same_argmax"] = float((products[0].argmax(-1) == wanted.argmax(-1)).mean())
            found["same_tokens"] = said[0]["tokens"] == self._tokens()
            if len(files) > 2:
                found["mtp"] = self._mtp(files[2])
        found |= {
            "client": client,
            "logit_difference": [_difference(its, wanted) for its in (logits[0], *logits[2:])],
            "control": {"logit_difference": _difference(logits[1], wanted)},
            "keys": self._keys(said[0]),
        }  # fmt: skip
        if its := self.integers.get(format):
            others = {other: agree(its, integers, self.config) for other, integers in self.integers.items()}
            mistaken = integers_of(copy, format, self.config)
            found |= {
                "tensors_with_the_same_integers": others,
                "control_has_the_same_integers": agree(its, mistaken, self.config),
            }
        if format == "hf-gptq":
            found["modules_in_16_bits"] = len(self._trunk(self.integers[format])) - said[0]["quantized"]
        return found | {"good": self._is_good(found)}

    def _tokens(self) -> list[int] | None:
        """A text's tokens, as the tokenizer of our export for transformers has them; None without a tokenizer."""
        file = self.dense / "tokenizer.json"
        return Tokenizer.from_file(str(file)).encode(TEXT).ids if file.exists() else None

    def _trunk(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if not name.startswith(f"model.layers.{self.config.num_hidden_layers}.")]

    def _mtp(self, file: Path) -> dict:
        """How far the module's logits are from ours at the places of llama.cpp's own text, and how many drafts are accepted."""
        (logits,), (said,) = theirs("llama_cpp_mtp", [file], self.ids, self.scratch)
        model = dsv3.load_hf(with_numbers_of(file, self.dense, self.config, self.scratch))
        text = jnp.asarray(said.pop("text"))
        segments = jnp.zeros_like(text[:, 1:])
        hidden, _ = model.hidden(text[:, :-1], segments)
        drafts, _ = model.mtp_hidden(0, hidden, text[:, 1:], segments)
        return said | {"logit_difference": _difference(logits, np.asarray(drafts @ model.head_weight()))}

    def _keys(self, said: dict) -> list[str]:
        """Missing and unexpected keys but those of MTP modules."""
        return self._trunk(key for name in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in said.get(name, []))

    def _is_good(self, found: dict) -> bool:
        tolerance = TOLERANCES[found["client"]]
        noticed = found["control"]["logit_difference"] > 5 * tolerance and not found.get("control_has_the_same_integers")
        differences = [*found["logit_difference"], *([found["mtp"]["logit_difference"]] if "mtp" in found else [])]
        same = all(found.get("tensors_with_the_same_integers", {}).values()) and max(differences) <= tolerance
        complete = not found["keys"] and not found.get("modules_in_16_bits") and found.get("same_tokens", True)
        return same and noticed and complete


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    args = parser.parse_args()
    good = True
    with tempfile.TemporaryDirectory() as name:
        try:
            check = Check(args.checkpoint, Path(name))
        except dsv3.UserError as error:
            parser.error(str(error))
        for format in [*check.exports, *check.refused]:
            found = {"refused": check.refused[format], "good": True} if format in check.refused else check.run(format)
            print(json.dumps({"format": format} | found), flush=True)
            good &= found["good"]
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
