"""GGUF, llama.cpp's file format: one file without the MTP module, which every llama.cpp loads, and one with it.

Formats: `gguf` has the integers of a compressed checkpoint, block by block, and float16 for embedding, head and other dense
matrices; `gguf-f32`, `gguf-f16` and `gguf-q8_0` have the numbers of any checkpoint. Norms, routers and their bias are float32.
`attn_k_b` is kv_b's part for keys transposed, across the groups of our integers: it is rounded again, to Q8_0.
"""

import hashlib
import math
import os
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import LlamaFileType

from dsv3_jax.config import ModelConfig
from dsv3_jax.interop import gguf_names
from dsv3_jax.interop.gguf_blocks import BLOCK, byte_shape, encode, type_of
from dsv3_jax.interop.gguf_names import Part
from dsv3_jax.interop.gguf_tokenizer import add_tokenizer
from dsv3_jax.interop.hf_card import model_card
from dsv3_jax.interop.hf_text import TextFiles
from dsv3_jax.interop.hf_writer import Read, new_directory
from dsv3_jax.interop.quantized import QuantizedTensor, Tensor, as_dense
from dsv3_jax.interop.quantized_modules import Formats, check_compressed
from dsv3_jax.progress import BytesProgress

_DENSE = {"gguf": Type.F16, "gguf-f32": Type.F32, "gguf-f16": Type.F16, "gguf-q8_0": Type.Q8_0}  # of matrices
FORMATS = tuple(_DENSE)
TRUNK, WITH_MTP = "model.gguf", "model-mtp.gguf"
_FILE_TYPES = {"gguf-f32": LlamaFileType.ALL_F32, "gguf-f16": LlamaFileType.MOSTLY_F16, "gguf-q8_0": LlamaFileType.MOSTLY_Q8_0}
_OF_INTEGERS = {
    Type.Q4_0: LlamaFileType.MOSTLY_Q4_0,
    Type.Q4_1: LlamaFileType.MOSTLY_Q4_1,
    Type.Q8_0: LlamaFileType.MOSTLY_Q8_0,
}


def tensor_type(part: Part, format: str, formats: Formats) -> Type:
    """The type of a tensor in a file of this format. Raises `UserError` for an integer format that GGUF has not."""
    if len(part.shape) == 1 or part.name.endswith("ffn_gate_inp.weight"):
        return Type.F32
    rows_fit = part.shape[-1] % BLOCK == 0
    its = formats.get(part.sources[0].tensor) if format == "gguf" else None
    if its is None:
        return Type.F16 if _DENSE[format] == Type.Q8_0 and not rows_fit else _DENSE[format]
    if part.kind == "keys":
        return Type.Q8_0 if rows_fit else Type.F16
    return type_of(its, part.sources[0].tensor, part.shape[-1])


def _heads(c: ModelConfig, tensor: Tensor, kind: str) -> Tensor:
    """The part of kv_b for keys, transposed, or for values."""
    H, N, U = c.num_attention_heads, c.qk_nope_head_dim, c.v_head_dim
    rows = np.arange(H * (N + U)).reshape(H, N + U)
    if kind == "keys":
        return as_dense(tensor).reshape(H, N + U, -1)[:, :N].swapaxes(1, 2)
    values = rows[:, N:].reshape(-1)
    return tensor.rows(values) if isinstance(tensor, QuantizedTensor) else tensor[values]


def _bytes(c: ModelConfig, part: Part, type: Type, read: Read) -> np.ndarray:
    """u8: a tensor as the file has it."""
    out = np.empty(byte_shape(part.shape, type), np.uint8)
    if part.kind == "experts":
        for expert, s in zip(out, part.sources, strict=True):
            expert[...] = encode(read(s), type)
        return out
    tensor = read(part.sources[0])
    if part.kind != "plain":
        tensor = _heads(c, tensor, part.kind)
    return encode(tensor, type).reshape(out.shape)


def _file_type(types: Mapping[str, Type], parts: list[Part], format: str) -> LlamaFileType:
    """The type that most numbers have."""
    if format != "gguf":
        return _FILE_TYPES[format]
    sizes: dict[Type, int] = {}
    for part in parts:
        sizes[types[part.name]] = sizes.get(types[part.name], 0) + math.prod(part.shape)
    return _OF_INTEGERS[max(sizes.keys() & _OF_INTEGERS.keys(), key=sizes.__getitem__)]


def _write_file(
    path: Path, c: ModelConfig, format: str, read: Read, formats: Formats, text: TextFiles, mtp: bool, name: str
) -> tuple[int, str]:
    """Write one file; returns the bytes of its tensors and its sha256."""
    parts = list(gguf_names.parts(c, mtp))
    types = {part.name: tensor_type(part, format, formats) for part in parts}
    writer = gguf.GGUFWriter(path, gguf_names.ARCHITECTURE)
    writer.add_name(name)
    writer.add_file_type(_file_type(types, parts, format))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    gguf_names.add_header(writer, c, mtp)
    add_tokenizer(writer, text, c.vocab_size)
    sizes = {part.name: math.prod(byte_shape(part.shape, types[part.name])) for part in parts}
    for part in parts:
        writer.add_tensor_info(part.name, part.shape, np.dtype(np.float32), sizes[part.name], types[part.name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with BytesProgress(f"export {path.name}", sum(sizes.values())) as progress:
        for part in parts:
            writer.write_tensor_data(_bytes(c, part, types[part.name], read))
            progress.advance(sizes[part.name])
    writer.close()
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return sum(sizes.values()), hashlib.file_digest(file, "sha256").hexdigest()


def write_gguf(
    target: str | Path, config: ModelConfig, format: str, read: Read, *, origin: Mapping[str, str], text: TextFiles,
    formats: Formats, name: str,
) -> Path:  # fmt: skip
    """Write a directory with the file without MTP, the one with it where there is a module, and the model card.

    `read`, `origin`, `text` and `formats` are those of `write_hf`; `name` is what llama.cpp shows. Raises `UserError` for what
    llama.cpp does not take or would compute otherwise, and a target that exists.
    """
    gguf_names.check(config)
    if format == "gguf":
        check_compressed(formats, format)
    mtp = config.num_nextn_predict_layers > 0
    if mtp:
        gguf_names.check_mtp(config)
    for part in gguf_names.parts(config, mtp):
        tensor_type(part, format, formats)
    with new_directory(Path(target)) as directory:
        found = {}
        for file, has_mtp in ((TRUNK, False), *([(WITH_MTP, True)] if mtp else [])):
            found[file] = _write_file(directory / file, config, format, read, formats, text, has_mtp, name)
        digests = {file: digest for file, (_, digest) in found.items()}
        (directory / "README.md").write_text(model_card(config, format, found[TRUNK][0], digests, origin))
    return Path(target)
