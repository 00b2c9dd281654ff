"""Second moments of what each routed expert reads, and GPTQ of all experts of a layer, the experts spread over devices.

A device computes everything about its experts by itself, in the order of the tokens: the result is the same for any number of
devices, bit for bit.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float32, Int

from dsv3_jax.compression.gptq import Rounded, gptq, output_energies
from dsv3_jax.model.layers import swiglu
from pallas_kernels.grouped_swiglu.rows import rows_of_slots
from pallas_kernels.integer_weight import IntegerFormat
from pallas_kernels.products import dot

_ROWS = 64  # tokens of one expert that are multiplied together
TOGETHER = 8  # experts of a device that are rounded side by side: each needs three matrices of its moments' size
_AXIS = "experts"


class Moments(NamedTuple):
    """Sums over the tokens of each expert, of what it reads."""

    xx_EKK: Float32[Array, "E K K"]
    tokens_E: Float32[Array, " E"]


def expert_mesh(experts: int) -> Mesh:
    """As many of the devices as share the experts equally."""
    devices = jax.devices()
    return Mesh(np.array(devices[: math.gcd(experts, len(devices))]), (_AXIS,))


def sharded(mesh: Mesh, arrays: Any) -> Any:
    """Arrays with a leading axis of experts, each expert on the device that computes with it."""
    return jax.device_put(arrays, NamedSharding(mesh, P(_AXIS)))


def replicated(mesh: Mesh, array: Array) -> Array:
    """An array that every device has."""
    return jax.device_put(array, NamedSharding(mesh, P()))


def no_moments(mesh: Mesh, experts: int, inputs: int) -> Moments:
    """Moments of no tokens."""
    return Moments(*(sharded(mesh, np.zeros(shape, np.float32)) for shape in ((experts, inputs, inputs), (experts,))))


def _add_own(moments: Moments, x_TD: Array, expert_TK: Array, w_gate_up_EDX: Array | None) -> Moments:
    """One device's experts: `moments` with those of x or, with weights, of swiglu(x w)."""
    E = moments.tokens_E.shape[0]
    own_TK = expert_TK - jax.lax.axis_index(_AXIS) * E
    own_TK = jnp.where((own_TK >= 0) & (own_TK < E), own_TK, E)
    rows = rows_of_slots(own_TK, E, (_ROWS,))
    blocks = rows.blocks[0]

    def add(b: Array, xx_EKK: Array) -> Array:
        token_R = jax.lax.dynamic_slice_in_dim(rows.token_R, blocks.row_b[b], _ROWS)
        x_RK = x_TD.at[token_R].get(mode="fill", fill_value=0)
        if w_gate_up_EDX is not None:
            x_RK = swiglu(dot(x_RK, w_gate_up_EDX[blocks.expert_b[b]]).reshape(_ROWS, 2, -1))
        return xx_EKK.at[blocks.expert_b[b]].add(dot(x_RK.T, x_RK))

    xx_EKK = jax.lax.fori_loop(0, blocks.count, add, moments.xx_EKK)
    return Moments(xx_EKK, moments.tokens_E + jnp.bincount(own_TK.reshape(-1), length=E).astype(jnp.float32))


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def add_moments(
    mesh: Mesh, moments: Moments, x_TD: Float[Array, "T D"], expert_TK: Int[Array, "T K"],
    w_gate_up_ED2M: Float[Array, "E D 2 M"] | None = None,
) -> Moments:  # fmt: skip
    """`moments` with those of more tokens: of x, which gate and up projections read, or with their weights of what down reads.

    An entry E of `expert_TK` counts for no expert.
    """
    by_expert = P(_AXIS)
    weights = None if w_gate_up_ED2M is None else w_gate_up_ED2M.reshape(*w_gate_up_ED2M.shape[:2], -1)
    own = jax.shard_map(
        _add_own, mesh=mesh, in_specs=(by_expert, P(), P(), None if weights is None else by_expert), out_specs=by_expert,
        check_vma=False,
    )  # fmt: skip
    return own(moments, x_TD, expert_TK, weights)


@partial(jax.jit, static_argnums=(0, 4))
def _gptq_experts(mesh: Mesh, w_EKN, moments: Moments, mean_KK, format: IntegerFormat, damping) -> Rounded:
    def own(w_EKN, xx_EKK, mean_KK, damping):
        K = xx_EKK.shape[-1]

        def of_one(arrays: tuple[Array, Array]) -> Rounded:
            w_KN, xx_KK = arrays
            return gptq(w_KN, xx_KK + K * mean_KK, format, damping)

        return jax.lax.map(of_one, (w_EKN, xx_EKK), batch_size=TOGETHER)

    by_expert = P(_AXIS)
    specs = by_expert, by_expert, P(), P()
    return jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=by_expert, check_vma=False)(
        w_EKN, moments.xx_EKK, mean_KK, damping
    )


def gptq_experts(
    mesh: Mesh, w_EKN: Float32[Array, "E K N"], moments: Moments, format: IntegerFormat, damping: float
) -> Rounded:
    """`gptq` of all experts of a layer in one program, each by its own moments and K tokens of the layer's mean.

    An expert that few tokens reach has moments of low rank, and one that none reaches has none: the mean stands in for what it
    did not see, and weighs less the more it saw.
    """
    mean_KK = replicated(mesh, _mean(moments))
    return _gptq_experts(mesh, sharded(mesh, w_EKN), moments, mean_KK, format, jnp.float32(damping))


def _mean(moments: Moments) -> Float32[Array, "K K"]:
    """The moments of a token in the mean over all experts' tokens, summed in the experts' order on one device.

    One expert's at a time: all of them may not fit, and sums in the order of a mesh would give other codes.
    """
    first, sum_KK = jax.devices()[0], None
    for shard in sorted(moments.xx_EKK.addressable_shards, key=lambda shard: shard.index[0].start or 0):
        for xx_KK in shard.data:
            xx_KK = jax.device_put(xx_KK, first)
            sum_KK = xx_KK if sum_KK is None else sum_KK + xx_KK
    assert sum_KK is not None
    return sum_KK / max(float(np.asarray(moments.tokens_E).sum()), 1.0)


@partial(jax.jit, static_argnums=(0, 4))
def expert_energies(
    mesh: Mesh, w_EKN: Float32[Array, "E K N"], rounded: Rounded, moments: Moments, format: IntegerFormat
) -> Float32[Array, "E 3"]:
    """`output_energies` of each expert on its own tokens, one expert after the other on each device."""

    def own(w_EKN: Array, rounded: Rounded, xx_EKK: Array) -> Array:
        def of_one(arrays: tuple[Array, Rounded, Array]) -> Array:
            w_KN, rounded, xx_KK = arrays
            return output_energies(w_KN, rounded, xx_KK, format)

        return jax.lax.map(of_one, (w_EKN, rounded, xx_EKK))

    by_expert = P(_AXIS)
    return jax.shard_map(own, mesh=mesh, in_specs=by_expert, out_specs=by_expert, check_vma=False)(
        w_EKN, rounded, moments.xx_EKK
    )
