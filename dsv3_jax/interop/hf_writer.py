"""A Hugging Face checkpoint's directory: safetensors in shards with their index, config, tokenizer files and model card.

A directory appears complete or not at all: everything is written beside it, config.json last, and renamed.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple, Protocol

import numpy as np

from dsv3_jax.checkpoint.scratch import claim
from dsv3_jax.config import ModelConfig
from dsv3_jax.data.companions import CONFIG
from dsv3_jax.data.companions import fields as companion_fields
from dsv3_jax.errors import UserError
from dsv3_jax.interop import compressed_tensors, fp8, gptq_layout
from dsv3_jax.interop.hf_card import model_card
from dsv3_jax.interop.hf_config import hf_config
from dsv3_jax.interop.hf_directory import INDEX, SINGLE
from dsv3_jax.interop.hf_formats import FORMATS, INTEGER_FORMATS, dtypes_to_write, scale_dtype_to_write
from dsv3_jax.interop.hf_tensors import Source, copies, sources
from dsv3_jax.interop.hf_text import TextFiles
from dsv3_jax.interop.quantized import Tensor, as_dense
from dsv3_jax.interop.quantized_modules import Formats
from dsv3_jax.interop.safetensors_file import DTYPES, write_safetensors
from dsv3_jax.progress import BytesProgress

SHARD_BYTES = 5 * 10**9
_THREADS = 3  # each reads and writes a shard
_F32 = DTYPES["F32"]
_INTEGER_LAYOUTS = {"hf-w4": compressed_tensors, "hf-gptq": gptq_layout}

type Read = Callable[[Source], Tensor]  # a source's tensor in Hugging Face's layout; called from several threads


@dataclass(frozen=True)
class Before:
    """What an imported checkpoint keeps of the tensors that it came as, and a run that began with it of their dtypes."""

    layout: Mapping[str, Any] | None  # see `describe_layout`
    tensors: Mapping[str, np.ndarray]  # scales of its 8-bit weights, and the values of those that would be lost, by name


class Output(Protocol):
    """A tensor to write, which may be several of the file's."""

    @property
    def source(self) -> Source: ...
    @property
    def tensors(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """(dtype, shape) by name in the file."""
        ...

    def encode(self, tensor: Tensor) -> dict[str, np.ndarray]:
        """What `tensors` describes, by name, from what is read at `source`."""
        ...


@dataclass(frozen=True)
class _Dense:
    """One in floating point. One in 8 bits is two of the file's tensors: its values and, after them, its scales."""

    name: str
    source: Source
    dtype: np.dtype
    scale_dtype: np.dtype
    power_of_two: bool  # new scales
    scales: np.ndarray | None  # that an imported weight in 8 bits had
    values: np.ndarray | None  # likewise, where they are kept

    @property
    def tensors(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """(dtype, shape) by name in the file."""
        found = {self.name: (self.dtype, self.source.shape)}
        if self.dtype == fp8.VALUES:
            found[self.name + fp8.SUFFIX] = self.scale_dtype, fp8.scale_shape(self.source.shape)
        return found

    def encode(self, tensor: Tensor) -> dict[str, np.ndarray]:
        tensor = as_dense(tensor)
        if self.dtype != fp8.VALUES:
            return {self.name: tensor.astype(self.dtype, copy=False)}
        values, scales = fp8.quantize(tensor, self.scales, self.power_of_two or self.scale_dtype != _F32, self.values)
        return {self.name: values, self.name + fp8.SUFFIX: scales.astype(self.scale_dtype, copy=False)}


def _quantization(its_config: Mapping[str, Any], before: Before | None) -> dict[str, Any]:
    """What is kept of an earlier config.json's quantization_config: all of it where the same tensors are in 8 bits again."""
    found = its_config.get("quantization_config")
    if not isinstance(found, dict):
        return {}
    if before is not None and before.layout and before.layout["format"] == "hf-fp8":
        return found
    return {"scale_fmt": found["scale_fmt"]} if found.get("scale_fmt") else {}


def _size(output: Output) -> int:
    """In bytes."""
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in output.tensors.values())


def _integer(name: str, source: Source, format: str, formats: Formats) -> Output:
    """A weight in the layout of one of `INTEGER_FORMATS`."""
    if format == "hf-w4":
        return compressed_tensors.Packed(name, source, formats[name])
    return gptq_layout.Packed(name, source, formats[name], int(gptq_layout.is_first_version(formats)))


def _outputs(config: ModelConfig, format: str, before: Before | None, power_of_two: bool, formats: Formats) -> list[Output]:
    layout = before.layout if before else None
    dtypes, scale_dtype = dtypes_to_write(config, format, layout), DTYPES[scale_dtype_to_write(layout)]
    kept = before.tensors if before else {}
    of_source = {s.tensor: s for s in sources(config)}
    for copy in copies(config):
        if not copy.tensor.startswith("lm_head"):  # transformers ties it by itself, and would call a copy unexpected
            of_source[copy.tensor] = of_source[copy.of]

    def output(name: str, s: Source) -> Output:
        if format in INTEGER_FORMATS and name in formats:
            return _integer(name, s, format, formats)
        scales = kept.get(name + fp8.SUFFIX)
        its_scale_dtype = scale_dtype if scales is None else scales.dtype
        return _Dense(name, s, DTYPES[dtypes[name]], its_scale_dtype, power_of_two, scales, kept.get(name))

    return [output(name, s) for name, s in of_source.items()]


def _shards(outputs: list[Output], shard_bytes: float) -> list[list[Output]]:
    """The outputs in order, cut into shards of at most `shard_bytes`, or of a single tensor."""
    found: list[list[Output]] = [[]]
    size = 0
    for output in outputs:
        if found[-1] and size + _size(output) > shard_bytes:
            found.append([])
            size = 0
        found[-1].append(output)
        size += _size(output)
    return found


@contextlib.contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A scratch directory beside `target`, renamed to it at the end, or removed if something fails."""
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
    bytes: int  # of all tensors
    sha256: dict[str, str]  # by file name


def _write_shard(path: Path, shard: list[Output], read: Read, progress: BytesProgress) -> str:
    """Write one file; returns its sha256."""
    waiting: dict[str, np.ndarray] = {}  # scales, which are made with their weight and come after it
    outputs = {next(iter(output.tensors)): output for output in shard}

    def make(name: str) -> np.ndarray:
        if name in outputs:
            waiting.update(outputs[name].encode(read(outputs[name].source)))
            progress.advance(_size(outputs[name]))
        return waiting.pop(name)

    parts = {name: part for output in shard for name, part in output.tensors.items()}
    return write_safetensors(path, parts, make)[1]


@contextlib.contextmanager
def _until_a_failure(read: Read) -> Iterator[Read]:
    """`read`, which refuses once the thread that waits for the writing ones has an error or was interrupted.

    They end with their tensor, where they would write all of their shard before the program could end.
    """
    failed = Event()

    def read_on(source: Source) -> Tensor:
        if failed.is_set():
            raise CancelledError
        return read(source)

    try:
        yield read_on
    except BaseException:
        failed.set()
        raise


def _write_tensors(directory: Path, outputs: list[Output], read: Read, shard_bytes: float) -> _Written:
    """Write the shards and, if there are several, their index."""
    shards = _shards(outputs, shard_bytes)
    total = sum(_size(output) for shard in shards for output in shard)
    count = len(shards)
    names = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    with (
        BytesProgress("export", total) as progress, ThreadPoolExecutor(_THREADS) as pool, _until_a_failure(read) as read_on
    ):  # fmt: skip
        write = partial(_write_shard, read=read_on, progress=progress)
        digests = list(pool.map(write, [directory / name for name in names], shards))
    if count > 1:
        weight_map = {part: name for name, shard in zip(names, shards, strict=True) for out in shard for part in out.tensors}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return _Written(total, dict(zip(names, digests, strict=True)))


def write_hf(
    target: str | Path,
    config: ModelConfig,
    format: str,
    read: Read,
    *,
    origin: Mapping[str, str],
    text: TextFiles,
    before: Before | None = None,
    formats: Formats | None = None,
    shard_bytes: float = SHARD_BYTES,
) -> Path:
    """Write a checkpoint's directory: shards, index, config, the files about text, model card.

    `origin` goes into the card; `before` is for what an imported checkpoint had; `formats` are those of the tensors that `read`
    gives as integers. Raises `UserError` for an unknown format, one that clients do not take of these integers, a shard size
    that is not positive, and a target that exists.
    """
    formats = formats or {}
    if format not in FORMATS:
        raise UserError(f"format {format!r} is unknown; use one of {', '.join(FORMATS)}")
    if not shard_bytes > 0:  # nor is NaN
        raise UserError(f"shard size {shard_bytes} must be positive")
    if format in INTEGER_FORMATS:
        _INTEGER_LAYOUTS[format].check(config, formats)
    with new_directory(Path(target)) as directory:
        ids = text.write(directory, config)
        its_config = companion_fields(text.companions, CONFIG)
        quantization = _quantization(its_config, before)
        outputs = _outputs(config, format, before, quantization.get("scale_fmt") == fp8.POWERS_OF_TWO, formats)
        written = _write_tensors(directory, outputs, read, shard_bytes)
        fields = ids | hf_config(config, its_config)
        fields["dtype"] = "float32" if format == "hf-f32" else "bfloat16"
        fields |= {"torch_dtype": fields["dtype"]}  # what clients older than transformers 5 read
        if format == "hf-fp8":
            fields["quantization_config"] = fp8.QUANTIZATION_CONFIG | quantization
        if format in INTEGER_FORMATS:
            fields["quantization_config"] = _INTEGER_LAYOUTS[format].quantization_config(config, formats)
        if format == "hf-gptq":  # where GPTQ's tools look for it
            (directory / "quantize_config.json").write_text(json.dumps(fields["quantization_config"], indent=2) + "\n")
        (directory / "README.md").write_text(model_card(config, format, written.bytes, written.sha256, origin))
        (directory / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    return Path(target)
