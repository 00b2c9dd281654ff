"""`hf-gptq`: the layout of GPTQ's tools, which gptqmodel and vLLM load.

Of a weight X [out, in] the file has `X.qweight`, i32[in * bits / 32, out], codes with the first in the lowest bits; `X.scales`,
f16[in / group, out]; `X.qzeros`, i32[in / group, out * bits / 32]; and `X.g_idx`, i32[in], the group of each input. The first
version of the layout stores zeros less one, and cannot store a zero of 0: where groups have zeros of their own, it is the
second, which stores them as they are.
"""

import math
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import UserError
from dsv3_jax.interop.hf_tensors import Source, sources
from dsv3_jax.interop.quantized import QuantizedTensor, Tensor, nibbles
from dsv3_jax.interop.quantized_modules import Formats, check_compressed, check_heads, described, group_size, patterns
from pallas_kernels.integer_weight import IntegerFormat

_GROUPS = (-1, 32, 64, 128)
_I32 = np.dtype(np.int32)
# what vLLM computes as one product, and asks for under another name
_FUSED = {
    "q_a_proj": "(?:q_a_proj|fused_qkv_a_proj)", "kv_a_proj_with_mqa": "(?:kv_a_proj_with_mqa|fused_qkv_a_proj)",
    "gate_proj": "(?:gate_proj|gate_up_proj)", "up_proj": "(?:up_proj|gate_up_proj)",
}  # fmt: skip


def check(config: ModelConfig, formats: Formats) -> None:
    """Raise `UserError` for a format that gptqmodel does not load."""
    check_compressed(formats, "hf-gptq")
    check_heads(config, formats, "gptqmodel")
    for s in sources(config):
        format = formats.get(s.tensor)
        if format is None:
            continue
        outputs, inputs = s.shape
        which = f"{s.tensor} has {described(format)}"
        if group_size(format, inputs) not in _GROUPS:
            raise UserError(f"{which}; hf-gptq takes groups of 32, 64, 128 or all {inputs} inputs, as gptqmodel does")
        per_word = 32 // format.bits
        if inputs % per_word or outputs % per_word:
            raise UserError(f"{which} and shape {outputs} x {inputs}; gptqmodel wants both to be multiples of {per_word}")


@dataclass(frozen=True)
class Packed:
    """A weight in this layout."""

    name: str
    source: Source
    format: IntegerFormat
    zero_less: int  # 1 in the layout's first version, 0 in its second

    @property
    def _module(self) -> str:
        return self.name.removesuffix("weight")

    @property
    def tensors(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """(dtype, shape) by name in the file."""
        outputs, inputs = self.source.shape
        groups, per_word = inputs // self.format.group, 32 // self.format.bits
        found = {
            "qweight": (_I32, (inputs // per_word, outputs)), "qzeros": (_I32, (groups, outputs // per_word)),
            "scales": (np.dtype(np.float16), (groups, outputs)), "g_idx": (_I32, (inputs,)),
        }  # fmt: skip
        return {self._module + name: kind for name, kind in found.items()}

    def encode(self, tensor: Tensor) -> dict[str, np.ndarray]:
        assert isinstance(tensor, QuantizedTensor)
        bits, group = self.format.bits, self.format.group
        found = {
            "qweight": np.ascontiguousarray(nibbles(tensor.codes, bits).T),
            "qzeros": nibbles(tensor.zeros.T - np.uint8(self.zero_less), bits),
            "scales": np.ascontiguousarray(tensor.scale.T),
            "g_idx": np.arange(tensor.shape[1], dtype=np.int32) // np.int32(group),
        }
        return {self._module + name: part for name, part in found.items()}


def is_first_version(formats: Formats) -> bool:
    """Whether all zeros are those of symmetric formats."""
    return all(format.symmetric for format in formats.values())


def _fields(bits: int, group: int, symmetric: bool) -> dict[str, Any]:
    return {"bits": bits, "group_size": group, "sym": symmetric}


def quantization_config(config: ModelConfig, formats: Formats) -> dict[str, Any]:
    """config.json's entry, and the content of quantize_config.json: the format that most modules have, and who differs."""
    found = patterns(config, formats)
    counts: dict[tuple[int, int, bool], int] = {}
    for s in sources(config):
        if format := formats.get(s.tensor):
            scheme = format.bits, group_size(format, s.shape[1]), format.symmetric
            counts[scheme] = counts.get(scheme, 0) + math.prod(s.shape)
    usual = max(counts, key=counts.__getitem__)
    dynamic: dict[str, dict[str, Any]] = {}
    for scheme, of_scheme in found.items():
        for pattern in of_scheme if scheme != usual else []:
            *before, name = pattern.split(r"\.")
            named = r"\.".join([*before, _FUSED.get(name, name)]) + "$"
            if scheme is None:
                dynamic[f"-:{named}"] = {}
            else:
                dynamic[f"+:{named}"] = _fields(*scheme)
    return {
        "quant_method": "gptq", "checkpoint_format": "gptq" if is_first_version(formats) else "gptq_v2", **_fields(*usual),
        "desc_act": False, "lm_head": False, "pack_dtype": "int32", "dynamic": dynamic,
        "meta": {"quantizer": [f"dsv3_jax:{version('dsv3-jax')}"]},
    }  # fmt: skip
