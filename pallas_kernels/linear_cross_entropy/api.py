"""Output head and cross-entropy in one operation that never holds all logits."""

from typing import Literal

from jaxtyping import Array, Float, Int

from pallas_kernels.linear_cross_entropy import chunked, reference

_IMPLEMENTATIONS = {"reference": reference.linear_cross_entropy, "chunked": chunked.linear_cross_entropy}


def linear_cross_entropy(
    x_TD: Float[Array, "T D"],
    w_DV: Float[Array, "D V"],
    target_T: Int[Array, " T"],
    weight_T: Float[Array, " T"],
    implementation: Literal["auto", "chunked", "reference"] = "auto",
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(sum_t weight_t * nll_t, sum_t weight_t * [argmax = target]) for logits x @ w, both float32, nll in nats.

    The first is differentiable in x and w; the second is a count. Logits and the softmax are float32 whatever x's dtype.
    `chunked` (what "auto" takes) goes through the tokens in chunks and computes the gradients in the same pass, so that
    no logits are kept or recomputed.
    """
    chosen = "chunked" if implementation == "auto" else implementation
    return _IMPLEMENTATIONS[chosen](x_TD, w_DV, target_T, weight_T)
