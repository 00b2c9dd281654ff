"""A module's products in 8 or 16 bits, as an input of the step says, and statistics of them for the controller.

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

# A class's products differ in what they sum over: the hidden size, a latent of MLA, heads or a feed-forward's inside.
SLOTS = {"embed": 0, "latent": 1, "heads": 2, "ffn": 2}
OPERANDS = ("activations", "weights", "gradients")  # x, w and dy of y = x w
STATISTICS = ("count", "amax", "overflow", "underflow", "error")
_SAMPLED = 2 * TILE  # rows of an operand that are quantised to measure the error


class EightBit(nnx.Variable):
    """bool: whether the module's products take 8-bit operands. Set by the controller, outside the gradient."""


class Probe(nnx.Variable):
    """f32[slots, operands, statistics] zeros, whose gradient is the statistics."""


def statistics(
    array: Array, sample_MK: Float[Array, "M K"], rows: int, format: str, gemms: Gemms
) -> Float[Array, " statistics"]:
    """Measure one operand of a product.

    Args:
        array: the operand, of any shape.
        sample_MK: the rows of it that are rounded to the format.
        rows: rows of a block that shares a scale, if `gemms` has scales by block.
        format: e4m3, e5m2 or int8.

    Returns:
        f32[5] in the order of STATISTICS: a count of 1, the largest magnitude, and of the sample the fractions that are not
        finite and that become zero, and the relative error (root of the sums of squares).
    """
    exact = sample_MK.astype(jnp.float32)
    found = rounded(exact, None if gemms.per_tensor else rows, format, gemms.power_of_two)  # type: ignore[arg-type]
    unit = jnp.maximum(jnp.max(jnp.abs(exact)), 1e-30)  # squares of very large or small numbers leave float32
    error, total = jnp.sum(jnp.square((found - exact) / unit)), jnp.sum(jnp.square(exact / unit))
    amax = jnp.max(jnp.abs(array)).astype(jnp.float32)
    overflow, underflow = ~jnp.isfinite(exact), (found == 0) & (exact != 0)
    return jnp.stack([jnp.float32(1), amax, overflow.mean(), underflow.mean(), jnp.sqrt(error / jnp.maximum(total, 1e-30))])


def _token_statistics(x_BLK: Array, format: str, gemms: Gemms) -> Float[Array, " statistics"]:
    B, L, K = x_BLK.shape
    every = max(1, min(L, B * L // _SAMPLED))
    return statistics(x_BLK, x_BLK[:, ::every].reshape(-1, K)[: max(_SAMPLED, B)], 1, format, gemms)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def record_statistics(gemms: Gemms, slot: int, y_BLX: Array, probe: Array, statistics: Array) -> Array:
    """Return y; its gradient passes unchanged, and that of the probe is the statistics of x, w and dy."""
    return y_BLX


def _record_bwd(gemms: Gemms, slot: int, residuals, dy_BLX: Array):
    x_and_w, probe = residuals
    dy_statistics = _token_statistics(dy_BLX.reshape(*dy_BLX.shape[:2], -1), gemms.dgrad, gemms)
    probe_grad = jnp.zeros_like(probe).at[slot].set(jnp.concatenate([x_and_w, dy_statistics[None]]))
    return dy_BLX, probe_grad, jnp.zeros_like(x_and_w)


record_statistics.defvjp(lambda gemms, slot, y_BLX, probe, x_and_w: (y_BLX, (x_and_w, probe)), _record_bwd)


Product = Callable[..., Any]  # (constants, *arrays) -> what may be differentiated by the arrays


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def select_precision(low: Product, high: Product, use_low: Array, constants: Any, *arrays: Array) -> Any:
    """Compute one of two products of the same result, `low` in 8 bits or `high` in 16.

    The arrays are kept for the backward pass: what the branches would keep differs, and only one is
    run.
    """
    return lax.cond(use_low, low, high, constants, *arrays)


def _select_fwd(low, high, use_low, constants, *arrays):
    return select_precision(low, high, use_low, constants, *arrays), (use_low, constants, arrays)


def _select_bwd(low, high, residuals, dy):
    use_low, constants, arrays = residuals

    def backward(product: Product):
        return lambda constants, arrays, dy: jax.vjp(functools.partial(product, constants), *arrays)[1](dy)

    gradients = lax.cond(use_low, backward(low), backward(high), constants, arrays, dy)
    return None, None, *gradients


select_precision.defvjp(_select_fwd, _select_bwd)


class Switch(nnx.Module):
    """The `eight_bit` flag of one module and op class, and the probe that its products report to."""

    def __init__(self, op_class: str, gemms: Gemms):
        self.gemms = gemms
        self.eight_bit = EightBit(jnp.bool_(True), logical_axes=(), op_class=op_class, gemms=gemms)
        shape = (max(SLOTS.values()) + 1, len(OPERANDS), len(STATISTICS))
        self.probe = Probe(jnp.zeros(shape, jnp.float32), logical_axes=("slot", "operand", "statistic"))

    def linear(self, low: Product, high: Product, slot: str, operand_BLK: Array, x: Array, w: Array) -> Array:
        """low(None, x, w) or high(None, x, w); `slot` names what is summed over, `operand_BLK` what x is in the product."""
        y_BLX = select_precision(low, high, self.eight_bit[...], None, x, w)
        return self._record(y_BLX, slot, operand_BLK, [(w, w.reshape(w.shape[0], -1)[:_SAMPLED])])

    def experts(
        self,
        low: Product,
        high: Product,
        constants: Any,
        x_BLD: Array,
        w_gate_up_ED2M: Array,
        w_down_EMD: Array,
        *rest: Array,
    ) -> Any:
        """low(constants, x, w_gate_up, w_down, *rest) or high(...), whose first result is y.

        What lies between an expert's two products is not sampled: it exists only inside the kernel.
        """
        y_BLD, traffic = select_precision(low, high, self.eight_bit[...], constants, x_BLD, w_gate_up_ED2M, w_down_EMD, *rest)
        gate_up, down = w_gate_up_ED2M[:, :TILE, :, :TILE], w_down_EMD[:, :TILE, :TILE]  # one block of each expert's
        samples = gate_up.reshape(-1, 2 * gate_up.shape[-1]), down.reshape(-1, down.shape[-1])
        return self._record(y_BLD, "embed", x_BLD, [(w_gate_up_ED2M, samples[0]), (w_down_EMD, samples[1])]), traffic

    def _record(self, y_BLX: Array, slot: str, x_BLK: Array, weights: list[tuple[Array, Array]]) -> Array:
        """Record the statistics of x and of the weights, each of which comes with its sample."""
        gemms = self.gemms
        x_statistics = _token_statistics(lax.stop_gradient(x_BLK), gemms.forward, gemms)
        w_statistics = [statistics(*lax.stop_gradient(w), TILE, gemms.forward, gemms) for w in weights]
        x_and_w = jnp.stack([x_statistics, jnp.sum(jnp.stack(w_statistics), axis=0)])
        return record_statistics(gemms, SLOTS[slot], y_BLX, self.probe[...], x_and_w)
