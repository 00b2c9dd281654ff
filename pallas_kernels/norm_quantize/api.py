"""RMSNorm whose result leaves the chip in 8 bits, and its gradient."""

from typing import Any

import jax
from jaxtyping import Array, Float

from pallas_kernels import registry
from pallas_kernels.norm_quantize import hopper, reference, tpu
from pallas_kernels.scaled import TILE, Format, Scaled

for _name, _module in (("reference", reference), ("tpu", tpu), ("hopper", hopper)):
    registry.register("rms_norm_quantize", _name, _module.rms_norm_quantize)
    registry.register("rms_norm_backward", _name, _module.rms_norm_backward)


def rms_norm_quantize(
    x_TD: Float[Array, "T D"],
    scale_D: Float[Array, " D"],
    eps: float,
    format: Format = "e4m3",
    power_of_two: bool = False,
    implementation: str = "auto",
    interpret: Any = None,
) -> tuple[Scaled, Float[Array, " T"]]:
    """(x / rms(x) * scale in tiles of 1 x 128, float32 1 / rms(x), which the gradient needs). Computed in float32.

    Implementations as in `quantize`; the kernels want D to be a multiple of 128, and "auto" takes plain JAX where it is not.
    """
    if implementation == "auto":
        if x_TD.shape[1] % TILE:
            return reference.rms_norm_quantize(x_TD, scale_D, eps, format, power_of_two)
        return jax.lax.platform_dependent(
            x_TD, scale_D,
            tpu=lambda x, scale: tpu.rms_norm_quantize(x, scale, eps, format, power_of_two),
            cuda=lambda x, scale: hopper.rms_norm_quantize(x, scale, eps, format, power_of_two),
            default=lambda x, scale: reference.rms_norm_quantize(x, scale, eps, format, power_of_two),
        )  # fmt: skip
    return registry.run("rms_norm_quantize", implementation, (x_TD, scale_D, eps, format, power_of_two), interpret)


def rms_norm_backward(
    x_TD: Float[Array, "T D"],
    scale_D: Float[Array, " D"],
    inverse_T: Float[Array, " T"],
    dy_TD: Float[Array, "T D"],
    implementation: str = "auto",
    interpret: Any = None,
) -> tuple[Float[Array, "T D"], Float[Array, " D"]]:
    """(dx in x's dtype, float32 dscale) from the gradient of the norm's result; `inverse_T` is 1 / rms(x)."""
    if implementation == "auto":
        if x_TD.shape[1] % TILE:
            return reference.rms_norm_backward(x_TD, scale_D, inverse_T, dy_TD)
        return jax.lax.platform_dependent(
            x_TD, scale_D, inverse_T, dy_TD,
            tpu=tpu.rms_norm_backward, cuda=hopper.rms_norm_backward, default=reference.rms_norm_backward,
        )  # fmt: skip
    return registry.run("rms_norm_backward", implementation, (x_TD, scale_D, inverse_T, dy_TD), interpret)
