"""The formats of a checkpoint, which say each tensor's dtype, and how the tensors of one that was read differ from them."""

from collections.abc import Callable, Mapping
from typing import Any

from dsv3_jax.config import ModelConfig
from dsv3_jax.interop import fp8
from dsv3_jax.interop.hf_tensors import Source, copies, sources

INTEGER_FORMATS = ("hf-w4", "hf-gptq")  # of compressed checkpoints
FORMATS = ("hf-f32", "hf-bf16", "hf-fp8", *INTEGER_FORMATS)
# dtypes of what is neither in 8 bits nor in integers, in safetensors' names
_PLAIN = {"hf-f32": "F32"} | dict.fromkeys(FORMATS[1:], "BF16")
_SCALES = "F32"
_EMBEDDING = "model.embed_tokens.weight"


def usual_dtype(s: Source, format: str) -> str:
    """A tensor's dtype in a format, as released checkpoints have it."""
    if s.tensor.endswith("e_score_correction_bias"):
        return "F32"  # it decides between experts by small differences
    return "F8_E4M3" if format == "hf-fp8" and s.is_fp8 else _PLAIN[format]


def usual_dtypes(config: ModelConfig, format: str) -> dict[str, str]:
    """The dtypes of all tensors of a model in a format; a copy has that of what it repeats."""
    found = {s.tensor: usual_dtype(s, format) for s in sources(config)}
    return found | {copy.tensor: found[copy.of] for copy in copies(config)}


def describe_layout(config: ModelConfig, dtype_of: Callable[[str], str]) -> dict[str, Any] | None:
    """What an export needs to give a checkpoint's tensors their own dtypes back: its format, and which tensors differ from it.

    None for a checkpoint in no format that can be written, such as one in float16.
    """
    dtypes = {s.tensor: dtype_of(s.tensor) for s in sources(config)}
    plain = {"F32": "hf-f32", "BF16": "hf-bf16"}
    format = "hf-fp8" if "F8_E4M3" in dtypes.values() else plain.get(dtypes[_EMBEDDING])
    if format is None:
        return None
    dtypes = {name: "F32" if dtype == "F64" else dtype for name, dtype in dtypes.items()}  # no format has more than 32 bits
    usual = usual_dtypes(config, format)
    others = {name: dtype for name, dtype in dtypes.items() if dtype != usual[name]}
    scales = {dtype_of(name + fp8.SUFFIX) for name, dtype in dtypes.items() if dtype == "F8_E4M3"}
    return {"format": format, "others": others, "scales": _SCALES if _SCALES in scales else min(scales, default=_SCALES)}


def scale_dtype_to_write(layout: Mapping[str, Any] | None) -> str:
    """The dtype of new scales; `layout` as for `dtypes_to_write`, which in earlier versions' checkpoints does not say it."""
    return (layout or {}).get("scales", _SCALES)


def dtypes_to_write(config: ModelConfig, format: str, layout: Mapping[str, Any] | None) -> dict[str, str]:
    """The dtypes of all tensors of an export; `layout` is that of the checkpoint that the model was imported from."""
    found = usual_dtypes(config, format)
    if layout and layout["format"] == format:
        found |= {name: dtype for name, dtype in layout["others"].items() if name in found}
        found |= {copy.tensor: found[copy.of] for copy in copies(config)}
    return found
