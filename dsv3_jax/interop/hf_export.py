"""`dsv3 export` and `save_hf`: a model as a Hugging Face checkpoint for PyTorch clients (transformers, vLLM, SGLang).

Formats: `hf-f32`, `hf-bf16`, and `hf-fp8`, DeepSeek's block-FP8 with bfloat16 for what it leaves in 16 bits. A directory
appears whole or not at all: everything is written beside it, config.json last, and renamed.
"""

import contextlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from dsv3_jax.checkpoint.load import Checkpoint, open_checkpoint
from dsv3_jax.checkpoint.names import weight_name
from dsv3_jax.checkpoint.piecewise import StoredArrays
from dsv3_jax.checkpoint.scratch import claim
from dsv3_jax.checkpoint.storage import read_metadata
from dsv3_jax.config import ModelConfig
from dsv3_jax.data.tokenizer import load_tokenizer, special_ids
from dsv3_jax.errors import UserError
from dsv3_jax.interop import fp8
from dsv3_jax.interop.arrays import abstract_variables
from dsv3_jax.interop.hf_config import hf_config
from dsv3_jax.interop.hf_files import INDEX, SINGLE
from dsv3_jax.interop.hf_import import COMPANIONS
from dsv3_jax.interop.hf_tensors import Source, copies, sources
from dsv3_jax.interop.safetensors_file import DTYPES, write_safetensors
from dsv3_jax.model.names import variables_by_name
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.progress import BytesProgress, human

FORMATS = ("hf-f32", "hf-bf16", "hf-fp8")
SHARD_BYTES = 5 * 10**9
_THREADS = 3  # each reads and writes a shard
_F32, _BF16 = DTYPES["F32"], DTYPES["BF16"]


@dataclass(frozen=True)
class _Output:
    """A tensor, what it is made of, and whether in 8 bits (then its scales follow it)."""

    name: str
    source: Source
    dtype: np.dtype

    @property
    def parts(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        found = {self.name: (self.dtype, self.source.shape)}
        if self.dtype == fp8.VALUES:
            found[self.name + fp8.SUFFIX] = _F32, fp8.scale_shape(self.source.shape)
        return found

    @property
    def size(self) -> int:
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in self.parts.values())

    def encode(self, tensor: np.ndarray) -> dict[str, np.ndarray]:
        if self.dtype != fp8.VALUES:
            return {self.name: tensor.astype(self.dtype, copy=False)}
        values, scales = fp8.quantize(tensor.astype(_F32, copy=False))
        return {self.name: values, self.name + fp8.SUFFIX: scales}


def _outputs(config: ModelConfig, format: str) -> list[_Output]:
    found: dict[str, _Output] = {}
    for s in sources(config):
        # the balancing bias decides between experts by small differences: released checkpoints have it in float32 too
        exact = format == "hf-f32" or s.tensor.endswith("e_score_correction_bias")
        dtype = _F32 if exact else fp8.VALUES if format == "hf-fp8" and s.is_fp8 else _BF16
        found[s.tensor] = _Output(s.tensor, s, dtype)
    for copy in copies(config):
        if not copy.tensor.startswith("lm_head"):  # transformers ties it by itself, and would call a copy unexpected
            found[copy.tensor] = _Output(copy.tensor, found[copy.of].source, found[copy.of].dtype)
    return list(found.values())


def _shards(outputs: list[_Output], shard_bytes: int) -> list[list[_Output]]:
    """In order; a shard has at least one tensor."""
    found: list[list[_Output]] = [[]]
    size = 0
    for output in outputs:
        if found[-1] and size + output.size > shard_bytes:
            found.append([])
            size = 0
        found[-1].append(output)
        size += output.size
    return found


@contextlib.contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A directory beside `target`, which becomes it at the end, or goes if something fails."""
    claimed = claim(target)
    try:
        claimed.clear()  # of an export that was killed
        directory = claimed.scratch / "export"
        directory.mkdir()
        yield directory
        claimed.publish(directory)
    except BaseException:
        claimed.drop()
        raise


class _Written(NamedTuple):
    bytes: int  # of tensors
    sha256: dict[str, str]  # of each file


def _write_shard(path: Path, shard: list[_Output], read: Callable[[Source], np.ndarray], progress: BytesProgress) -> str:
    """Returns the file's sha256."""
    waiting: dict[str, np.ndarray] = {}  # scales, which are made with their weight and come after it
    outputs = {output.name: output for output in shard}

    def make(name: str) -> np.ndarray:
        if name in outputs:
            waiting.update(outputs[name].encode(read(outputs[name].source)))
            progress.advance(outputs[name].size)
        return waiting.pop(name)

    parts = {name: part for output in shard for name, part in output.parts.items()}
    return write_safetensors(path, parts, make)[1]


def _write_tensors(
    directory: Path, config: ModelConfig, format: str, read: Callable[[Source], np.ndarray], shard_bytes: int
) -> _Written:
    """Shards and, if there are several, their index. `read` gives a source's tensor, from any thread."""
    shards = _shards(_outputs(config, format), shard_bytes)
    total = sum(output.size for shard in shards for output in shard)
    count = len(shards)
    names = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    with BytesProgress("export", total) as progress, ThreadPoolExecutor(_THREADS) as pool:
        write = partial(_write_shard, read=read, progress=progress)
        digests = list(pool.map(write, [directory / name for name in names], shards))
    if count > 1:
        weight_map = {part: name for name, shard in zip(names, shards, strict=True) for out in shard for part in out.parts}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return _Written(total, dict(zip(names, digests, strict=True)))


def _card(config: ModelConfig, format: str, written: _Written, origin: Mapping[str, str]) -> str:
    """The model card: what this is and how it was made."""
    rows = "\n".join(f"| {key} | {value} |" for key, value in origin.items())
    files = "\n".join(f"| `{name}` | `{digest}` |" for name, digest in written.sha256.items())
    eight = (
        "Projections and experts are e4m3 with a float32 scale (`weight_scale_inv`) for every 128 x 128 block, the rest is "
        "bfloat16 (router bias: float32).\n\n" if format == "hf-fp8" else ""
    )  # fmt: skip
    mtp = config.num_nextn_predict_layers
    modules = f", and {mtp} multi-token-prediction module{'s' * (mtp > 1)} (`model.layers.{config.num_hidden_layers}.*`)"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [deepseek_v3, dsv3_jax]
---

# A model of DeepSeek-V3's architecture

{config.num_hidden_layers} layers, hidden size {config.hidden_size}, {config.n_routed_experts} experts of which a token takes \
{config.num_experts_per_tok}{modules if mtp else ""}; {human(written.bytes, "B")} of weights as `{format}`.

{eight}Exported by dsv3_jax {version("dsv3-jax")}:

| | |
|---|---|
{rows}

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this directory", dtype="auto")
```

| file | sha256 |
|---|---|
{files}
"""


def _tokenizer_files(directory: Path, tokenizer: Path | None, vocab_size: int) -> dict[str, int]:
    """tokenizer.json with the settings that transformers wants beside it, if there is one; ids of its special tokens."""
    if tokenizer is None:
        return {}
    loaded = load_tokenizer(tokenizer, vocab_size)
    bos, eos = special_ids(loaded)
    if tokenizer.parent != directory:
        shutil.copyfile(tokenizer, directory / "tokenizer.json")
    if not (directory / "tokenizer_config.json").exists():
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": loaded.id_to_token(bos),
            "eos_token": loaded.id_to_token(eos), "clean_up_tokenization_spaces": False,
        }  # fmt: skip
        (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    return {"bos_token_id": bos, "eos_token_id": eos}


def write_hf(
    target: str | Path,
    config: ModelConfig,
    format: str,
    read: Callable[[Source], np.ndarray],
    *,
    origin: Mapping[str, str],
    companions: Path | None = None,
    tokenizer: Path | None = None,
    before: dict[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """A checkpoint's directory: shards, index, config, generation config, tokenizer files, model card.

    `read(source)` gives a tensor in Hugging Face's layout. `origin` goes into the card, `companions` is a directory whose
    COMPANIONS come along, `before` the config.json of an import. Raises `UserError` for an unknown format, a shard size that
    is not positive, and a target that exists.
    """
    if format not in FORMATS:
        raise UserError(f"format {format!r} is unknown; use one of {', '.join(FORMATS)}")
    if shard_bytes <= 0:
        raise UserError(f"shard size {shard_bytes} must be positive")
    with _appearing(Path(target)) as directory:
        for file in [companions / name for name in COMPANIONS] if companions else []:
            if file.is_file():
                shutil.copyfile(file, directory / file.name)
        ids = _tokenizer_files(directory, tokenizer, config.vocab_size)
        written = _write_tensors(directory, config, format, read, shard_bytes)
        fields = hf_config(config, before) | {"dtype": "float32" if format == "hf-f32" else "bfloat16"}
        fields |= {"torch_dtype": fields["dtype"]}  # what clients older than transformers 5 read
        fields = ids | fields
        if format == "hf-fp8":
            fields["quantization_config"] = fp8.QUANTIZATION_CONFIG
        if not (directory / "generation_config.json").exists():
            known = {key: fields[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in fields}
            (directory / "generation_config.json").write_text(json.dumps(known, indent=2) + "\n")
        (directory / "README.md").write_text(_card(config, format, written, origin))
        (directory / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    return Path(target)


def save_hf(
    model: Transformer, directory: str | Path, format: str = "hf-bf16", *, tokenizer: str | Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:  # fmt: skip
    """Write a model as a Hugging Face checkpoint; `tokenizer` is a tokenizer.json to put beside it.

    Formats: hf-f32, hf-bf16, hf-fp8. Nothing stands at `directory` before all of it does. Raises as `write_hf`.
    """
    if jax.process_count() > 1:
        raise UserError("save_hf writes from one process; save a checkpoint, and `dsv3 export` it from any machine")
    arrays = {name: variable.get_value() for name, variable in variables_by_name(nnx.state(model)).items()}
    layers: dict[str, tuple[int, np.ndarray]] = {}  # of each array the layer in hand, so that a sharded one is gathered once
    reading = Lock()

    def read(s: Source) -> np.ndarray:
        array, (first, *rest) = arrays[s.array], s.place
        if not isinstance(first, int) or len(array.devices()) == 1:
            return s.to_tensor(np.asarray(array)[s.place])
        with reading:
            if s.array not in layers or layers[s.array][0] != first:
                layers[s.array] = first, np.asarray(jax.lax.dynamic_index_in_dim(array, first, keepdims=False))
            return s.to_tensor(layers[s.array][1][tuple(rest)])

    origin = {"from": "a model in memory (`dsv3_jax.save_hf`)", "format": f"`{format}`"}
    return write_hf(
        directory, model.config, format, read, origin=origin, tokenizer=Path(tokenizer) if tokenizer else None,
        shard_bytes=shard_bytes,
    )  # fmt: skip


def export(run_or_checkpoint: str | Path, directory: str | Path, format: str, shard_bytes: int = SHARD_BYTES) -> Path:
    """Write a run's latest checkpoint, or a checkpoint, of whatever mesh, as a Hugging Face checkpoint.

    Weights are read from disk a tensor at a time, so that no device and little memory is needed. Raises as `write_hf` and
    `open_checkpoint`.
    """
    found = open_checkpoint(run_or_checkpoint)
    config = found.config.model
    stored, variables = StoredArrays(found.path), abstract_variables(config)
    arrays: dict[str, Any] = {}

    def read(s: Source) -> np.ndarray:
        if s.array not in arrays:
            arrays[s.array] = stored[weight_name(s.array, variables[s.array])]
        # in the order of the tensor's axes, which is that of an imported chunk's bytes
        region = arrays[s.array][s.place].transpose(tuple(np.argsort(s.order)))
        return s.from_split(region.read().result())

    before = read_metadata(found.path).get("hf_config")
    return write_hf(
        directory, config, format, read, origin=_origin(found, before is not None, format), companions=found.path,
        tokenizer=found.tokenizer_file(), before=before, shard_bytes=shard_bytes,
    )  # fmt: skip


def _origin(found: Checkpoint, imported: bool, format: str) -> dict[str, str]:
    """For the card: what the weights come from."""
    c = found.config
    if imported:
        return {"from": f"`{found.path.name}`, imported from another Hugging Face checkpoint", "format": f"`{format}`"}
    step = int(found.path.name)
    tokens = step * c.data.batch_size * c.data.seq_len
    corpus = "the source text of Python's standard library" if c.data.path is None else f"`{Path(c.data.path).name}`"
    return {
        "from": f"run `{c.name}`, step {step} of {c.train.steps}",
        "trained on": f"{human(tokens)} tokens of {corpus}, in sequences of {c.data.seq_len}",
        "precision in training": f"`{c.precision.recipe}`",
        "format": f"`{format}`",
    }
