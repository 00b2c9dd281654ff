"""Quantisation to 8 bits with a scale for each tile of 1 x 128 or block of 128 x 128 (arXiv 2412.19437, section 3.3.2)."""

from typing import Any, Literal

import jax
from jaxtyping import Array, Float

from pallas_kernels.quantize import hopper, reference, tpu
from pallas_kernels.scaled import Format, Scaled

Implementation = Literal["auto", "reference", "tpu", "hopper"]


def quantize(
    x_MK: Float[Array, "M K"],
    rows: Literal[1, 128],
    format: Format = "e4m3",
    power_of_two: bool = False,
    implementation: Implementation = "auto",
    interpret: Any = None,
) -> Scaled:
    """x as 8-bit values and float32 scales, the largest magnitude of each `rows` x 128 numbers becoming the format's largest.

    Tiles at the edges may be smaller. `power_of_two` rounds scales up to powers of two, so that scaling is exact. An
    infinity makes its tile NaN or saturated, never plausible numbers. "auto": kernels on TPU and CUDA (whose one is for
    Hopper; other NVIDIA GPUs refuse it when compiling), plain JAX elsewhere. `interpret` goes to the
    kernel that was asked for.
    """
    if implementation == "auto":
        return jax.lax.platform_dependent(
            x_MK,
            tpu=lambda x: tpu.quantize(x, rows, format, power_of_two),
            cuda=lambda x: hopper.quantize(x, rows, format, power_of_two),
            default=lambda x: reference.quantize(x, rows, format, power_of_two),
        )
    if implementation == "reference":
        return reference.quantize(x_MK, rows, format, power_of_two)
    kernel = {"tpu": tpu.quantize, "hopper": hopper.quantize}[implementation]
    return kernel(x_MK, rows, format, power_of_two, interpret)
