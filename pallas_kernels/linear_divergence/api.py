"""How far a model's next-token distributions are from another's, from both models' hidden states and heads."""

from jaxtyping import Array, Float

from pallas_kernels.linear_divergence import chunked, reference


def linear_divergence(
    x_TD: Float[Array, "T D"],
    w_DV: Float[Array, "D V"],
    teacher_x_TC: Float[Array, "T C"],
    teacher_w_CV: Float[Array, "C V"],
    weight_T: Float[Array, " T"],
    temperature: float = 1.0,
    implementation: str = "auto",
) -> Float[Array, ""]:
    """sum_t weight_t * tau^2 * KL(p_t || q_t) in nats, q of the logits x @ w / tau and p of the teacher's, both float32.

    tau^2 keeps gradients of one size at every temperature (arXiv 1503.02531, section 2). Differentiable in x and w; the teacher
    has no gradient. `reference` holds all logits; the others go through the tokens in chunks, as `linear_cross_entropy` does.
    """
    arguments = x_TD, w_DV, teacher_x_TC, teacher_w_CV, weight_T
    if implementation == "reference":
        return reference.linear_divergence(*arguments, temperature)
    return chunked.linear_divergence(*arguments, temperature)
