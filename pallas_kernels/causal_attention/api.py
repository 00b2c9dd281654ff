"""Causal attention within segments: the core of MLA once q, k and v are expanded (arXiv 2412.19437, equation 10)."""

from typing import Any

from jaxtyping import Array, Float, Int

from pallas_kernels import registry
from pallas_kernels.causal_attention import blockwise, hopper, reference, splash

for _name, _module in (("reference", reference), ("xla", blockwise), ("tpu", splash), ("hopper", hopper)):
    registry.register("causal_attention", _name, _module.causal_attention)


def causal_attention(
    q_BLHX: Float[Array, "B L H X"],
    k_BLHX: Float[Array, "B L H X"],
    v_BLHU: Float[Array, "B L H U"],
    segment_BL: Int[Array, "B L"],
    scale: float,
    implementation: str = "auto",
    interpret: Any = None,
) -> Float[Array, "B L H U"]:
    """softmax(scale * q k^T) v over keys at or before the query and in its segment. Differentiable in q, k, v.

    Key and value head sizes may differ. Implementations as in `registry`. `xla` never holds more than one block of scores a
    head, forward or backward. `tpu` is JAX's splash attention; `hopper` takes bfloat16. What the backward pass needs of the
    result has the checkpoint_name `blockwise.RESIDUALS` in all of them.
    """
    return registry.run("causal_attention", implementation, (q_BLHX, k_BLHX, v_BLHU, segment_BL, scale), interpret)
