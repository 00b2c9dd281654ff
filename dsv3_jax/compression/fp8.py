"""The profile `fp8`: linear layers in DeepSeek's block-FP8, with scales that are powers of two.

A checkpoint keeps them in bfloat16, which holds such numbers exactly, with the scales beside, by which an export in `hf-fp8`
gets the same 8 bits. Values are rounded to nearest: with 4 significant bits there is little that inputs could decide.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3_jax.compression.blocks import Place
from dsv3_jax.compression.profile import E4M3, Profile
from dsv3_jax.config import ModelConfig
from dsv3_jax.interop import fp8
from dsv3_jax.interop.hf_tensors import sources
from dsv3_jax.model.names import variables_by_name


def round_to_fp8(module: Any, place: Place, config: ModelConfig, profile: Profile) -> dict[str, np.ndarray]:
    """Round what a profile has in 8-bit floats of a block or MTP module, in place.

    Returns the scales, f32[outputs / 128, inputs / 128] by their names in Hugging Face's layout.
    """
    if E4M3 not in (profile.linears, profile.experts):
        return {}
    scales: dict[str, np.ndarray] = {}
    arrays: dict[str, np.ndarray] = {}
    variables = variables_by_name(nnx.state(module))
    for s in sources(config):
        in_block = s.array.startswith(place.prefix) and s.full_index[: len(place.lead)] == place.lead
        if not (in_block and s.is_fp8 and profile.format_of(s.array) == E4M3):
            continue
        name, index = s.array.removeprefix(place.prefix), s.full_index[len(place.lead) :]
        if name not in arrays:
            arrays[name] = np.array(variables[name].get_value())
        values, scale = fp8.quantize(s.to_tensor(arrays[name][index]), power_of_two=True)
        arrays[name][index] = s.to_region(fp8.dequantize(values, scale))
        scales[s.tensor + fp8.SUFFIX] = scale
    for name, array in arrays.items():
        variables[name].set_value(jnp.asarray(array))
    return scales
