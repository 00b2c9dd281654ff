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


def _chunk_loss(x, w_DV, target, weight):
    logits = jnp.dot(x, w_DV, preferred_element_type=jnp.float32)
    top = logits.max(-1)
    exp = jnp.exp(logits - top[:, None])
    total = exp.sum(-1)
    at_target = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
    nll = jnp.log(total) + top - at_target
    correct = at_target >= top  # argmax, but a tie counts as right
    return jnp.sum(weight * nll), jnp.sum(weight * correct), exp, total


@jax.custom_vjp
def _loss(x_TD, w_DV, target_T, weight_T):
    def body(carry, chunk):
        loss, correct, _, _ = _chunk_loss(chunk[0], w_DV, *chunk[1:])
        return (carry[0] + loss, carry[1] + correct), None

    return lax.scan(body, (jnp.float32(0), jnp.float32(0)), _chunks(x_TD, target_T, weight_T))[0]


def _loss_fwd(x_TD, w_DV, target_T, weight_T):
    def body(carry, chunk):
        loss, correct, dw_DV = carry
        x, target, weight = chunk
        chunk_loss, chunk_correct, exp, total = _chunk_loss(x, w_DV, target, weight)
        onehot = target[:, None] == jnp.arange(w_DV.shape[1])
        dlogits = (exp * (weight / total)[:, None] - jnp.where(onehot, weight[:, None], 0)).astype(x.dtype)
        dx = jnp.dot(dlogits, w_DV.T, preferred_element_type=jnp.float32).astype(x.dtype)
        dw_DV = dw_DV + jnp.dot(x.T, dlogits, preferred_element_type=jnp.float32)
        return (loss + chunk_loss, correct + chunk_correct, dw_DV), dx

    init = (jnp.float32(0), jnp.float32(0), jnp.zeros(w_DV.shape, jnp.float32))
    (loss, correct, dw_DV), dx = lax.scan(body, init, _chunks(x_TD, target_T, weight_T))
    dx_TD = dx.reshape(-1, x_TD.shape[1])[: x_TD.shape[0]]
    return (loss, correct), (dx_TD, dw_DV.astype(w_DV.dtype))


def _loss_bwd(residuals, cotangents):
    dx_TD, dw_DV = residuals
    scale = cotangents[0]
    return (dx_TD * scale).astype(dx_TD.dtype), (dw_DV * scale).astype(dw_DV.dtype), None, None


_loss.defvjp(_loss_fwd, _loss_bwd)


@functools.partial(jax.named_call, name="linear_cross_entropy_chunked")
def linear_cross_entropy(x_TD, w_DV, target_T, weight_T):
    """See `api.linear_cross_entropy`."""
    return _loss(x_TD, w_DV, target_T, weight_T)
