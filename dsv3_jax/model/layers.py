"""The small layers: linear, norm, SwiGLU.

Axis letters: B batch, L length, T = B*L tokens, D hidden, H heads, V vocabulary, Q q_lora, C kv_lora, N nope, R rope,
U v_head_dim, F dense ffn, M moe ffn, E experts, G expert groups, K choices a token.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.layout import Layout
from dsv3_jax.model.parameters import NORM, Kind, constant, weight
from dsv3_jax.precision.recipes import Recipe
from dsv3_jax.precision.switch import Switch
from pallas_kernels import integer_linear
from pallas_kernels.integer_weight import IntegerWeight
from pallas_kernels.products import dot, dot_general

FFN_GATE_UP = "ffn_gate_up"  # checkpoint_name of a dense feed-forward layer's first product
NORM_EPS_LATENT = 1e-6  # transformers fixes the two latent norms' epsilon, whatever rms_norm_eps says


@jax.custom_vjp
def _matmul(x_XK, w_KN):
    return dot(x_XK, w_KN)


def _matmul_bwd(residuals, dy_XN):
    # X stays several axes: merged ones could not keep a sharding of both batch and length
    x_XK, w_KN = residuals
    leading = tuple(range(x_XK.ndim - 1))
    dx_XK = dot_general(dy_XN, w_KN, (((x_XK.ndim - 1,), (1,)), ((), ())))
    return dx_XK, dot_general(x_XK, dy_XN, ((leading, leading), ((), ())))


_matmul.defvjp(lambda x_XK, w_KN: (_matmul(x_XK, w_KN), (x_XK, w_KN)), _matmul_bwd)


def linear(x: Float[Array, "... K"], w: Float[Array, "K ..."] | IntegerWeight) -> Float[Array, "..."]:
    """x w in x's dtype, over the last axis of x and the first of w.

    One plain matrix product forward and two backward, contracting the axis where it lies: autodiff of an einsum asks for
    transposed results, which costs CPU a copy of an operand and half the rate (51 against 100 GFLOP/s a core here).
    """
    if isinstance(w, IntegerWeight):
        y = integer_linear(x.reshape(-1, x.shape[-1]), w)
        return y.reshape(*x.shape[:-1], *y.shape[1:])
    w_KN = w.reshape(w.shape[0], -1).astype(x.dtype)
    return _matmul(x, w_KN).reshape(*x.shape[:-1], *w.shape[1:])


class Linear(nnx.Module):
    """`linear` in a module's formats: in 8 bits with `gemms`, whose products the layout runs, if its switch says so."""

    def __init__(self, op_class: str, recipe: Recipe, layout: Layout):
        self.gemms, self.layout = getattr(recipe, op_class), layout
        self.switch = Switch(op_class, self.gemms) if recipe.controlled and self.gemms else None

    def __call__(
        self, x: Float[Array, "B L K"] | Float[Array, "B L 2 K"], w: Float[Array, "K ..."] | IntegerWeight, *axes: str | None
    ) -> Float[Array, "B L ..."]:
        """x w, or swiglu(x) w of a gate and what passes it; `axes` are w's logical axes."""

        def scaled(_, x, w):
            return self.layout.scaled_linear(x, w, self.gemms, axes)  # type: ignore[arg-type]

        def plain(_, x, w):
            return linear(swiglu(x) if x.ndim == 4 else x, w)

        if self.gemms is None or isinstance(w, IntegerWeight):
            return plain(None, x, w)
        if self.switch is None:
            return scaled(None, x, w)
        operand = swiglu(x) if x.ndim == 4 else x
        return self.switch.linear(scaled, plain, str(axes[0]), operand, x, w)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, computed in float32."""

    def __init__(self, size: int, eps: float):
        self.scale = constant(1.0, NORM, norm=size)
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

    def __init__(self, config: ModelConfig, ffn_size: int, kind: Kind, layout: Layout, recipe: Recipe, rngs: nnx.Rngs):
        std, D = config.initializer_range, config.hidden_size
        self.layout, self.linear = layout, Linear("ffn", recipe, layout)
        self.w_gate_up_D2F = weight(rngs, std, kind, embed=D, gate_up=2, ffn=ffn_size)
        self.w_down_FD = weight(rngs, std, kind, ffn=ffn_size, embed=D)

    def __call__(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        x_BLD = self.layout.constrain(x_BLD, "batch", None, None)
        gate_up_BL2F = self.linear(x_BLD, self.w_gate_up_D2F[...], "embed", None, "ffn")
        gate_up_BL2F = self.layout.constrain(gate_up_BL2F, "batch", None, None, "ffn")
        if self.linear.gemms is None:  # in 8 bits, the product that takes it keeps it
            gate_up_BL2F = checkpoint_name(gate_up_BL2F, FFN_GATE_UP)
        return self.layout.constrain(self.linear(gate_up_BL2F, self.w_down_FD[...], "ffn", "embed"), "batch", "sequence", None)
