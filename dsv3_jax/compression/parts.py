"""The parts of a model that a report tells apart, and what each takes in a compressed checkpoint."""

import math
from collections.abc import Mapping
from typing import Any

from dsv3_jax.checkpoint.integers import IntegerArray
from dsv3_jax.config import ModelConfig
from dsv3_jax.interop.arrays import abstract_variables
from dsv3_jax.interop.hf_formats import usual_dtype
from dsv3_jax.interop.hf_tensors import sources
from dsv3_jax.interop.safetensors_file import DTYPES

MTP = "MTP modules"
_BY_NAME = {  # how the name of an array in a block begins
    "ffn/router/": "routers",
    "ffn/shared/": "shared experts",
    "ffn/w_gate_up_ED2M": "routed experts",
    "ffn/w_down_EMD": "routed experts",
    "ffn/w_": "dense FFN",
    "attention/w_q_": "q",
    "attention/w_kv_": "kv",
    "attention/w_o_": "o",
}
PARTS = (*dict.fromkeys(("routed experts", *_BY_NAME.values())), MTP, "embedding", "head", "norms")


def part_of_weight(name: str) -> str:
    """The part to which an array of a block belongs, by its name there."""
    return next((part for beginning, part in _BY_NAME.items() if name.startswith(beginning)), "norms")


def part_of_array(name: str) -> str:
    """The part to which an array belongs, by its name in the model: all of an MTP module is one."""
    if name.startswith("mtp/"):
        return MTP
    single = {"embed_VD": "embedding", "head_DV": "head"}
    return single.get(name) or part_of_weight(name.split("/", 1)[1])


def sizes_by_part(
    original: ModelConfig, compressed: ModelConfig, integers: Mapping[str, IntegerArray]
) -> dict[str, dict[str, int]]:
    """{part: {"original": bytes in bfloat16, "compressed": bytes in the checkpoint}}, with what either model has."""
    before, after = _bytes(original, {}), _bytes(compressed, integers)
    return {part: {"original": before[part], "compressed": after.get(part, 0)} for part in PARTS if part in before}


def _bytes(config: ModelConfig, integers: Mapping[str, IntegerArray]) -> dict[str, int]:
    dtypes = {s.array: DTYPES[usual_dtype(s, "hf-bf16")] for s in sources(config)}
    found: dict[str, int] = {}
    for name, variable in abstract_variables(config).items():
        shape, part = variable.get_value().shape, part_of_array(name)
        size = _of_integers(integers[name], shape) if name in integers else math.prod(shape) * dtypes[name].itemsize
        found[part] = found.get(part, 0) + size
    return found


def _of_integers(array: IntegerArray, shape: tuple[int, ...]) -> int:
    weight = array.weight(shape)
    stored: list[Any] = [a for a in (weight.codes, weight.scale, weight.zero) if a is not None]
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in stored)
