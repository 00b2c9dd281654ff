"""Scales and zero points of a weight's groups, chosen by a search over how far a group is clipped.

A group that keeps its largest weight exactly spends its few codes on a range that holds few weights. The search shrinks the
range by factors from 1.05 down to 0.5 and keeps the one with the least sum of |error|^2.4, as GPTQ's tools do; where inputs are
known, each error counts as much as its input's second moment.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float16, Float32, UInt8

from pallas_kernels.integer_weight import IntegerFormat, storable

_FACTORS = np.linspace(1.05, 0.5, 23, dtype=np.float32)
_NORM = 2.4
SMALLEST_SCALE = 2.0**-24  # of float16; a group of zeros gets it


class Grid(NamedTuple):
    """What codes of each group stand for: scale * (code - zero)."""

    scale_GN: Float16[Array, "G N"]
    zero_GN: UInt8[Array, "G N"]

    def per_input(self, group: int) -> tuple[Float32[Array, "K N"], Float32[Array, "K N"]]:
        """Scale and zero point of every input."""
        scale_GN, zero_GN = (a.astype(jnp.float32) for a in self)
        return jnp.repeat(scale_GN, group, axis=0), jnp.repeat(zero_GN, group, axis=0)


def nearest_code(w: Array, scale: Array, zero: Array, levels: int) -> Float32[Array, "..."]:
    """The code whose number is nearest to w, as a float."""
    return jnp.clip(jnp.round(w / scale) + zero, 0, levels - 1)


def choose_grid(w_KN: Float32[Array, "K N"], format: IntegerFormat, moment_K: Float32[Array, " K"] | None = None) -> Grid:
    """The grid of each group of `format.group` inputs and each output, by the search that the module describes.

    `moment_K` are the inputs' second moments; None: all errors count alike.
    """
    K, N = w_KN.shape
    w_GgN = w_KN.reshape(K // format.group, format.group, N)
    low_GN, high_GN = w_GgN.min(1), w_GgN.max(1)
    if format.symmetric:
        high_GN = jnp.maximum(-low_GN, high_GN)
        low_GN = -high_GN
    else:
        low_GN, high_GN = jnp.minimum(low_GN, 0), jnp.maximum(high_GN, 0)

    weight_Gg1 = jnp.ones(1) if moment_K is None else moment_K.reshape(K // format.group, format.group, 1)

    def tried(factor: Array) -> tuple[Grid, Float32[Array, "G N"]]:
        scale_GN = storable(jnp.maximum(factor * (high_GN - low_GN) / (format.levels - 1), SMALLEST_SCALE))
        s_GN = scale_GN.astype(jnp.float32)
        if format.symmetric:
            zero_GN = jnp.full_like(s_GN, format.middle)
        else:
            zero_GN = jnp.clip(jnp.round(-factor * low_GN / s_GN), 0, format.levels - 1)
        s_G1N, zero_G1N = s_GN[:, None], zero_GN[:, None]
        error_GgN = w_GgN - s_G1N * (nearest_code(w_GgN, s_G1N, zero_G1N, format.levels) - zero_G1N)
        return Grid(scale_GN, zero_GN.astype(jnp.uint8)), jnp.sum(weight_Gg1 * jnp.abs(error_GgN) ** _NORM, axis=1)

    def better(best: tuple, factor: Array) -> tuple[tuple, None]:
        found = tried(factor)
        wins = found[1] < best[1]
        return jax.tree.map(lambda new, old: jnp.where(wins, new, old), found, best), None

    (grid, _), _ = jax.lax.scan(better, tried(jnp.float32(_FACTORS[0])), jnp.asarray(_FACTORS[1:]))
    return grid
