"""Which experts a token goes to: the contract of a router, and DeepSeek-V3's (arXiv 2412.19437, section 2.1.2)."""

from abc import abstractmethod

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.layers import linear
from dsv3_jax.model.layout import Layout
from dsv3_jax.model.parameters import ROUTER, RouterBias, weight

ROUTING = "routing"  # checkpoint_name of scores and choices


class Router(nnx.Module):
    """Scores experts and chooses some. What it keeps besides parameters are `RouterBias` variables, which have no gradient."""

    @abstractmethod
    def scores(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L E"]:
        """Positive affinities, also what the balance loss is about."""

    @abstractmethod
    def choose(self, score_BLE: Float[Array, "B L E"]) -> tuple[Int[Array, "B L K"], Float[Array, "B L K"]]:
        """The experts of every token, and how much each choice weighs."""

    def after_step(self, load_E: Float[Array, "*layers E"], speed: float) -> None:
        """Update what has no gradient by the tokens that each expert had in a step.

        Of stacked layers, the router's variables carry the leading axis, too. `speed` is `train.bias_update_speed`.
        """


class SigmoidRouter(Router):
    """Affinities are sigmoids; the bias decides who is chosen, never how much a choice weighs (equations 13-16)."""

    def __init__(self, config: ModelConfig, layout: Layout, rngs: nnx.Rngs):
        self.config, self.layout = config, layout
        self.w_DE = weight(rngs, config.initializer_range, ROUTER, embed=config.hidden_size, scores=config.n_routed_experts)
        self.bias_E = RouterBias(jnp.zeros(config.n_routed_experts, jnp.float32), logical_axes=("scores",), kind=ROUTER)

    def scores(self, x_BLD: Array) -> Float[Array, "B L E"]:
        """float32 affinities whatever the compute dtype: bfloat16 flips choices."""
        return checkpoint_name(jax.nn.sigmoid(linear(x_BLD.astype(jnp.float32), self.w_DE[...])), ROUTING)

    def choose(self, score_BLE: Array) -> tuple[Int[Array, "B L K"], Float[Array, "B L K"]]:
        """Group-limited top-k: the best groups by the sum of their two best biased scores, then the best experts there."""
        config = self.config
        expert_BLK = self.layout.tokenwise(self._choose_experts, jax.lax.stop_gradient(score_BLE), self.bias_E[...])
        expert_BLK = checkpoint_name(expert_BLK, ROUTING)
        weight_BLK = jnp.take_along_axis(score_BLE, expert_BLK, axis=-1)
        if config.norm_topk_prob:
            weight_BLK /= weight_BLK.sum(-1, keepdims=True) + 1e-20
        return expert_BLK, weight_BLK * config.routed_scaling_factor

    def _choose_experts(self, score_BLE: Array, bias_E: Array) -> Int[Array, "B L K"]:
        config = self.config
        B, L, E = score_BLE.shape
        biased_BLGE = (score_BLE + bias_E).reshape(B, L, config.n_group, -1)
        if config.topk_group < config.n_group:
            group_score_BLG = jax.lax.top_k(biased_BLGE, 2)[0].sum(-1)
            group_BLK = jax.lax.top_k(group_score_BLG, config.topk_group)[1]
            kept_BLG = (group_BLK[..., None] == jnp.arange(config.n_group)).any(2)
            biased_BLGE = jnp.where(kept_BLG[..., None], biased_BLGE, -jnp.inf)
        return jax.lax.top_k(biased_BLGE.reshape(B, L, E), config.num_experts_per_tok)[1]

    def after_step(self, load_E: Float[Array, "*layers E"], speed: float) -> None:
        """Raise the bias of experts below the mean load by `speed`, lower that of those above (section 2.1.2)."""
        bias_E = self.bias_E[...]
        load_E = load_E.reshape(bias_E.shape)
        self.bias_E[...] = bias_E + speed * jnp.sign(load_E.mean(-1, keepdims=True) - load_E)


def make_router(config: ModelConfig, layout: Layout, rngs: nnx.Rngs) -> Router:
    """The router of a model's MoE layers. Another one is chosen here, by the configuration."""
    return SigmoidRouter(config, layout, rngs)
