"""Chunked divergence of two heads: a scan over tokens that computes the gradients on the way forward.

With respect to the logits the gradient of tau^2 KL(p || q) is tau (q - p), known as soon as both models' logits of a chunk are.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.products import dot

_CHUNK = 512  # tokens: see linear_cross_entropy/chunked.py


class Setting(NamedTuple):
    """The temperature, and the mesh axes over which the vocabulary is sharded (both heads are then this device's columns)."""

    temperature: float = 1.0
    axes: tuple[str, ...] = ()


class Arguments(NamedTuple):
    """As those of `api.linear_divergence`."""

    x_TD: jax.Array
    w_DV: jax.Array
    teacher_x_TC: jax.Array
    teacher_w_CV: jax.Array
    weight_T: jax.Array


def _chunks(a: Arguments):
    T = a.x_TD.shape[0]
    chunk = min(_CHUNK, T)

    def cut(x):
        return jnp.pad(x, ((0, -T % chunk),) + ((0, 0),) * (x.ndim - 1)).reshape(-1, chunk, *x.shape[1:])

    return cut(a.x_TD), cut(a.teacher_x_TC), cut(a.weight_T)  # padding has weight 0


def _log_softmax(x, w_DV, setting: Setting):
    """This device's columns of log softmax(x w / tau)."""
    logits = dot(x, w_DV, dtype=jnp.float32) / setting.temperature
    top = logits.max(-1, keepdims=True)
    top = lax.pmax(top, setting.axes) if setting.axes else top
    total = jnp.exp(logits - top).sum(-1, keepdims=True)
    total = lax.psum(total, setting.axes) if setting.axes else total
    return logits - top - jnp.log(total)


def _chunk_divergence(x, w_DV, teacher_x, teacher_w_CV, weight, setting: Setting):
    """A chunk's sum over this device's columns, and both models' probabilities there."""
    log_q, log_p = _log_softmax(x, w_DV, setting), _log_softmax(teacher_x, teacher_w_CV, setting)
    p = jnp.exp(log_p)
    return setting.temperature**2 * jnp.sum(weight[:, None] * p * (log_p - log_q)), p, jnp.exp(log_q)


def divergence(arguments: Arguments, setting: Setting):
    """The weighted sum."""

    def body(total, chunk):
        x, teacher_x, weight = chunk
        return total + _chunk_divergence(x, arguments.w_DV, teacher_x, arguments.teacher_w_CV, weight, setting)[0], None

    total = lax.scan(body, jnp.float32(0), _chunks(arguments))[0]
    return lax.psum(total, setting.axes) if setting.axes else total


def divergence_and_gradients(arguments: Arguments, setting: Setting):
    """(`divergence`, (dx_TD, f32 dw_DV)). With a sharded vocabulary dx is these columns' part of a sum over the shards."""
    w_DV = arguments.w_DV

    def body(carry, chunk):
        total, dw_DV = carry
        x, teacher_x, weight = chunk
        here, p, q = _chunk_divergence(x, w_DV, teacher_x, arguments.teacher_w_CV, weight, setting)
        dlogits = ((q - p) * (setting.temperature * weight[:, None])).astype(x.dtype)
        dx = dot(dlogits, w_DV.T, dtype=jnp.float32).astype(x.dtype)
        return (total + here, dw_DV + dot(x.T, dlogits, dtype=jnp.float32)), dx

    (total, dw_DV), dx = lax.scan(body, (jnp.float32(0), jnp.zeros(w_DV.shape, jnp.float32)), _chunks(arguments))
    total = lax.psum(total, setting.axes) if setting.axes else total
    T, D = arguments.x_TD.shape
    return total, (dx.reshape(-1, D)[:T], dw_DV)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _divergence(arguments: Arguments, setting: Setting):
    return divergence(arguments, setting)


def _forward(arguments: Arguments, setting: Setting):
    total, (dx_TD, dw_DV) = divergence_and_gradients(arguments, setting)
    return total, (dx_TD, dw_DV.astype(arguments.w_DV.dtype))


def _backward(_, gradients, cotangent):
    dx_TD, dw_DV = gradients
    scaled = ((d * cotangent).astype(d.dtype) for d in (dx_TD, dw_DV))
    return (Arguments(*scaled, None, None, None),)  # type: ignore[arg-type]  (None: no gradient)


_divergence.defvjp(_forward, _backward)


@functools.partial(jax.named_call, name="linear_divergence_chunked")
def linear_divergence(x_TD, w_DV, teacher_x_TC, teacher_w_CV, weight_T, temperature: float):
    """See `api.linear_divergence`."""
    return _divergence(Arguments(x_TD, w_DV, teacher_x_TC, teacher_w_CV, weight_T), Setting(temperature))
