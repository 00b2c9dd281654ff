"""A module's products in 8 or 16 bits, as an input of the step says, and what the controller is told about them.

The choice is an array, so one compiled step serves every choice. Statistics of gradients exist only inside the backward pass:
they leave it as the gradient of a `Probe`, zeros that change nothing, and are summed over microbatches, replicas and devices as
gradients are. So each statistic comes with a count, and the controller divides.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.quantize.reference import rounded
from pallas_kernels.scaled import TILE, Gemms

# A class's products are told apart by what they sum over: the hidden size, a latent of MLA, heads or a feed-forward's inside.
SLOTS = {"embed": 0, "latent": 1, "heads": 2, "ffn": 2}
OPERANDS = ("activations", "weights", "gradients")  # x, w and dy of y = x w
STATISTICS = ("count", "amax", "overflow", "underflow", "error")
_SAMPLED = 2 * TILE  # rows of an operand that are quantised to see what is lost


class EightBit(nnx.Variable):
    """bool: whether the module's products take 8-bit operands. Set by the controller, outside the gradient."""


class Probe(nnx.Variable):
    """f32[slots, operands, statistics] zeros, whose gradient is the statistics."""


def statistics(
    array: Array, sample_MK: Float[Array, "M K"], rows: int, format: str, gemms: Gemms
) -> Float[Array, " statistics"]:
    """Of one operand: a count of 1, its largest magnitude, and of a sample as the format would hold it the fractions that
    are not finite or become zero and the relative error (root of the sums of squares)."""
    exact = sample_MK.astype(jnp.float32)
    found = rounded(exact, None if gemms.per_tensor else rows, format, gemms.power_of_two)  # type: ignore[arg-type]
    unit = jnp.maximum(jnp.max(jnp.abs(exact)), 1e-30)  # squares of very large or small numbers leave float32
    lost, all_ = jnp.sum(jnp.square((found - exact) / unit)), jnp.sum(jnp.square(exact / unit))
    amax = jnp.max(jnp.abs(array)).astype(jnp.float32)
    overflow, underflow = ~jnp.isfinite(exact), (found == 0) & (exact != 0)
    return jnp.stack([jnp.float32(1), amax, overflow.mean(), underflow.mean(), jnp.sqrt(lost / jnp.maximum(all_, 1e-30))])


def _of_tokens(x_BLK: Array, format: str, gemms: Gemms) -> Float[Array, " statistics"]:
    B, L, K = x_BLK.shape
    every = max(1, min(L, B * L // _SAMPLED))
    return statistics(x_BLK, x_BLK[:, ::every].reshape(-1, K)[: max(_SAMPLED, B)], 1, format, gemms)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _told(gemms: Gemms, slot: int, y_BLX: Array, probe: Array, statistics: Array) -> Array:
    """y; its gradient passes, and hands the probe the statistics of x, w and dy."""
    return y_BLX


def _told_bwd(gemms: Gemms, slot: int, residuals, dy_BLX: Array):
    told, like = residuals
    of_dy = _of_tokens(dy_BLX.reshape(*dy_BLX.shape[:2], -1), gemms.dgrad, gemms)
    return dy_BLX, jnp.zeros_like(like).at[slot].set(jnp.concatenate([told, of_dy[None]])), jnp.zeros_like(told)


_told.defvjp(lambda gemms, slot, y_BLX, probe, told: (y_BLX, (told, probe)), _told_bwd)


Product = Callable[..., Any]  # (constants, *arrays) -> what may be differentiated by the arrays


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _either(eight: Product, sixteen: Product, in_eight_bits: Array, constants: Any, *arrays: Array) -> Any:
    """One of the two. The arrays are kept for the backward pass: what the branches would keep differs, and one is not run."""
    return lax.cond(in_eight_bits, eight, sixteen, constants, *arrays)


def _either_fwd(eight, sixteen, in_eight_bits, constants, *arrays):
    return _either(eight, sixteen, in_eight_bits, constants, *arrays), (in_eight_bits, constants, arrays)


def _either_bwd(eight, sixteen, residuals, dy):
    in_eight_bits, constants, arrays = residuals

    def backward(product: Product):
        return lambda constants, arrays, dy: jax.vjp(functools.partial(product, constants), *arrays)[1](dy)

    gradients = lax.cond(in_eight_bits, backward(eight), backward(sixteen), constants, arrays, dy)
    return None, None, *gradients


_either.defvjp(_either_fwd, _either_bwd)


class Switch(nnx.Module):
    """Of one module and op class: its `eight_bit` flag, and the probe that its products report to."""

    def __init__(self, op_class: str, gemms: Gemms):
        self.gemms = gemms
        self.eight_bit = EightBit(jnp.bool_(True), logical_axes=(), op_class=op_class, gemms=gemms)
        shape = (max(SLOTS.values()) + 1, len(OPERANDS), len(STATISTICS))
        self.probe = Probe(jnp.zeros(shape, jnp.float32), logical_axes=("slot", "operand", "statistic"))

    def linear(self, eight: Product, sixteen: Product, slot: str, operand_BLK: Array, x: Array, w: Array) -> Array:
        """eight(None, x, w) or sixteen(None, x, w); `slot` names what is summed over, `operand_BLK` is what x makes for it."""
        y_BLX = _either(eight, sixteen, self.eight_bit[...], None, x, w)
        return self._told(y_BLX, slot, operand_BLK, [(w, w.reshape(w.shape[0], -1)[:_SAMPLED])])

    def experts(
        self,
        eight: Product,
        sixteen: Product,
        constants: Any,
        x_BLD: Array,
        w_gate_up_ED2M: Array,
        w_down_EMD: Array,
        *rest: Array,
    ) -> Any:
        """eight(constants, x, w_gate_up, w_down, *rest) or sixteen(...), whose first result is y.

        What lies between an expert's two products is not sampled: it exists only inside the kernel.
        """
        y_BLD, traffic = _either(eight, sixteen, self.eight_bit[...], constants, x_BLD, w_gate_up_ED2M, w_down_EMD, *rest)
        gate_up, down = w_gate_up_ED2M[:, :TILE, :, :TILE], w_down_EMD[:, :TILE, :TILE]  # one block of each expert's
        samples = gate_up.reshape(-1, 2 * gate_up.shape[-1]), down.reshape(-1, down.shape[-1])
        return self._told(y_BLD, "embed", x_BLD, [(w_gate_up_ED2M, samples[0]), (w_down_EMD, samples[1])]), traffic

    def _told(self, y_BLX: Array, slot: str, x_BLK: Array, weights: list[tuple[Array, Array]]) -> Array:
        """`weights`: each with its sample."""
        gemms = self.gemms
        of_x = _of_tokens(lax.stop_gradient(x_BLK), gemms.forward, gemms)
        of_w = [statistics(*lax.stop_gradient(w), TILE, gemms.forward, gemms) for w in weights]
        return _told(gemms, SLOTS[slot], y_BLX, self.probe[...], jnp.stack([of_x, jnp.sum(jnp.stack(of_w), axis=0)]))
