"""Cases of `causal_attention`, forward and backward: lengths that fill blocks and not, and several segments in sequences."""

import functools

import jax.numpy as jnp

from pallas_kernels import registry
from pallas_kernels.measure import Case, Suite, Tolerance, normal, with_gradients

_GRADIENTS = {0: "dq", 1: "dk", 2: "dv"}


def _tolerances(error: float, why: str) -> dict[str, Tolerance]:
    # terms are of order 1 to 10: where they cancel (one key has a gradient of 0), what is left is their rounding, 1e-6
    tolerance = Tolerance(why, relative=error, of_largest=error, floor=0.05)
    return dict.fromkeys(("out", *_GRADIENTS.values()), tolerance)


F32 = _tolerances(2e-5, "float32 sums in another order")
BF16 = _tolerances(2e-2, "bfloat16 has 8 bits, and rounds probabilities and their gradients")
BF16_LONG = _tolerances(3e-2, "as the other cases in bfloat16, with longer sums")


def _arguments(B, L, H, X, U, segment, scale, dtype):
    q, k, v = (normal(i, B, L, H, size, dtype=dtype) for i, size in enumerate((X, X, U)))
    return q, k, v, jnp.stack([segment(jnp.arange(L), b) for b in range(B)]).astype(jnp.int32), scale


def _case(B, L, H, X, U, segment, scale, dtype, tolerances) -> Case:
    return Case(functools.partial(_arguments, B, L, H, X, U, segment, scale, dtype), tolerances)


def _hundreds_and_one(position, sequence):
    """The first sequence has segments of 100, the others have one."""
    return position // 100 if sequence == 0 else 0 * position


def _results(implementation, interpret, *arguments):
    *qkv, segment, scale = arguments

    def attention(q, k, v):
        return registry.run("causal_attention", implementation, (q, k, v, segment, scale), interpret)

    return with_gradients(attention, tuple(qkv), _GRADIENTS)


ATTENTION = Suite(
    {
        "float32, length 256": _case(2, 256, 2, 48, 32, _hundreds_and_one, 0.2, jnp.float32, F32),
        "float32, length 300": _case(2, 300, 2, 48, 32, _hundreds_and_one, 0.2, jnp.float32, F32),
        "bfloat16, length 256": _case(2, 256, 2, 48, 32, _hundreds_and_one, 0.2, jnp.bfloat16, BF16_LONG),
        "bfloat16, the released model's heads": _case(
            1, 128, 2, 192, 128, lambda position, _: position // 90, 192**-0.5, jnp.bfloat16, BF16
        ),
        "bfloat16, odd heads": _case(1, 200, 2, 72, 40, lambda position, _: position // 90, 72**-0.5, jnp.bfloat16, BF16),
        "bfloat16, sequences of other segments": _case(
            2, 70, 1, 64, 64, lambda position, sequence: position // (20 + 30 * sequence), 0.125, jnp.bfloat16, BF16
        ),
    },
    _results,
)
