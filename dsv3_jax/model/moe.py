"""DeepSeekMoE: shared and routed experts, and the sequence-wise balance loss (arXiv 2412.19437, section 2.1.2)."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.layers import SwiGLU
from dsv3_jax.model.layout import Layout, Traffic
from dsv3_jax.model.parameters import ROUTED_EXPERTS, SHARED_EXPERTS, weight
from dsv3_jax.model.router import make_router
from dsv3_jax.precision.recipes import Recipe
from dsv3_jax.precision.switch import Switch

# (x_TD, expert_TK, weight_TK) -> y_TD
RoutedExperts = Callable[[Array, Array, Array], Array]


class RouterStats(NamedTuple):
    """What one MoE layer tells training: tokens routed to each expert (no padding), the sequence-wise balance loss, and copies
    sent away."""

    load_E: Float[Array, "*layers E"]
    balance_loss: Float[Array, "*layers"]
    traffic: Traffic


def _counts(expert_BLK: Array, experts: int) -> Float[Array, "B E"]:
    """How many of a sequence's choices fall on each expert."""
    return (expert_BLK[..., None] == jnp.arange(experts)).sum((1, 2), dtype=jnp.float32)


def sequence_balance_loss(score_BLE: Float[Array, "B L E"], top_BLK: Int[Array, "B L K"]) -> Float[Array, ""]:
    """Equations 17-20 without alpha, mean over sequences: E/K * sum_e share of top-k choices * mean normalised score.

    The choices `top_BLK` are the top-k of the unbiased scores, as equation 18 has it.
    """
    _, L, E = score_BLE.shape
    f_BE = _counts(top_BLK, E) * (E / top_BLK.shape[-1] / L)
    p_BE = (score_BLE / score_BLE.sum(-1, keepdims=True)).mean(1)
    return (f_BE * p_BE).sum(-1).mean()


class MoE(nnx.Module):
    def __init__(self, config: ModelConfig, layout: Layout, recipe: Recipe, rngs: nnx.Rngs):
        self.config, self.layout, self.gemms = config, layout, recipe.experts
        self.grouped_swiglu = recipe.grouped_swiglu
        self.switch = Switch("experts", recipe.experts) if recipe.controlled and recipe.experts else None
        D, E, M, std = (
            config.hidden_size,
            config.n_routed_experts,
            config.moe_intermediate_size,
            config.initializer_range,
        )
        self.router = make_router(config, layout, rngs)
        self.w_gate_up_ED2M = weight(rngs, std, ROUTED_EXPERTS, experts=E, expert_embed=D, gate_up=2, moe_ffn=M)
        self.w_down_EMD = weight(rngs, std, ROUTED_EXPERTS, experts=E, moe_ffn=M, expert_embed=D)
        self.shared = SwiGLU(config, M * config.n_shared_experts, SHARED_EXPERTS, layout, recipe, rngs)

    def __call__(self, x_BLD: Float[Array, "B L D"], real_BL: Bool[Array, "B L"]) -> tuple[Float[Array, "B L D"], RouterStats]:
        """The layer's output, and its statistics, in whose `load_E` only tokens that are `real` count: no padding."""
        E, K = self.config.n_routed_experts, self.config.num_experts_per_tok
        score_BLE = self.router.scores(x_BLD)
        expert_BLK, weight_BLK = self.router.choose(score_BLE)
        y_BLD, traffic = self.routed(x_BLD, expert_BLK, weight_BLK)
        top_BLK = self.layout.tokenwise(lambda s: jax.lax.top_k(s, K)[1], jax.lax.stop_gradient(score_BLE))
        load_E = _counts(jnp.where(real_BL[..., None], expert_BLK, E), E).sum(0)
        stats = RouterStats(load_E, sequence_balance_loss(score_BLE, top_BLK), traffic)
        return y_BLD + self.shared(x_BLD), stats

    def routed(self, x_BLD: Array, expert_BLK: Array, weight_BLK: Array) -> tuple[Float[Array, "B L D"], Traffic]:
        """The routed experts' weighted sum, in the formats of the recipe or, by the switch, in x's dtype."""

        def experts(gemms, expert_BLK, x_BLD, w_gate_up_ED2M, w_down_EMD, weight_BLK):
            implementation = "auto" if gemms else self.grouped_swiglu
            return self.layout.experts(x_BLD, w_gate_up_ED2M, w_down_EMD, expert_BLK, weight_BLK, gemms, implementation)

        arrays = x_BLD, self.w_gate_up_ED2M[...], self.w_down_EMD[...], weight_BLK
        eight, sixteen = functools.partial(experts, self.gemms), functools.partial(experts, None)
        return self.switch.experts(eight, sixteen, expert_BLK, *arrays) if self.switch else eight(expert_BLK, *arrays)

    def decode(self, x_BLD: Float[Array, "B L D"], experts: RoutedExperts) -> Float[Array, "B L D"]:
        """As `__call__`, with the routed experts given as a function: decoding keeps their weights in its own layout."""
        T, K = x_BLD.shape[0] * x_BLD.shape[1], self.config.num_experts_per_tok
        expert_BLK, weight_BLK = self.router.choose(self.router.scores(x_BLD))
        y_TD = experts(x_BLD.reshape(T, -1), expert_BLK.reshape(T, K), weight_BLK.reshape(T, K))
        return y_TD.reshape(x_BLD.shape) + self.shared(x_BLD)
