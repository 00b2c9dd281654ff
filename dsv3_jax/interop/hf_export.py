"""`dsv3 export` and `save_hf`: a model as a Hugging Face checkpoint for PyTorch clients (transformers, vLLM, SGLang), or GGUF.

Formats: `hf-f32`, `hf-bf16`, and `hf-fp8`, DeepSeek's block-FP8 with bfloat16 for what it leaves in 16 bits; of compressed
checkpoints `hf-w4` (compressed_tensors.py), `hf-gptq` (gptq_layout.py) and `gguf` (gguf_file.py).
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from threading import Lock
from typing import Any

import jax
import numpy as np
from flax import nnx

from dsv3_jax.checkpoint.integers import IntegerArray, integer_arrays
from dsv3_jax.checkpoint.load import open_checkpoint
from dsv3_jax.checkpoint.names import weight_name
from dsv3_jax.checkpoint.piecewise import StoredArrays
from dsv3_jax.checkpoint.storage import read_metadata
from dsv3_jax.config import ModelConfig
from dsv3_jax.data.companions import about_text, beside
from dsv3_jax.errors import UserError
from dsv3_jax.interop import gguf_file
from dsv3_jax.interop.arrays import abstract_variables
from dsv3_jax.interop.hf_card import origin_of_checkpoint
from dsv3_jax.interop.hf_import import SCALES
from dsv3_jax.interop.hf_tensors import Source, sources
from dsv3_jax.interop.hf_text import TextFiles
from dsv3_jax.interop.hf_writer import SHARD_BYTES, Before, Read, write_hf
from dsv3_jax.interop.quantized import Tensor, from_region
from dsv3_jax.interop.safetensors_file import MappedFile, read_header
from dsv3_jax.model.names import variables_by_name
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.runs.directory import RunDirectory
from pallas_kernels.integer_weight import IntegerWeight


def save_hf(
    model: Transformer, directory: str | Path, format: str = "hf-bf16", *, tokenizer: str | Path | None = None,
    shard_bytes: float = SHARD_BYTES,
) -> Path:  # fmt: skip
    """Write a model as a Hugging Face checkpoint that transformers, vLLM and SGLang load.

    Args:
        model: On one device or a mesh of this process.
        directory: The export's directory, which exists only once it is complete.
        format: hf-f32, hf-bf16, or hf-fp8 (DeepSeek's block-FP8).
        tokenizer: A tokenizer.json to put beside the weights, with the files about it that are where it is.
        shard_bytes: Largest size of a safetensors file; a single tensor may be larger.

    Returns:
        The export's directory.

    Raises:
        UserError: `directory` exists, `format` or `shard_bytes` is not valid, or there are several processes.
    """
    if jax.process_count() > 1:
        raise UserError("save_hf writes from one process; save a checkpoint, and `dsv3 export` it from any machine")
    arrays = {name: variable.get_value() for name, variable in variables_by_name(nnx.state(model)).items()}
    _check_layout(model.config, arrays)
    layers: dict[str, tuple[int, np.ndarray]] = {}  # each array's layer that was read last: a sharded one is gathered once
    reading = Lock()

    def read(s: Source) -> np.ndarray:
        array, (first, *rest) = arrays[s.array], s.full_index
        if not isinstance(first, int) or len(array.devices()) == 1:
            return s.to_tensor(np.asarray(array)[s.full_index])
        with reading:
            if s.array not in layers or layers[s.array][0] != first:
                layers[s.array] = first, np.asarray(jax.lax.dynamic_index_in_dim(array, first, keepdims=False))
            return s.to_tensor(layers[s.array][1][tuple(rest)])

    origin = {"from": "a model in memory (`dsv3_jax.save_hf`)", "format": f"`{format}`"}
    text = TextFiles() if tokenizer is None else _text_files(Path(tokenizer))
    return write_hf(directory, model.config, format, read, origin=origin, text=text, shard_bytes=shard_bytes)


def _text_files(tokenizer: Path) -> TextFiles:
    """A tokenizer with what belongs to it where it lies. That of a run says how the run began its documents."""
    of_run = RunDirectory(tokenizer.parent).checkpoints.is_dir()
    companions = beside(str(tokenizer))
    return TextFiles(tokenizer, companions if of_run else about_text(companions), trained=of_run)


def _check_layout(config: ModelConfig, arrays: Collection[str]) -> None:
    """Raise `UserError` if the model lacks an array that Hugging Face's layout has, such as the balancing bias of a router."""
    if absent := sorted({s.array for s in sources(config)} - {*arrays}):
        raise UserError(f"this model has no {absent[0]}, which Hugging Face's layout needs: it cannot be exported")


def _kept_tensors(checkpoint: Path) -> dict[str, np.ndarray]:
    """The scales of 8-bit weights that a checkpoint was imported with, and the values of some, by their names."""
    if not (checkpoint / SCALES).exists():
        return {}
    entries = read_header(checkpoint / SCALES)
    mapped = MappedFile(checkpoint / SCALES, entries)
    return {name: mapped.view(name) for name in entries}


def _reader(checkpoint: Path, config: ModelConfig, integers: Mapping[str, IntegerArray]) -> Read:
    """Reads a tensor from a checkpoint's arrays on disk."""
    stored, variables = StoredArrays(checkpoint), abstract_variables(config)
    opened: dict[str, Any] = {}

    def array(s: Source, field: str = "") -> Any:
        name = weight_name(s.array, variables[s.array]) + field
        if name not in opened:
            opened[name] = stored[name]
        return opened[name]

    def read(s: Source) -> Tensor:
        if integer := integers.get(s.array):
            fields = ("codes", "scale") if integer.format.symmetric else ("codes", "scale", "zero")
            parts = [array(s, f"/{field}")[s.integer_index].read() for field in fields]
            codes, scale, *zero = (part.result() for part in parts)
            outputs = len(s.region) - s.inputs
            weight = IntegerWeight(codes, scale, zero[0] if zero else None, integer.format, s.region[: s.inputs], outputs)
            return from_region(s, weight)
        # in the order of the tensor's axes, which is that of an imported chunk's bytes
        region = array(s)[s.full_index].transpose(tuple(np.argsort(s.order)))
        return s.from_split(region.read().result())

    return read


def export(run_or_checkpoint: str | Path, directory: str | Path, format: str, shard_bytes: float = SHARD_BYTES) -> Path:
    """Write a run's latest checkpoint, or the one at the path, as a Hugging Face checkpoint (see `save_hf`) or as GGUF.

    Formats besides those of `save_hf`: of a compressed checkpoint, with its integers, hf-w4 (compressed-tensors), hf-gptq and
    gguf; of any, gguf-f32, gguf-f16 and gguf-q8_0. A compressed checkpoint in a format without integers has their numbers.
    Weights are read from disk a tensor at a time, so that no device and little memory is needed, whatever mesh wrote them.
    Raises `UserError` as `write_hf`, `write_gguf` and `open_checkpoint`.
    """
    found = open_checkpoint(run_or_checkpoint)
    config = found.config.model
    _check_layout(config, abstract_variables(config))
    metadata = read_metadata(found.path)
    integers = integer_arrays(metadata, str(found.path))
    formats = {s.tensor: integers[s.array].format for s in sources(config) if s.array in integers}
    read = _reader(found.path, config, integers)
    imported = "hf_config" in metadata
    text = TextFiles(found.tokenizer_file(), found.companions(), trained=not imported)
    origin = origin_of_checkpoint(found, imported, format)
    if format in gguf_file.FORMATS:
        name = found.config.name
        return gguf_file.write_gguf(directory, config, format, read, origin=origin, text=text, formats=formats, name=name)
    before = Before(metadata.get("hf_layout"), _kept_tensors(found.path))
    return write_hf(
        directory, config, format, read, origin=origin, text=text, before=before, formats=formats, shard_bytes=shard_bytes
    )
