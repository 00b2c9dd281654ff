"""Integer weights read back from exports, by the formulas of their formats: codes, scales and zero points by tensor."""

from pathlib import Path

import gguf
import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.interop import gguf_names
from dsv3_jax.interop.hf_tensors import copies
from dsv3_jax.interop.quantized import QuantizedTensor
from dsv3_jax.interop.safetensors_file import MappedFile, read_header
from pallas_kernels.integer_weight import IntegerFormat


def tensors_of(directory: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder's safetensors."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        entries = read_header(file)
        mapped = MappedFile(file, entries)
        found |= {name: mapped.view(name) for name in entries}
    return found


def _unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    parts = (np.ascontiguousarray(words).view(np.uint32)[..., None] >> np.arange(0, 32, bits, dtype=np.uint32)) & (2**bits - 1)
    return parts.reshape(*words.shape[:-1], -1).astype(np.uint8)


def of_hf_w4(directory: Path) -> dict[str, QuantizedTensor]:
    tensors, found = tensors_of(directory), {}
    for name in (n.removesuffix("_packed") for n in tensors if n.endswith(".weight_packed")):
        outputs, inputs = (int(n) for n in tensors[f"{name}_shape"])
        packed, scale = tensors[f"{name}_packed"], tensors[f"{name}_scale"]
        bits = 32 * packed.shape[1] // inputs
        zero = None
        if (points := tensors.get(f"{name}_zero_point")) is not None:
            zero = _unpacked(points.T, bits).T[:outputs]
        format = IntegerFormat(bits, inputs // scale.shape[1], zero is None)
        found[name] = QuantizedTensor(_unpacked(packed, bits)[:, :inputs], scale, zero, format)
    return found


def of_hf_gptq(directory: Path, less: int) -> dict[str, QuantizedTensor]:
    """`less`: 1 for the layout's first version."""
    tensors, found = tensors_of(directory), {}
    for module in (n.removesuffix("qweight") for n in tensors if n.endswith(".qweight")):
        words, scales = tensors[f"{module}qweight"], tensors[f"{module}scales"]
        inputs = len(tensors[f"{module}g_idx"])
        bits = 32 * words.shape[0] // inputs
        zero = _unpacked(tensors[f"{module}qzeros"], bits).T + np.uint8(less)
        symmetric = bool((zero == 2 ** (bits - 1)).all())
        format = IntegerFormat(bits, inputs // scales.shape[0], symmetric)
        codes = _unpacked(words.T, bits)
        found[f"{module}weight"] = QuantizedTensor(codes, scales.T, None if symmetric else zero, format)
    return found


def _blocks(data: np.ndarray, type: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes u8[..., n] and scales f16[..., n / 32] of a tensor's bytes."""
    size, codes_at = {"Q4_0": (18, 2), "Q4_1": (20, 4), "Q8_0": (34, 2)}[type]
    blocks = data.reshape(*data.shape[:-1], -1, size)
    scale = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
    codes = blocks[..., codes_at:]
    codes = codes + np.uint8(128) if type == "Q8_0" else np.concatenate([codes & 15, codes >> 4], axis=-1)
    return codes.reshape(*data.shape[:-1], -1), scale


def of_gguf(file: Path, config: ModelConfig) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Codes and scales of tensors by Hugging Face's names; of kv_b those of the values' rows alone."""
    stored = {t.name: t for t in gguf.GGUFReader(file).tensors}
    found = {}
    for part in gguf_names.parts(config, "nextn" in " ".join(stored)):
        t = stored[part.name]
        if part.kind == "keys" or t.tensor_type.name not in ("Q4_0", "Q4_1", "Q8_0"):
            continue
        codes, scale = _blocks(t.data, t.tensor_type.name)
        if part.kind == "experts":
            found |= {s.tensor: (codes[e], scale[e]) for e, s in enumerate(part.sources)}
        else:
            found[part.sources[0].tensor] = codes.reshape(-1, codes.shape[-1]), scale.reshape(-1, scale.shape[-1])
    return found


def numbers_of_gguf(file: Path, config: ModelConfig, others: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every tensor by Hugging Face's name as gguf's own dequantiser has it; what a file lacks is that of `others`."""
    stored = {t.name: t for t in gguf.GGUFReader(file).tensors}
    found, H = dict(others), config.num_attention_heads
    for part in gguf_names.parts(config, "nextn" in " ".join(stored)):
        t, s = stored[part.name], part.sources[0]
        numbers = gguf.dequantize(t.data, t.tensor_type).astype(np.float32)
        if part.kind == "experts":
            found |= {expert.tensor: numbers[e] for e, expert in enumerate(part.sources)}
        elif part.kind == "plain":
            found[s.tensor] = numbers.reshape(s.shape)
        else:
            kv_b = np.array(found[s.tensor]).reshape(H, config.qk_nope_head_dim + config.v_head_dim, config.kv_lora_rank)
            at = np.s_[:, : config.qk_nope_head_dim] if part.kind == "keys" else np.s_[:, config.qk_nope_head_dim :]
            kv_b[at] = numbers.swapaxes(1, 2) if part.kind == "keys" else numbers
            found[s.tensor] = kv_b.reshape(s.shape)
    return found | {copy.tensor: found[copy.of] for copy in copies(config) if copy.tensor in found}
