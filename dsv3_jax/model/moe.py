"""DeepSeekMoE: shared experts, sigmoid router, group-limited top-k, balancing (arXiv 2412.19437, section 2.1.2)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.layers import RouterBias, SwiGLU, linear, weight
from pallas_kernels import grouped_swiglu

# (x_TD, expert_TK, weight_TK) -> y_TD
RoutedExperts = Callable[[Array, Array, Array], Array]
ROUTING = "routing"  # checkpoint_name of scores and choices


class RouterStats(NamedTuple):
    """What one MoE layer tells training: tokens routed to each expert, and the sequence-wise balance loss."""

    load_E: Float[Array, "*layers E"]
    balance_loss: Float[Array, "*layers"]


class Router(nnx.Module):
    """Affinities are sigmoids; the bias decides who is chosen, never how much a choice weighs (equations 13-16)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        self.w_DE = weight(rngs, config.initializer_range, embed=config.hidden_size, experts=config.n_routed_experts)
        self.bias_E = RouterBias(jnp.zeros(config.n_routed_experts, jnp.float32), logical_axes=("experts",))

    def scores(self, x_TD: Array) -> Float[Array, "T E"]:
        """float32 affinities whatever the compute dtype: bfloat16 flips choices."""
        return checkpoint_name(jax.nn.sigmoid(linear(x_TD.astype(jnp.float32), self.w_DE[...])), ROUTING)

    def choose(self, score_TE: Array) -> tuple[Int[Array, "T K"], Float[Array, "T K"]]:
        """Group-limited top-k: the best groups by the sum of their two best biased scores, then the best experts there."""
        config = self.config
        T, E = score_TE.shape
        biased_TGE = (score_TE + self.bias_E[...]).reshape(T, config.n_group, -1)
        if config.topk_group < config.n_group:
            group_score_TG = jax.lax.top_k(biased_TGE, 2)[0].sum(-1)
            group_TK = jax.lax.top_k(group_score_TG, config.topk_group)[1]
            kept_TG = (group_TK[:, :, None] == jnp.arange(config.n_group)).any(1)
            biased_TGE = jnp.where(kept_TG[:, :, None], biased_TGE, -jnp.inf)
        expert_TK = jax.lax.top_k(biased_TGE.reshape(T, E), config.num_experts_per_tok)[1]
        expert_TK = checkpoint_name(expert_TK, ROUTING)
        weight_TK = jnp.take_along_axis(score_TE, expert_TK, axis=-1)
        if config.norm_topk_prob:
            weight_TK /= weight_TK.sum(-1, keepdims=True) + 1e-20
        return expert_TK, weight_TK * config.routed_scaling_factor


def sequence_balance_loss(score_BLE: Float[Array, "B L E"], top_k: int) -> Float[Array, ""]:
    """Equations 17-20 without alpha, mean over sequences: E/K * sum_e share of top-k choices * mean normalised score.

    The choices here are the top-k of the unbiased scores, as equation 18 has it.
    """
    E = score_BLE.shape[-1]
    chosen_BLK = jax.lax.top_k(jax.lax.stop_gradient(score_BLE), top_k)[1]
    chosen_BLE = (chosen_BLK[..., None] == jnp.arange(E)).any(-2)
    f_BE = chosen_BLE.mean(1, dtype=jnp.float32) * (E / top_k)
    p_BE = (score_BLE / score_BLE.sum(-1, keepdims=True)).mean(1)
    return (f_BE * p_BE).sum(-1).mean()


class MoE(nnx.Module):
    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        D, E, M, std = (
            config.hidden_size,
            config.n_routed_experts,
            config.moe_intermediate_size,
            config.initializer_range,
        )
        self.router = Router(config, rngs)
        self.w_gate_up_ED2M = weight(rngs, std, experts=E, embed=D, gate_up=2, moe_ffn=M)
        self.w_down_EMD = weight(rngs, std, experts=E, moe_ffn=M, embed=D)
        self.shared = SwiGLU(config, M * config.n_shared_experts, rngs)

    def __call__(self, x_BLD: Float[Array, "B L D"]) -> tuple[Float[Array, "B L D"], RouterStats]:
        B, L, D = x_BLD.shape
        E, K = self.config.n_routed_experts, self.config.num_experts_per_tok
        x_TD = x_BLD.reshape(B * L, D)
        score_TE = self.router.scores(x_TD)
        expert_TK, weight_TK = self.router.choose(score_TE)
        y_TD = grouped_swiglu(
            x_TD, self.w_gate_up_ED2M.astype(x_TD.dtype), self.w_down_EMD.astype(x_TD.dtype), expert_TK, weight_TK
        )
        stats = RouterStats(
            load_E=jnp.bincount(expert_TK.reshape(-1), length=E).astype(jnp.float32),
            balance_loss=sequence_balance_loss(score_TE.reshape(B, L, E), K),
        )
        return y_TD.reshape(B, L, D) + self.shared(x_BLD), stats

    def decode(self, x_BLD: Float[Array, "B L D"], experts: RoutedExperts) -> Float[Array, "B L D"]:
        """As `__call__`, with the routed experts given as a function: decoding keeps their weights in its own layout."""
        x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
        y_TD = experts(x_TD, *self.router.choose(self.router.scores(x_TD)))
        return y_TD.reshape(x_BLD.shape) + self.shared(x_BLD)
