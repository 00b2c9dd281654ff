"""Cases of `logit_statistics`, alone and in `linear_cross_entropy` with its gradients: ragged tokens, sizes, vocabularies."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import registry
from pallas_kernels.linear_cross_entropy.api import linear_cross_entropy
from pallas_kernels.measure import Case, Suite, Tolerance, normal, with_gradients

_STATISTICS = Tolerance("float32 sums in another order", relative=1e-5, absolute=1e-4)
_COUNT = Tolerance("a sum of weights", relative=1e-5)


def _tolerances(error: float, why: str) -> dict[str, Tolerance]:
    # what a kernel hands on is float32 in both: only the gradients, of 8 bits in bfloat16, are rounded anew
    gradients = Tolerance(why, relative=error, of_largest=error, floor=0.05)
    found = dict.fromkeys(("out", "dx", "dw"), gradients) | {"correct": _COUNT}
    return found | dict.fromkeys(("top", "total", "at_target", "logits"), _STATISTICS)


_BY_DTYPE = {
    "float32": _tolerances(2e-5, "float32 sums in another order"),
    "bfloat16": _tolerances(1e-2, "gradients in bfloat16 have 8 bits"),
}


def _arguments(T, D, V, dtype):
    x, w = normal(T, T, D, dtype=dtype), normal(V, D, V, dtype=dtype)
    return x, w, jax.random.randint(jax.random.key(1), (T,), 0, V), True


def _results(implementation, interpret, x, w, target, keep):
    """The statistics with targets that other devices' columns have, all but one; the loss with targets that are here."""
    (T, V), run = (x.shape[0], w.shape[1]), functools.partial(registry.run, "logit_statistics", implementation)
    weight = jax.random.bernoulli(jax.random.key(2), 0.8, (T,)) / T

    def loss(x, w):
        return linear_cross_entropy(x, w, target, weight, implementation, interpret)

    elsewhere = jnp.full(T, V + 3).at[0].set(-2).at[-1].set(V - 1)
    kept, left = (run((x, w, elsewhere, k), interpret) for k in (keep, False))
    assert left.logits_TV is None
    found = with_gradients(lambda x, w: loss(x, w)[0], (x, w), {0: "dx", 1: "dw"})
    return found | {
        "correct": loss(x, w)[1], "top": left.top_T, "total": left.total_T, "at_target": kept.at_target_T,
        "logits": kept.logits_TV,
    }  # fmt: skip


LOGIT_STATISTICS = Suite(
    {
        f"{dtype} {T}x{D}x{V}": Case(functools.partial(_arguments, T, D, V, dtype), _BY_DTYPE[dtype])
        for T, D, V, dtype in (
            (600, 200, 1100, "float32"),
            (2100, 128, 70, "bfloat16"),
            (100, 100, 300, "bfloat16"),
            (260, 128, 256, "bfloat16"),
        )
    },
    _results,
)
