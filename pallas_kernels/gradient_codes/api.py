"""Gradients as codes of 1, 2, 4 or 8 bits and a float32 scale for each block (arXiv 1901.09847, 2102.02888).

Rounding, packing and the error that rounding leaves are one pass over memory; so are unpacking and the mean of replicas.
"""

from typing import Any

from jaxtyping import Array, Float, UInt8

from pallas_kernels import registry
from pallas_kernels.gradient_codes import hopper, reference, tpu
from pallas_kernels.gradient_codes.reference import Levels

for _name, _module in (("reference", reference), ("xla", reference), ("tpu", tpu), ("hopper", hopper)):
    registry.register("pack_codes", _name, _module.pack)
for _name, _module in (("reference", reference), ("xla", reference), ("tpu", tpu)):
    registry.register("mean_of_codes", _name, _module.mean)


def pack_codes(
    x: Float[Array, "rows block"],
    error: Float[Array, "rows block"],
    unit: Float[Array, "rows block"],
    levels: Levels,
    implementation: str = "auto",
    interpret: Any = None,
) -> tuple[UInt8[Array, "rows bytes"], Float[Array, " rows"], Float[Array, "rows block"]]:
    """(codes, scales, residual) of x + error, rounded in units of `unit` (positive); float32.

    `error` is the error feedback, what earlier rounding left out; `residual`, the next one, is x + error less what the codes
    stand for. A row is a block: its numbers in units of `unit` become the nearest of `levels`, in units of the row's scale. A
    number that is not finite makes its row so. Implementations as in `registry`; `xla` is the definition, and the kernels take
    blocks of 256.
    """
    return registry.run("pack_codes", implementation, (x, error, unit, levels), interpret)


def mean_of_codes(
    codes: UInt8[Array, "replicas rows bytes"],
    scales: Float[Array, "replicas rows"],
    levels: Levels,
    implementation: str = "auto",
    interpret: Any = None,
) -> Float[Array, "rows block"]:
    """The mean over replicas of what codes stand for, in float32 and in the units they were rounded in.

    Implementations as in `registry`; `xla` is the definition. There is a kernel for TPUs only, for blocks of 256 of at most 32
    replicas: on a GPU XLA's own program reads codes and writes means once, and of more replicas each has so small a share to
    decode that it costs nothing.
    """
    return registry.run("mean_of_codes", implementation, (codes, scales, levels), interpret)
