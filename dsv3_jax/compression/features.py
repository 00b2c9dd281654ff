"""What the down projections of an MoE layer read: the hidden activations of each expert's tokens.

The layer's output is linear in its down projections: y_t = sum_e weight_te h_te W_e + s_t W_shared, for the experts e that
token t chose. `Features` hold weight_te h_te and s_t, and the two products that a least-squares fit of the W needs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsv3_jax.model.layers import linear, swiglu
from dsv3_jax.model.moe import MoE
from pallas_kernels.products import dot

_STEPS = 8  # capacities are multiples of this part of the tokens, so that layers share compiled programs


class ExpertFeatures(NamedTuple):
    """By expert: its tokens, and weight times hidden activation of each; C is room for those of the busiest.

    Places without a token have the number of tokens T, and zeros.
    """

    token_EC: Int[Array, "E C"]
    hidden_ECM: Float[Array, "E C M"]


class Features(NamedTuple):
    """The hidden activations of the routed experts, and of the shared ones, which every token has."""

    routed: ExpertFeatures
    shared_TS: Float[Array, "T S"]


class DownWeights(NamedTuple):
    """The down projections of a layer, or something of their shape."""

    routed_EMD: Float[Array, "E M D"]
    shared_SD: Float[Array, "S D"]


def down_weights(moe: MoE) -> DownWeights:
    return DownWeights(moe.w_down_EMD[...], moe.shared.w_down_FD[...])


def moe_features(moe: MoE, x_TD: Float[Array, "T D"], real_T: Array) -> Features:
    """What the down projections of a layer read of its input; tokens that are not `real` (padding) count nowhere."""
    E = moe.config.n_routed_experts
    expert_BLK, weight_BLK = moe.router.choose(moe.router.scores(x_TD[None]))
    expert_TK = np.where(np.asarray(real_T)[:, None], np.asarray(expert_BLK[0]), E)
    token_EC, choice_EC = _by_expert(expert_TK, E)
    weight_EC = jnp.append(weight_BLK[0].reshape(-1), 0.0)[choice_EC]
    gate_up = moe.w_gate_up_ED2M[...]
    hidden_ECM = jax.lax.map(lambda e: _expert_hidden(x_TD, *e), (jnp.asarray(token_EC), weight_EC, gate_up))
    shared_TS = swiglu(linear(x_TD, moe.shared.w_gate_up_D2F[...]))
    return Features(ExpertFeatures(jnp.asarray(token_EC), hidden_ECM), jnp.where(real_T[:, None], shared_TS, 0))


def _by_expert(expert_TK: np.ndarray, experts: int) -> tuple[np.ndarray, np.ndarray]:
    """i32[E, C]: the tokens of each expert, T where there is none, and where in the flattened `expert_TK` they chose it."""
    T, K = expert_TK.shape
    chosen = expert_TK.reshape(-1)
    counts = np.bincount(chosen, minlength=experts + 1)[:experts]
    step = -(-T // _STEPS)
    capacity = max(-(-int(counts.max()) // step), 1) * step
    order = np.argsort(chosen, kind="stable")[: counts.sum()]
    begin = np.concatenate([[0], np.cumsum(counts)[:-1]])
    place = np.arange(len(order)) - np.repeat(begin, counts)
    choice_EC = np.full((experts, capacity), T * K, np.int32)
    choice_EC[chosen[order], place] = order
    return np.minimum(choice_EC // K, T).astype(np.int32), choice_EC


def _expert_hidden(x_TD: Array, token_C: Array, weight_C: Array, w_gate_up_D2M: Array) -> Float[Array, "C M"]:
    x_CD = jnp.take(x_TD, token_C, axis=0, mode="fill", fill_value=0)
    return swiglu(linear(x_CD, w_gate_up_D2M)) * weight_C[:, None]


def outputs(features: Features, weights: DownWeights) -> Float[Array, "T D"]:
    """F W: what the layer gives for each token with these down projections."""
    routed = features.routed

    def add(y_TD: Array, expert: tuple[Array, Array, Array]) -> tuple[Array, None]:
        token_C, hidden_CM, w_MD = expert
        return y_TD.at[token_C].add(dot(hidden_CM, w_MD), mode="drop"), None

    y_TD = dot(features.shared_TS, weights.shared_SD)
    return jax.lax.scan(add, y_TD, (routed.token_EC, routed.hidden_ECM, weights.routed_EMD))[0]


def correlations(features: Features, r_TD: Float[Array, "T D"]) -> DownWeights:
    """F^T r: how each hidden activation goes along with `r`."""

    def of_expert(expert: tuple[Array, Array]) -> Array:
        token_C, hidden_CM = expert
        return dot(hidden_CM.T, jnp.take(r_TD, token_C, axis=0, mode="fill", fill_value=0))

    return DownWeights(jax.lax.map(of_expert, tuple(features.routed)), dot(features.shared_TS.T, r_TD))
