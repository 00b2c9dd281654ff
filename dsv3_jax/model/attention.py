"""Multi-head latent attention, MLA (arXiv 2412.19437, section 2.1.1, equations 1-11).

Unusual against plain attention: queries, and keys with values, pass through low-rank latents; position lives in R extra
dimensions, whose key is one for all heads; only the latent c_kv and that key need caching. Training expands the latents
to heads. Decoding absorbs the expansion into the query and the output instead (section 2.1.1 of arXiv 2405.04434), so
that attention runs over the cached latents themselves.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.layers import NORM_EPS_LATENT, Linear, RMSNorm
from dsv3_jax.model.layout import Layout
from dsv3_jax.model.parameters import ATTENTION, constant, vector, weight
from dsv3_jax.model.rope import attention_scale, rotate
from dsv3_jax.precision.recipes import Recipe
from pallas_kernels.products import einsum

RopeTable = tuple[Array, Array]
LATENTS = "mla_latents"  # checkpoint_name of the down-projections' results


class Absorbed(NamedTuple):
    """The halves of `w_kv_b_CHX` as decoding multiplies them: one matrix a head."""

    w_k_HNC: Float[Array, "H N C"]
    w_v_HCU: Float[Array, "H C U"]


class Attention(nnx.Module):
    def __init__(self, config: ModelConfig, layout: Layout, recipe: Recipe, rngs: nnx.Rngs):
        self.config, self.layout, self.linear = config, layout, Linear("attention", recipe, layout)
        self.core = recipe.core
        D, H, C, R = config.hidden_size, config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim
        N, U, X, Q = config.qk_nope_head_dim, config.v_head_dim, config.qk_head_dim, config.q_lora_rank
        std = config.initializer_range
        if Q is None:
            self.w_q_DHX = weight(rngs, std, ATTENTION, embed=D, heads=H, qk_head=X)
        else:
            self.w_q_a_DQ = weight(rngs, std, ATTENTION, embed=D, q_lora=Q)
            self.q_a_norm = RMSNorm(Q, NORM_EPS_LATENT)
            self.w_q_b_QHX = weight(rngs, std, ATTENTION, latent=Q, heads=H, qk_head=X)
        self.w_kv_a_DX = weight(rngs, std, ATTENTION, embed=D, kv_lora_rope=C + R)
        self.kv_a_norm = RMSNorm(C, NORM_EPS_LATENT)
        self.w_kv_b_CHX = weight(rngs, std, ATTENTION, latent=C, heads=H, kv_head=N + U)
        self.w_o_HUD = weight(rngs, std, ATTENTION, heads=H, v_head=U, embed=D)
        if config.attention_bias:
            bias = vector("attention")
            if Q is not None:
                self.b_q_a_Q = constant(0.0, bias, q_lora=Q)
            self.b_kv_a_X = constant(0.0, bias, kv_lora_rope=C + R)
            self.b_o_D = constant(0.0, bias, embed=D)

    def query_latents(self, x_BLD: Array) -> Float[Array, "B L Q"]:
        """Equation 6, normalised: what the queries' up-projection reads, where there is one."""
        c_q_BLQ = self.linear(x_BLD, self.w_q_a_DQ[...], "embed", None)
        if self.config.attention_bias:
            c_q_BLQ += self.b_q_a_Q.astype(x_BLD.dtype)
        return self.q_a_norm(checkpoint_name(c_q_BLQ, LATENTS))

    def queries(self, x_BLD: Array, rope: RopeTable) -> tuple[Float[Array, "B L H N"], Float[Array, "B L H R"]]:
        """Equations 6-9: the part without and the part with position."""
        if self.config.q_lora_rank is None:
            q_BLHX = self.linear(x_BLD, self.w_q_DHX[...], "embed", "heads", None)
        else:
            q_BLHX = self.linear(self.query_latents(x_BLD), self.w_q_b_QHX[...], "latent", "heads", None)
        q_BLHX = self.layout.constrain(q_BLHX, "batch", None, "heads", None)
        q_nope_BLHN, q_rope_BLHR = jnp.split(q_BLHX, [self.config.qk_nope_head_dim], axis=-1)
        return q_nope_BLHN, rotate(q_rope_BLHR, rope)

    def latents(self, x_BLD: Array, rope: RopeTable) -> tuple[Float[Array, "B L C"], Float[Array, "B L R"]]:
        """Equations 1 and 3: all that decoding has to cache."""
        c_BLX = self.linear(x_BLD, self.w_kv_a_DX[...], "embed", None)
        if self.config.attention_bias:
            c_BLX += self.b_kv_a_X.astype(x_BLD.dtype)
        c_BLX = checkpoint_name(self.layout.constrain(c_BLX, "batch", None, None), LATENTS)
        c_kv_BLC, k_rope_BLR = jnp.split(c_BLX, [self.config.kv_lora_rank], axis=-1)
        return self.kv_a_norm(c_kv_BLC), rotate(k_rope_BLR, rope)

    def output(self, out_BLHU: Array) -> Float[Array, "B L D"]:
        """Equation 11."""
        H, U, D = self.w_o_HUD.shape
        u_BLD = self.linear(out_BLHU.reshape(*out_BLHU.shape[:2], H * U), self.w_o_HUD.reshape(H * U, D), "heads", "embed")
        return u_BLD + self.b_o_D.astype(u_BLD.dtype) if self.config.attention_bias else u_BLD

    def __call__(self, x_BLD: Float[Array, "B L D"], segment_BL: Int[Array, "B L"], rope: RopeTable) -> Float[Array, "B L D"]:
        """Attention of complete sequences, causal within each segment."""
        x_BLD = self.layout.constrain(x_BLD, "batch", None, None)
        return self.layout.constrain(self.output(self.heads(x_BLD, segment_BL, rope)), "batch", "sequence", None)

    def heads(self, x_BLD: Array, segment_BL: Array, rope: RopeTable) -> Float[Array, "B L H U"]:
        """What each head gathers (equation 10): the input of the output projection."""
        q_nope_BLHN, q_rope_BLHR = self.queries(x_BLD, rope)
        c_kv_BLC, k_rope_BLR = self.latents(x_BLD, rope)
        kv_BLHX = self.linear(c_kv_BLC, self.w_kv_b_CHX[...], "latent", "heads", None)
        k_nope_BLHN, v_BLHU = jnp.split(kv_BLHX, [self.config.qk_nope_head_dim], axis=-1)
        k_rope_BLHR = jnp.broadcast_to(k_rope_BLR[:, :, None], q_rope_BLHR.shape)
        q_BLHX = jnp.concatenate([q_nope_BLHN, q_rope_BLHR], axis=-1)
        k_BLHX = jnp.concatenate([k_nope_BLHN, k_rope_BLHR], axis=-1)
        q_BLHX, k_BLHX, v_BLHU = (self.layout.constrain(a, "batch", None, "heads", None) for a in (q_BLHX, k_BLHX, v_BLHU))
        out_BLHU = self.layout.attention(q_BLHX, k_BLHX, v_BLHU, segment_BL, attention_scale(self.config), self.core)
        return self.layout.constrain(out_BLHU, "batch", None, "heads", None)

    def absorbed(self, dtype: jnp.dtype) -> Absorbed:
        """The keys' and values' up-projections, dense: they multiply queries and outputs, not one input."""
        w_kv_b_CHX = self.w_kv_b_CHX.get_value()
        if isinstance(w_kv_b_CHX, Absorbed):
            return w_kv_b_CHX
        w_k_CHN, w_v_CHU = jnp.split(w_kv_b_CHX.astype(dtype), [self.config.qk_nope_head_dim], axis=-1)
        return Absorbed(jnp.transpose(w_k_CHN, (1, 2, 0)), jnp.swapaxes(w_v_CHU, 0, 1))

    def absorb(self, dtype: jnp.dtype) -> None:
        """Keep `absorbed` in place of the weight that it is of, for a model that only decodes."""
        self.w_kv_b_CHX = nnx.Param(self.absorbed(dtype), logical_axes=("heads",), kind=ATTENTION)

    def decode(
        self,
        x_BLD: Float[Array, "B L D"],
        rope: RopeTable,
        attend: Callable[[Float[Array, "B L H C"], Float[Array, "B L H R"]], Float[Array, "B L H C"]],
    ) -> Float[Array, "B L D"]:
        """Attention of new tokens over cached latents, with the up-projections absorbed.

        `attend` gives the queries' weighted sums of latents (see `serve.attend`). Tokens and weights meet on all devices; in
        between, sequences go to where their cache is, which is for `attend` to say.
        """
        q_nope_BLHN, q_rope_BLHR = self.queries(x_BLD, rope)
        absorbed = self.absorbed(x_BLD.dtype)
        out_latent_BLHC = attend(einsum("blhn,hnc->blhc", q_nope_BLHN, absorbed.w_k_HNC), q_rope_BLHR)
        out_BLHU = einsum("blhc,hcu->blhu", out_latent_BLHC, absorbed.w_v_HCU)
        return self.output(self.layout.constrain(out_BLHU, None, None, "heads", None))
