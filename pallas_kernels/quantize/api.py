"""Quantisation to 8 bits with a scale for each tile of 1 x 128 or block of 128 x 128 (arXiv 2412.19437, section 3.3.2)."""

from typing import Any, Literal

from jaxtyping import Array, Float

from pallas_kernels import registry
from pallas_kernels.quantize import hopper, reference, tpu
from pallas_kernels.scaled import Format, Scaled

for _name, _module in (("reference", reference), ("xla", reference), ("tpu", tpu), ("hopper", hopper)):
    registry.register("quantize", _name, _module.quantize)
    registry.register("quantize_transposed", _name, _module.quantize_transposed)


def quantize(
    x_MK: Float[Array, "M K"],
    rows: Literal[1, 128],
    format: Format = "e4m3",
    power_of_two: bool = False,
    implementation: str = "auto",
    interpret: Any = None,
) -> Scaled:
    """x as 8-bit values and float32 scales, the largest magnitude of each `rows` x 128 numbers becoming the format's largest.

    Tiles at the edges may be smaller. `power_of_two` rounds scales up to powers of two, so that scaling is exact. An
    infinity makes its tile NaN or saturated, never plausible numbers. Implementations as in `registry`; `xla` is the
    definition.
    """
    return registry.run("quantize", implementation, (x_MK, rows, format, power_of_two), interpret)


def quantize_transposed(
    x: Float[Array, "M K"] | Scaled,
    format: Format = "e4m3",
    power_of_two: bool = False,
    implementation: str = "auto",
    interpret: Any = None,
) -> Scaled:
    """x^T, [K, M], with a scale for each 128 numbers along M: what the weights' gradient sums over, tokens.

    `x` may be 8 bits already, whose scales then change from 1 x 128 to 128 x 1 in one pass. Otherwise as `quantize`.
    """
    return registry.run("quantize_transposed", implementation, (x, format, power_of_two), interpret)
