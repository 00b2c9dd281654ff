"""Cases of SwiGLU with quantisation and of its gradient."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import registry
from pallas_kernels.measure import EXACT, Case, Suite, Tolerance, normal
from pallas_kernels.scaled import DTYPES
from pallas_kernels.swiglu_quantize import reference

_SCALES = Tolerance("a scale's last bit is that of the platform's exponential", relative=3e-7)
_BF16 = Tolerance("a result in bfloat16 has 8 bits", relative=1e-2, absolute=1e-5)
_SIZES = ((256, 256), (100, 128))  # T and F: whole blocks of rows, and not


def gate_up(T: int, F: int) -> jax.Array:
    return 3 * normal(0, T, 2 * F, dtype=jnp.bfloat16)


def _forward(implementation, interpret, *arguments):
    h, kept = registry.run("swiglu_quantize", implementation, arguments, interpret)
    return {"h": h.values, "scales of h": h.scales, "kept": kept.values, "scales of kept": kept.scales}


def _backward(implementation, interpret, *arguments):
    dgate_up, h, dweight = registry.run("swiglu_backward", implementation, arguments, interpret)
    return {"dgate_up": dgate_up, "h": h, "dweight": dweight}


def _backward_arguments(T, F, format):
    kept = reference.swiglu_quantize(gate_up(T, F), format, False)[1]
    return kept, normal(1, T, F, dtype=jnp.bfloat16), jax.random.uniform(jax.random.key(2), (T,))


def _cases(arguments, tolerances) -> dict[str, Case]:
    return {
        f"{format} {T}x{F}": Case(functools.partial(arguments, T, F, format), tolerances)
        for T, F in _SIZES
        for format in DTYPES
    }


FORWARD = Suite(
    _cases(
        lambda T, F, format: (gate_up(T, F), format, False),
        {"h": EXACT, "scales of h": _SCALES, "kept": EXACT, "scales of kept": _SCALES},
    ),
    _forward,
)
BACKWARD = Suite(
    _cases(_backward_arguments, {"dgate_up": _BF16, "h": _BF16, "dweight": Tolerance("a sum of F terms", of_largest=1e-6)}),
    _backward,
)
