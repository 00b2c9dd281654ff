"""Gradients as codes of 1, 2, 4 or 8 bits and a float32 scale for each block (arXiv 1901.09847, 2102.02888).

Rounding, packing and what rounding has cost are one pass over memory; so are unpacking and the mean of replicas.
"""

from typing import Any

import jax
from jaxtyping import Array, Float, UInt8

from pallas_kernels import registry
from pallas_kernels.gradient_codes import hopper, reference, tpu
from pallas_kernels.gradient_codes.reference import Levels

for _name, _module in (("reference", reference), ("tpu", tpu), ("hopper", hopper)):
    registry.register("pack_codes", _name, _module.pack)
for _name, _module in (("reference", reference), ("tpu", tpu)):
    registry.register("mean_of_codes", _name, _module.mean)

_BLOCK = 256  # what the kernels are laid out for
_REPLICAS = 32  # whose codes the kernels hold at once


def pack_codes(
    x: Float[Array, "rows block"],
    owed: Float[Array, "rows block"],
    unit: Float[Array, "rows block"],
    levels: Levels,
    implementation: str = "auto",
    interpret: Any = None,
) -> tuple[UInt8[Array, "rows bytes"], Float[Array, " rows"], Float[Array, "rows block"]]:
    """(codes, scales, what is owed then) of x + owed, rounded in units of `unit` (positive); float32.

    A row is a block: its numbers in units of `unit` become the nearest of `levels`, in units of the row's scale. A number that
    is not finite makes its row so. `implementation`: "reference" (plain JAX), "tpu", "hopper", one that a plug-in registered,
    or "auto": the kernels on TPU and CUDA for blocks of 256, else plain JAX. `interpret` goes to the kernel that was asked for.
    """
    if implementation == "auto" and x.shape[1] == _BLOCK:
        return jax.lax.platform_dependent(
            x, owed, unit,
            tpu=lambda x, owed, unit: tpu.pack(x, owed, unit, levels),
            cuda=lambda x, owed, unit: hopper.pack(x, owed, unit, levels),
            default=lambda x, owed, unit: reference.pack(x, owed, unit, levels),
        )  # fmt: skip
    name = "reference" if implementation == "auto" else implementation
    return registry.run("pack_codes", name, (x, owed, unit, levels), interpret)


def mean_of_codes(
    codes: UInt8[Array, "replicas rows bytes"],
    scales: Float[Array, "replicas rows"],
    levels: Levels,
    implementation: str = "auto",
    interpret: Any = None,
) -> Float[Array, "rows block"]:
    """The mean over replicas of what codes stand for, in float32 and in the units they were rounded in.

    Otherwise as `pack_codes`. There is a kernel for TPUs only: on a GPU XLA's own program reads codes and writes means once.
    "auto" is plain JAX for more than 32 replicas too: each then has so small a share to decode that it costs nothing.
    """
    replicas, _, width = codes.shape
    if implementation == "auto" and width * 8 // levels.bits == _BLOCK and replicas <= _REPLICAS:
        return jax.lax.platform_dependent(
            codes, scales,
            tpu=lambda codes, scales: tpu.mean(codes, scales, levels),
            default=lambda codes, scales: reference.mean(codes, scales, levels),
        )  # fmt: skip
    name = "reference" if implementation == "auto" else implementation
    return registry.run("mean_of_codes", name, (codes, scales, levels), interpret)
