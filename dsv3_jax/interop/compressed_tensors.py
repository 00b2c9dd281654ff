"""`hf-w4`: compressed-tensors' layout "pack-quantized", which transformers, vLLM and SGLang load.

Of a weight X [out, in] the file has `X_packed`, i32[out, in * bits / 32], codes of 8 or 4 bits with the first in the lowest;
`X_scale`, f16[out, in / group]; `X_shape`, i64[2]; and of one that is not symmetric `X_zero_point`, packed along the outputs,
i32[out * bits / 32, in / group].
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import UserError
from dsv3_jax.interop.hf_tensors import Source, sources
from dsv3_jax.interop.quantized import QuantizedTensor, Tensor, nibbles
from dsv3_jax.interop.quantized_modules import Formats, check_compressed, check_heads, described, group_size, patterns
from pallas_kernels.integer_weight import IntegerFormat

_BITS, _GROUPS = (4, 8), (-1, 32, 64, 128)
_SCALE = np.dtype(np.float16)
# what vLLM computes as one product, which has to have one scheme
_FUSED = {"kv_a_proj_with_mqa": "q_a_proj"}


def check(config: ModelConfig, formats: Formats) -> None:
    """Raise `UserError` for a format that vLLM, transformers or compressed-tensors does not load."""
    check_compressed(formats, "hf-w4")
    check_heads(config, formats, "vLLM")
    for s in sources(config):
        if s.tensor in formats:
            _check_format(s, formats[s.tensor])
            _check_fused(config, s, formats)
    _check_experts([s for s in sources(config) if ".experts." in s.tensor], formats)


def _check_format(s: Source, format: IntegerFormat) -> None:
    which = f"{s.tensor} has {described(format)}"
    if format.bits not in _BITS:
        raise UserError(f"{which}; hf-w4 takes 4 or 8 bits, as vLLM does; export hf-gptq or gguf")
    if group_size(format, s.shape[1]) not in _GROUPS:
        raise UserError(f"{which}; hf-w4 takes groups of 32, 64, 128 or all {s.shape[1]} inputs, as vLLM's kernels do")


def _check_fused(config: ModelConfig, s: Source, formats: Formats) -> None:
    for name, partner in _FUSED.items():
        other = s.tensor.replace(name, partner)
        if name in s.tensor and config.q_lora_rank is not None and formats.get(other) != formats[s.tensor]:
            its = described(formats[other]) if other in formats else "16 bits"
            which = f"{s.tensor} has {described(formats[s.tensor])} and {other} {its}"
            raise UserError(f"{which}; vLLM computes both as one product, which has one format")


def _check_experts(experts: list[Source], formats: Formats) -> None:
    first: Source | None = None
    for s in experts:
        if (format := formats.get(s.tensor)) is None:
            raise UserError(f"{s.tensor} is in 16 bits, others in integers; transformers loads no experts like that")
        which = f"{s.tensor} has {described(format)}"
        if not format.symmetric:
            raise UserError(f"{which}; hf-w4 takes symmetric experts only, as vLLM does; export hf-gptq or gguf")
        first = first or s
        its = formats[first.tensor]
        if (format.bits, group_size(format, s.shape[1])) != (its.bits, group_size(its, first.shape[1])):
            raise UserError(
                f"{first.tensor} has {described(its)}, and {which}; transformers and vLLM take one format for all experts: "
                "compress with a group that divides the inputs of all of them, such as experts.group=32"
            )


@dataclass(frozen=True)
class Packed:
    """A weight in this layout."""

    name: str
    source: Source
    format: IntegerFormat

    @property
    def tensors(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """(dtype, shape) by name in the file."""
        outputs, inputs = self.source.shape
        groups, per_word = inputs // self.format.group, 32 // self.format.bits
        found = {
            "_packed": (np.dtype(np.int32), (outputs, math.ceil(inputs / per_word))), "_scale": (_SCALE, (outputs, groups)),
            "_shape": (np.dtype(np.int64), (2,)),
        }  # fmt: skip
        if not self.format.symmetric:
            found["_zero_point"] = np.dtype(np.int32), (math.ceil(outputs / per_word), groups)
        return {self.name + suffix: kind for suffix, kind in found.items()}

    def encode(self, tensor: Tensor) -> dict[str, np.ndarray]:
        assert isinstance(tensor, QuantizedTensor)
        found = {
            "_packed": nibbles(tensor.codes, self.format.bits), "_scale": tensor.scale,
            "_shape": np.array(tensor.shape, np.int64),
        }  # fmt: skip
        if tensor.zero is not None:
            found["_zero_point"] = np.ascontiguousarray(nibbles(tensor.zero.T, self.format.bits).T)
        return {self.name + suffix: part for suffix, part in found.items()}


def _weights(bits: int, group: int, symmetric: bool) -> dict[str, Any]:
    strategy = {"strategy": "channel"} if group == -1 else {"strategy": "group", "group_size": group}
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False, "actorder": None, **strategy}


def quantization_config(config: ModelConfig, formats: Formats) -> dict[str, Any]:
    """config.json's entry: groups of modules by format, and those that stay dense.

    The experts' group comes first and is the one that names experts, because transformers takes the first such one for them.
    The format that most other modules have is that of the class "Linear", which counts where no name matches.
    """
    found = patterns(config, formats)
    dense = found.pop(None, [])
    targets = [(scheme, ["Linear"]) for scheme in found]
    if len(found) > 1:
        experts = next(scheme for scheme, names in found.items() if any(map(_names_experts, names)))
        rest = {scheme: [name for name in names if not _names_experts(name)] for scheme, names in found.items()}
        usual = max(rest, key=lambda scheme: len(rest[scheme]))
        named = [(scheme, _regexes(names)) for scheme, names in rest.items() if names and scheme != usual]
        targets = [(experts, _regexes(filter(_names_experts, found[experts]))), (usual, ["Linear"]), *named]
    schemes = [
        {
            "targets": names, "weights": _weights(*scheme), "input_activations": None, "output_activations": None,
            "format": "pack-quantized",
        }
        for scheme, names in targets if scheme is not None
    ]  # fmt: skip
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": {f"group_{i}": scheme for i, scheme in enumerate(schemes)},
        "ignore": _regexes(dense), "kv_cache_scheme": None, "global_compression_ratio": None,
    }  # fmt: skip


def _names_experts(pattern: str) -> bool:
    return r"\.experts\." in pattern


def _regexes(names: Iterable[str]) -> list[str]:
    return [f"re:{name}$" for name in names]
