"""Chunked head and cross-entropy: a scan over tokens that computes the gradients on the way forward.

The loss is a sum, so its gradient with respect to the logits, weight * (softmax - onehot), is known as soon as a chunk's
logits are; the backward pass only scales what the forward pass made. Three matmuls in all, against four with recomputation.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import registry
from pallas_kernels.linear_cross_entropy import hopper, tpu
from pallas_kernels.linear_cross_entropy.statistics import logit_statistics
from pallas_kernels.products import dot

# Tokens of a chunk. In plain JAX, 512: 16 MB of float32 logits at V = 8192, and a matmul large enough to run at speed on a
# CPU. On an accelerator dw's float32 sums go through memory once a chunk, which takes 2048 tokens' products to hide.
_CHUNK, _CHUNK_OF_KERNELS = 512, 2048
OPERATION = "logit_statistics"
for _name in registry.PLAIN:
    registry.register(OPERATION, _name, logit_statistics)
registry.register(OPERATION, "tpu", tpu.logit_statistics)
registry.register(OPERATION, "hopper", hopper.logit_statistics)


class Setting(NamedTuple):
    """Mesh axes over which the vocabulary is sharded (w is then this device's columns, and targets count from the first of
    them, so that they may lie outside; called inside `shard_map`), and who computes a chunk's logits."""

    axes: tuple[str, ...] = ()
    implementation: str = "xla"
    interpret: Any = None


def _chunks(x_TD, target_T, weight_T, setting: Setting):
    T = x_TD.shape[0]
    chunk = min(_CHUNK if setting.implementation in ("auto", *registry.PLAIN) else _CHUNK_OF_KERNELS, T)
    pad = -T % chunk

    def cut(a):
        return jnp.pad(a, ((0, pad),) + ((0, 0),) * (a.ndim - 1)).reshape(-1, chunk, *a.shape[1:])

    return cut(x_TD), cut(target_T), cut(weight_T)  # padding has weight 0


def _chunk_loss(x, w_DV, target, weight, setting: Setting, keep: bool):
    """(weighted nll, weighted count of right guesses), log-sum-exps over the whole vocabulary, and logits if kept."""
    top, total, at_target, logits = registry.run(OPERATION, setting.implementation, (x, w_DV, target, keep), setting.interpret)
    if setting.axes:
        top_here, top = top, lax.pmax(top, setting.axes)
        total, at_target = lax.psum((total * jnp.exp(top_here - top), at_target), setting.axes)
    lse = top + jnp.log(total)
    correct = at_target >= top  # argmax, but a tie counts as right
    return (jnp.sum(weight * (lse - at_target)), jnp.sum(weight * correct)), lse, logits


def loss(x_TD, w_DV, target_T, weight_T, setting: Setting):
    """The two sums."""

    def body(sums, chunk):
        x, target, weight = chunk
        chunk_sums, _, _ = _chunk_loss(x, w_DV, target, weight, setting, keep=False)
        return jax.tree.map(jnp.add, sums, chunk_sums), None

    return lax.scan(body, (jnp.float32(0), jnp.float32(0)), _chunks(x_TD, target_T, weight_T, setting))[0]


def loss_and_gradients(x_TD, w_DV, target_T, weight_T, setting: Setting):
    """(`loss`, (dx_TD, f32 dw_DV)). With a sharded vocabulary dx is these columns' part of a sum over the shards."""

    def body(carry, chunk):
        sums, dw_DV = carry
        x, target, weight = chunk
        chunk_sums, lse, logits = _chunk_loss(x, w_DV, target, weight, setting, keep=True)
        onehot = target[:, None] == jnp.arange(w_DV.shape[1])
        dlogits = ((jnp.exp(logits - lse[:, None]) - onehot) * weight[:, None]).astype(x.dtype)
        dx = dot(dlogits, w_DV.T, dtype=jnp.float32).astype(x.dtype)
        dw_DV = dw_DV + dot(x.T, dlogits, dtype=jnp.float32)
        return (jax.tree.map(jnp.add, sums, chunk_sums), dw_DV), dx

    init = (jnp.float32(0), jnp.float32(0)), jnp.zeros(w_DV.shape, jnp.float32)
    (sums, dw_DV), dx = lax.scan(body, init, _chunks(x_TD, target_T, weight_T, setting))
    return sums, (dx.reshape(-1, x_TD.shape[1])[: x_TD.shape[0]], dw_DV)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _loss(x_TD, w_DV, target_T, weight_T, setting: Setting):
    return loss(x_TD, w_DV, target_T, weight_T, setting)


def _loss_fwd(x_TD, w_DV, target_T, weight_T, setting: Setting):
    sums, (dx_TD, dw_DV) = loss_and_gradients(x_TD, w_DV, target_T, weight_T, setting)
    return sums, (dx_TD, dw_DV.astype(w_DV.dtype))


def _loss_bwd(_, residuals, cotangents):
    dx_TD, dw_DV = residuals
    scale = cotangents[0]
    return (dx_TD * scale).astype(dx_TD.dtype), (dw_DV * scale).astype(dw_DV.dtype), None, None


_loss.defvjp(_loss_fwd, _loss_bwd)


@functools.partial(jax.named_call, name="linear_cross_entropy_chunked")
def linear_cross_entropy(x_TD, w_DV, target_T, weight_T, implementation: str, interpret: Any = None):
    """See `api.linear_cross_entropy`."""
    return _loss(x_TD, w_DV, target_T, weight_T, Setting((), implementation, interpret))
