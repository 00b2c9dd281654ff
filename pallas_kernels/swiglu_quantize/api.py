"""SwiGLU whose result leaves the chip in 8 bits, and its gradient (arXiv 2412.19437, section 3.3.3)."""

from typing import Any

import jax
from jaxtyping import Array, Float

from pallas_kernels import registry
from pallas_kernels.scaled import TILE, Format, Scaled
from pallas_kernels.swiglu_quantize import hopper, reference, tpu

for _name, _module in (("reference", reference), ("tpu", tpu), ("hopper", hopper)):
    registry.register("swiglu_quantize", _name, _module.swiglu_quantize)
    registry.register("swiglu_backward", _name, _module.swiglu_backward)


def swiglu_quantize(
    gate_up_TX: Float[Array, "T 2*F"],
    format: Format = "e4m3",
    power_of_two: bool = False,
    implementation: str = "auto",
    interpret: Any = None,
) -> tuple[Scaled, Scaled]:
    """(silu(gate) * up, [gate, up]), both in tiles of 1 x 128: what the next product takes, and what the backward pass keeps.

    Computed in float32 in one pass over the input. Implementations as in `quantize`; the kernels want F to be a multiple of
    128, and TPU's at most `tpu.LARGEST`, because it holds whole rows: "auto" takes plain JAX where they don't.
    """
    if implementation == "auto":
        if gate_up_TX.shape[1] % (2 * TILE):
            return reference.swiglu_quantize(gate_up_TX, format, power_of_two)
        of_tpu = tpu if gate_up_TX.shape[1] <= 2 * tpu.LARGEST else reference
        return jax.lax.platform_dependent(
            gate_up_TX,
            tpu=lambda a: of_tpu.swiglu_quantize(a, format, power_of_two),
            cuda=lambda a: hopper.swiglu_quantize(a, format, power_of_two),
            default=lambda a: reference.swiglu_quantize(a, format, power_of_two),
        )
    return registry.run("swiglu_quantize", implementation, (gate_up_TX, format, power_of_two), interpret)


def swiglu_backward(
    kept: Scaled, dh_TF: Float[Array, "T F"], weight_T: Float[Array, " T"], implementation: str = "auto", interpret: Any = None
) -> tuple[Float[Array, "T 2*F"], Float[Array, "T F"], Float[Array, " T"]]:
    """(d[gate, up] and h in dh's dtype, float32 dweight) of weight * h, h = silu(gate) * up, from what `swiglu_quantize` kept.

    h, which nobody kept, is an operand of the next gradient. `dh_TF` is the gradient of the weighted product.
    Implementations as in `swiglu_quantize`.
    """
    if implementation == "auto":
        if dh_TF.shape[1] % TILE:
            return reference.swiglu_backward(kept, dh_TF, weight_T)
        of_tpu = tpu if dh_TF.shape[1] <= tpu.LARGEST else reference
        return jax.lax.platform_dependent(
            kept, dh_TF, weight_T,
            tpu=of_tpu.swiglu_backward, cuda=hopper.swiglu_backward, default=reference.swiglu_backward,
        )  # fmt: skip
    return registry.run("swiglu_backward", implementation, (kept, dh_TF, weight_T), interpret)
