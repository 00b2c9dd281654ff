"""Refitting down projections, so that a layer gives what another one gave.

With a layer's routing and hidden activations as they are, its output F W is linear in all of its down projections together
(features.py). The refit is their ridge regression towards the old ones: it minimises |r - F dW|^2 + lambda |dW|^2, r being what
the output lacks. No gradient descent, and no inverse of F^T F, which has a row for every hidden unit of every expert: conjugate
gradients, whose preconditioner inverts each expert's own part of it, need products with F alone.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsv3_jax.compression.features import DownWeights, Features, correlations, outputs
from pallas_kernels.products import dot

_TOLERANCE = 1e-4  # of |gradient| / |F^T r|: beyond, held-out text sees no difference
_MOST_ITERATIONS = 100


@jax.jit
def refit(features: Features, lacking_TD: Float[Array, "T D"], ridge: float | Array) -> DownWeights:
    """What to add to the down projections, so that the output has more of what it lacks.

    Args:
        features: Of the layer's input.
        lacking_TD: f32[T, D], wanted output - output; zero where a token does not count.
        ridge: lambda, in units of the mean of F^T F's diagonal.

    Returns:
        The minimiser of |lacking - F dW|^2 + lambda |dW|^2, to a relative residual of 1e-4.
    """
    own = _own_moments(features)
    diagonal = jnp.concatenate([jnp.diagonal(a, axis1=-2, axis2=-1).reshape(-1) for a in own])
    strength = jnp.float32(ridge) * jnp.mean(diagonal)
    strength = jnp.where(strength > 0, strength, 1.0)  # no token at all: nothing to fit
    factors = [jnp.linalg.cholesky(a + strength * jnp.eye(a.shape[-1])) for a in own]

    def normal_equations(dw: DownWeights) -> DownWeights:
        fitted = correlations(features, outputs(features, dw))
        return jax.tree.map(lambda a, b: a + strength * b, fitted, dw)

    def precondition(g: DownWeights) -> DownWeights:
        return DownWeights(*(_solve(factor, b) for factor, b in zip(factors, g, strict=True)))

    wanted = correlations(features, lacking_TD)
    found, _ = jax.scipy.sparse.linalg.cg(
        normal_equations, wanted, tol=_TOLERANCE, maxiter=_MOST_ITERATIONS, M=precondition
    )  # fmt: skip
    return found


def _own_moments(features: Features) -> tuple[Float[Array, "E M M"], Float[Array, "S S"]]:
    """The blocks of F^T F on its diagonal: of each expert with itself, and of the shared ones."""
    routed = jax.lax.map(lambda hidden_CM: dot(hidden_CM.T, hidden_CM), features.routed.hidden_ECM)
    return routed, dot(features.shared_TS.T, features.shared_TS)


@partial(jnp.vectorize, signature="(m,m),(m,d)->(m,d)")
def _solve(lower_MM: Array, b_MD: Array) -> Array:
    return jax.scipy.linalg.cho_solve((lower_MM, True), b_MD)
