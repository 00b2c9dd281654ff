"""The cost that each kernel states (`pl.CostEstimate`), from shapes: XLA schedules other work beside it by that.

A sum, a product or a comparison of two numbers counts as a FLOP; `transcendentals` are exponentials and roots. Bytes are those
of the device's memory: operands and results once, and operands of a blocked product as often as blocks of the result need them.
"""

from typing import Any

from jax.experimental import pallas as pl

from pallas_kernels.scaled import TILE

_QUANTIZE = 5  # FLOPs a number: magnitude, maximum, product with the inverse scale, and two bounds
_SCALES = 3  # FLOPs a partial sum of 128 terms: both scales, and adding it up


def nbytes(*arrays: Any) -> int:
    """Bytes of arrays or of their shapes."""
    return sum(a.size * a.dtype.itemsize for a in arrays)


def quantize(inputs: list, outputs: list, dequantizes: bool = False) -> pl.CostEstimate:
    """The first input in 8 bits; `dequantizes` if it comes in 8 bits and its scales are multiplied in."""
    numbers = inputs[0].size
    return pl.CostEstimate(
        flops=(_QUANTIZE + dequantizes) * numbers, transcendentals=0, bytes_accessed=nbytes(*inputs, *outputs)
    )


def swiglu_quantize(gate_up_TX: Any, outputs: list) -> pl.CostEstimate:
    """silu(gate) * up, and three matrices of its size in 8 bits."""
    numbers = gate_up_TX.size // 2
    return pl.CostEstimate(
        flops=(4 + 3 * _QUANTIZE) * numbers, transcendentals=numbers, bytes_accessed=nbytes(gate_up_TX, *outputs)
    )


def swiglu_backward(inputs: list, outputs: list) -> pl.CostEstimate:
    """Two matrices out of 8 bits, then of each number sigmoid, silu (3), h (1), dweight (2), dh (1), dgate (5) and dup (1)."""
    numbers = inputs[0].size // 2
    return pl.CostEstimate(flops=(2 + 13) * numbers, transcendentals=numbers, bytes_accessed=nbytes(*inputs, *outputs))


def scaled_product(a: list, b: list, y: Any, summed: int, a_reads: int, b_reads: int) -> pl.CostEstimate:
    """y of sums of `summed` terms; a and b, values and scales, are read `a_reads` and `b_reads` times.

    A grouped weights' gradient y[g] sums each row for one group only: `summed` is then their mean, rows / groups.
    """
    flops = 2 * y.size * summed + _SCALES * y.size * (summed // TILE)
    moved = nbytes(*a) * a_reads + nbytes(*b) * b_reads + nbytes(y)
    return pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=moved)


def logit_statistics(x_TD: Any, w_DV: Any, outputs: list, x_reads: int, w_reads: int) -> pl.CostEstimate:
    """The logits, and of each a maximum, a difference, its exponential, two sums and a comparison with the target."""
    (T, D), V = x_TD.shape, w_DV.shape[1]
    moved = nbytes(x_TD) * x_reads + nbytes(w_DV) * w_reads + nbytes(*outputs)
    return pl.CostEstimate(flops=2 * T * D * V + 5 * T * V, transcendentals=T * V, bytes_accessed=moved)


def pack_codes(inputs: list, outputs: list, levels: int, uneven: bool) -> pl.CostEstimate:
    """Sums, divisions, the scale and the residual of each number (15); `uneven` levels are found and read by comparisons."""
    (rows, block) = inputs[0].shape
    of_level = 3 * levels if uneven else 8
    return pl.CostEstimate(flops=(15 + of_level) * rows * block, transcendentals=rows, bytes_accessed=nbytes(*inputs, *outputs))


def mean_of_codes(inputs: list, mean: Any, levels: int, uneven: bool) -> pl.CostEstimate:
    """Shifted, masked, scaled and added, of each replica's number; `uneven` levels are read by comparisons."""
    replicas, of_level = inputs[0].shape[0], 2 * levels if uneven else 2
    return pl.CostEstimate(flops=(4 + of_level) * replicas * mean.size, transcendentals=0, bytes_accessed=nbytes(*inputs, mean))


def integer_product(x_SRK: Any, matrix: list, out: Any) -> pl.CostEstimate:
    """A product for each slot, with an expert's `matrix`: its codes, scales and zero points."""
    moved = nbytes(x_SRK, out) + x_SRK.shape[0] * nbytes(*matrix)
    return pl.CostEstimate(flops=2 * out.size * x_SRK.shape[2], transcendentals=0, bytes_accessed=moved)


def causal_attention(inputs: list, outputs: list, pairs: int, columns: int) -> pl.CostEstimate:
    """Products of `columns` multiplications for each of `pairs` of a query and a key, which has one exponential.

    Half of the square of a sequence's positions is visited, over all heads and sequences.
    """
    return pl.CostEstimate(flops=2 * pairs * columns, transcendentals=pairs, bytes_accessed=nbytes(*inputs, *outputs))
