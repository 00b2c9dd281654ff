"""Parameters and the small layers: every array is declared once, with its shape, logical axes and scale.

Axis letters: B batch, L length, T = B*L tokens, D hidden, H heads, V vocabulary, Q q_lora, C kv_lora, N nope, R rope,
U v_head_dim, F dense ffn, M moe ffn, E experts, G expert groups, K choices a token.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from dsv3_jax.config import ModelConfig

FFN_GATE_UP = "ffn_gate_up"  # checkpoint_name of a dense feed-forward layer's first product
NORM_EPS_LATENT = 1e-6  # transformers fixes the two latent norms' epsilon, whatever rms_norm_eps says


class RouterBias(nnx.Variable):
    """The balancing bias of a router: state that training updates by load, outside the gradient."""


def weight(rngs: nnx.Rngs, std: float, **axes: int) -> nnx.Param:
    """A normal(0, std) float32 matrix; `axes` maps logical axis names to sizes, in order."""
    value = std * jax.random.normal(rngs.params(), tuple(axes.values()), jnp.float32)
    return nnx.Param(value, logical_axes=tuple(axes))


def constant(fill: float, **axes: int) -> nnx.Param:
    """A float32 vector (a norm's scale or a bias): not decayed by the optimiser, which looks at `logical_axes`."""
    return nnx.Param(jnp.full(tuple(axes.values()), fill, jnp.float32), logical_axes=tuple(axes))


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, computed in float32."""

    def __init__(self, size: int, eps: float):
        self.scale = constant(1.0, norm=size)
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (x32 * self.scale[...]).astype(x.dtype)


@jax.custom_vjp
def swiglu(gate_up_X2F: Float[Array, "*X 2 F"]) -> Float[Array, "*X F"]:
    """silu(gate) * up. Its own gradient, so that both halves' come out of one pass (autodiff pads and adds them)."""
    return jax.nn.silu(gate_up_X2F[..., 0, :]) * gate_up_X2F[..., 1, :]


def _swiglu_bwd(gate_up_X2F, dh_XF):
    gate, up = gate_up_X2F[..., 0, :], gate_up_X2F[..., 1, :]
    sigmoid = jax.nn.sigmoid(gate)
    dgate = dh_XF * up * sigmoid * (1 + gate * (1 - sigmoid))
    return (jnp.stack([dgate, dh_XF * gate * sigmoid], axis=-2),)


swiglu.defvjp(lambda gate_up_X2F: (swiglu(gate_up_X2F), gate_up_X2F), _swiglu_bwd)


class SwiGLU(nnx.Module):
    """(silu(x W_gate) * (x W_up)) W_down: the dense feed-forward layer, and the shared experts."""

    def __init__(self, config: ModelConfig, ffn_size: int, rngs: nnx.Rngs):
        std, D = config.initializer_range, config.hidden_size
        self.w_gate_up_D2F = weight(rngs, std, embed=D, gate_up=2, ffn=ffn_size)
        self.w_down_FD = weight(rngs, std, ffn=ffn_size, embed=D)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        gate_up = jnp.einsum("...d,dxf->...xf", x, self.w_gate_up_D2F.astype(x.dtype))
        h = swiglu(checkpoint_name(gate_up, FFN_GATE_UP))
        return jnp.einsum("...f,fd->...d", h, self.w_down_FD.astype(x.dtype))
