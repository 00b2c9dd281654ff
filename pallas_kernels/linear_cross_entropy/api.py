"""Output head and cross-entropy in one operation that never holds all logits."""

from typing import Any

from jaxtyping import Array, Float, Int

from pallas_kernels import registry
from pallas_kernels.linear_cross_entropy import chunked, reference


def linear_cross_entropy(
    x_TD: Float[Array, "T D"],
    w_DV: Float[Array, "D V"],
    target_T: Int[Array, " T"],
    weight_T: Float[Array, " T"],
    implementation: str = "auto",
    interpret: Any = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(sum_t weight_t * nll_t, sum_t weight_t * [argmax = target]) for logits x @ w, both float32, nll in nats.

    The first is differentiable in x and w; the second is a count. Logits and the softmax are float32 whatever x's dtype.
    All but `reference` go through the tokens in chunks and compute the gradients in the same pass, so that no logits are kept
    or recomputed. Implementations as in `registry`, of the operation `logit_statistics`, which a plug-in registers: a chunk's
    logits and what cross-entropy needs of them, by plain JAX or in one pass by a kernel (`hopper` in bfloat16).
    """
    arguments = x_TD, w_DV, target_T, weight_T
    if implementation == "reference":
        return reference.linear_cross_entropy(*arguments)
    if implementation == "auto":
        return registry.auto(
            "logit_statistics",
            lambda by, x, w, target, weight: chunked.linear_cross_entropy(x, w, target, weight, by),
            arguments,
        )
    return chunked.linear_cross_entropy(*arguments, implementation, interpret)
