"""SwiGLU whose result leaves the chip in 8 bits, and its gradient (arXiv 2412.19437, section 3.3.3)."""

from typing import Any

from jaxtyping import Array, Float

from pallas_kernels import registry
from pallas_kernels.scaled import Format, Scaled
from pallas_kernels.swiglu_quantize import hopper, reference, tpu

for _name, _module in (("reference", reference), ("xla", reference), ("tpu", tpu), ("hopper", hopper)):
    registry.register("swiglu_quantize", _name, _module.swiglu_quantize)
    registry.register("swiglu_backward", _name, _module.swiglu_backward)


def swiglu_quantize(
    gate_up_TX: Float[Array, "T X"],
    format: Format = "e4m3",
    power_of_two: bool = False,
    implementation: str = "auto",
    interpret: Any = None,
) -> tuple[Scaled, Scaled]:
    """(silu(gate) * up, [gate, up]), both in tiles of 1 x 128: what the next product takes, and what the backward pass keeps.

    Computed in float32 in one pass over the input. Implementations as in `registry`; `xla` is the definition. The kernels
    take a multiple of 128 for F, and `tpu`, which holds whole rows, at most `tpu.LARGEST`.
    """
    return registry.run("swiglu_quantize", implementation, (gate_up_TX, format, power_of_two), interpret)


def swiglu_backward(
    kept: Scaled, dh_TF: Float[Array, "T F"], weight_T: Float[Array, " T"], implementation: str = "auto", interpret: Any = None
) -> tuple[Float[Array, "T 2*F"], Float[Array, "T F"], Float[Array, " T"]]:
    """(d[gate, up] and h in dh's dtype, float32 dweight) of weight * h, h = silu(gate) * up, from what `swiglu_quantize` kept.

    h, which nobody kept, is an operand of the next gradient. `dh_TF` is the gradient of the weighted product.
    Implementations as in `swiglu_quantize`.
    """
    return registry.run("swiglu_backward", implementation, (kept, dh_TF, weight_T), interpret)
