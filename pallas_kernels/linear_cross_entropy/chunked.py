"""Chunked head and cross-entropy: a scan over tokens that computes the gradients on the way forward.

The loss is a sum, so its gradient with respect to the logits, weight * (softmax - onehot), is known as soon as a chunk's
logits are; the backward pass only scales what the forward pass made. Three matmuls in all, against four with recomputation.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

_CHUNK = 512  # tokens: 16 MB of float32 logits at V = 8192, and a matmul large enough to run at speed


def _chunks(x_TD, target_T, weight_T):
    T = x_TD.shape[0]
    chunk = min(_CHUNK, T)
    pad = -T % chunk

    def cut(a):
        return jnp.pad(a, ((0, pad),) + ((0, 0),) * (a.ndim - 1)).reshape(-1, chunk, *a.shape[1:])

    return cut(x_TD), cut(target_T), cut(weight_T)  # padding has weight 0


def _chunk_loss(x, w_DV, target, weight, axes: tuple[str, ...]):
    """Weighted nll and count of right guesses, exp(logits - top) and its sum over the whole vocabulary."""
    logits = jnp.dot(x, w_DV, preferred_element_type=jnp.float32)
    here = (target >= 0) & (target < w_DV.shape[1])
    top = lax.pmax(logits.max(-1), axes) if axes else logits.max(-1)
    exp = jnp.exp(logits - top[:, None])
    at_target = jnp.where(here, jnp.take_along_axis(logits, target[:, None], axis=-1, mode="clip")[:, 0], 0)
    total, at_target = lax.psum((exp.sum(-1), at_target), axes) if axes else (exp.sum(-1), at_target)
    nll = jnp.log(total) + top - at_target
    correct = at_target >= top  # argmax, but a tie counts as right
    return jnp.sum(weight * nll), jnp.sum(weight * correct), exp, total


def loss(x_TD, w_DV, target_T, weight_T, axes: tuple[str, ...] = ()):
    """The two sums. With mesh `axes` over which the vocabulary is sharded, `w_DV` is this device's columns and `target_T`
    counts from the first of them, so that it may lie outside; call it inside `shard_map` then."""

    def body(carry, chunk):
        x, target, weight = chunk
        loss, correct, _, _ = _chunk_loss(x, w_DV, target, weight, axes)
        return (carry[0] + loss, carry[1] + correct), None

    return lax.scan(body, (jnp.float32(0), jnp.float32(0)), _chunks(x_TD, target_T, weight_T))[0]


def loss_and_gradients(x_TD, w_DV, target_T, weight_T, axes: tuple[str, ...] = ()):
    """(`loss`, (dx_TD, f32 dw_DV)). With a sharded vocabulary dx is these columns' part of a sum over the shards."""

    def body(carry, chunk):
        loss, correct, dw_DV = carry
        x, target, weight = chunk
        chunk_loss, chunk_correct, exp, total = _chunk_loss(x, w_DV, target, weight, axes)
        onehot = target[:, None] == jnp.arange(w_DV.shape[1])
        dlogits = (exp * (weight / total)[:, None] - jnp.where(onehot, weight[:, None], 0)).astype(x.dtype)
        dx = jnp.dot(dlogits, w_DV.T, preferred_element_type=jnp.float32).astype(x.dtype)
        dw_DV = dw_DV + jnp.dot(x.T, dlogits, preferred_element_type=jnp.float32)
        return (loss + chunk_loss, correct + chunk_correct, dw_DV), dx

    init = (jnp.float32(0), jnp.float32(0), jnp.zeros(w_DV.shape, jnp.float32))
    (loss, correct, dw_DV), dx = lax.scan(body, init, _chunks(x_TD, target_T, weight_T))
    return (loss, correct), (dx.reshape(-1, x_TD.shape[1])[: x_TD.shape[0]], dw_DV)


@jax.custom_vjp
def _loss(x_TD, w_DV, target_T, weight_T):
    return loss(x_TD, w_DV, target_T, weight_T)


def _loss_fwd(x_TD, w_DV, target_T, weight_T):
    sums, (dx_TD, dw_DV) = loss_and_gradients(x_TD, w_DV, target_T, weight_T)
    return sums, (dx_TD, dw_DV.astype(w_DV.dtype))


def _loss_bwd(residuals, cotangents):
    dx_TD, dw_DV = residuals
    scale = cotangents[0]
    return (dx_TD * scale).astype(dx_TD.dtype), (dw_DV * scale).astype(dw_DV.dtype), None, None


_loss.defvjp(_loss_fwd, _loss_bwd)


@functools.partial(jax.named_call, name="linear_cross_entropy_chunked")
def linear_cross_entropy(x_TD, w_DV, target_T, weight_T):
    """See `api.linear_cross_entropy`."""
    return _loss(x_TD, w_DV, target_T, weight_T)
