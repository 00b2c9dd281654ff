"""Head and cross-entropy, or divergence from another model, on a mesh.

A device takes all tokens of its batch rows and its own columns of the vocabulary.
"""

import functools

import jax
from jax.sharding import PartitionSpec as P

from dsv3_jax.model.layout import Layout
from dsv3_jax.parallel.collectives import all_gather, all_reduce, index, reduce_scatter
from pallas_kernels.linear_cross_entropy import chunked
from pallas_kernels.linear_divergence import chunked as divergence_chunks


def _specs(layout: Layout):
    batch = layout.axes("batch")
    head = P(batch or None, layout.axes("vocab") or None)
    return (layout.spec("batch", "sequence", None), head, layout.spec("batch", None), layout.spec("batch", None))


def _prepare(layout: Layout, x_bld, head_dv, target_bL, weight_bL):
    """`_tokens_and_columns`, targets counted from the first of these columns, and weights."""
    x_TD, head_Dv = _tokens_and_columns(layout, x_bld, head_dv)
    first = index(layout.axes("vocab")) * head_Dv.shape[1]
    return x_TD, head_Dv, target_bL.reshape(-1) - first, weight_bL.reshape(-1)


def _tokens_and_columns(layout: Layout, x_bld, head_dv):
    """On each device: all tokens of its rows, and complete columns of its part of the vocabulary."""
    batch, length = layout.axes("batch"), layout.axes("sequence")
    x_bLD = all_gather(x_bld, length, 1)
    head_Dv = all_gather(head_dv.astype(x_bld.dtype), batch, 0)
    return x_bLD.reshape(-1, x_bLD.shape[-1]), head_Dv


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def cross_entropy(layout: Layout, implementation: str, x_BLD, head_DV, target_BL, weight_BL):
    """See `model.layout.Layout.cross_entropy`."""
    setting = chunked.Setting(layout.axes("vocab"), implementation)

    def local(*args):
        return all_reduce(chunked.loss(*_prepare(layout, *args), setting), layout.axes("batch"))

    specs = _specs(layout)
    return layout.on_each_device(local, specs, (P(), P()))(x_BLD, head_DV, target_BL, weight_BL)


def _forward(layout: Layout, implementation: str, x_BLD, head_DV, target_BL, weight_BL):
    batch, length = layout.axes("batch"), layout.axes("sequence")
    setting = chunked.Setting(layout.axes("vocab"), implementation)

    def local(x_bld, head_dv, target_bL, weight_bL):
        args = _prepare(layout, x_bld, head_dv, target_bL, weight_bL)
        sums, (dx_TD, dw_Dv) = chunked.loss_and_gradients(*args, setting)
        dx = dx_TD.reshape(x_bld.shape[0], -1, x_bld.shape[-1])
        # `sequence` and `vocab` are sharded over the same axes, so one reduce-scatter sums and hands out dx
        dx = reduce_scatter(dx, length, 1)
        dw = reduce_scatter(dw_Dv, batch, 0)
        return all_reduce(sums, batch), (dx, dw.astype(head_dv.dtype))

    specs = _specs(layout)
    return layout.on_each_device(local, specs, ((P(), P()), specs[:2]))(x_BLD, head_DV, target_BL, weight_BL)


def _backward(_layout, _implementation, residuals, cotangents):
    dx_BLD, dw_DV = residuals
    scale = cotangents[0]
    return (dx_BLD * scale).astype(dx_BLD.dtype), (dw_DV * scale).astype(dw_DV.dtype), None, None


cross_entropy.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def divergence(layout: Layout, temperature: float, x_BLD, head_DV, teacher_x_BLC, teacher_head_CV, weight_BL):
    """See `model.layout.Layout.divergence`."""
    setting = divergence_chunks.Setting(temperature, layout.axes("vocab"))

    def local(*args):
        return all_reduce(divergence_chunks.divergence(_prepare_both(layout, *args), setting), layout.axes("batch"))

    specs = _divergence_specs(layout)
    return layout.on_each_device(local, specs, P())(x_BLD, head_DV, teacher_x_BLC, teacher_head_CV, weight_BL)


def _divergence_specs(layout: Layout):
    hidden, head, _, tokens = _specs(layout)
    return hidden, head, hidden, head, tokens


def _prepare_both(layout: Layout, x_bld, head_dv, teacher_x_blc, teacher_head_cv, weight_bL):
    student = _tokens_and_columns(layout, x_bld, head_dv)
    teacher = _tokens_and_columns(layout, teacher_x_blc, teacher_head_cv)
    return divergence_chunks.Arguments(*student, *teacher, weight_bL.reshape(-1))


def _divergence_forward(layout: Layout, temperature: float, x_BLD, head_DV, teacher_x_BLC, teacher_head_CV, weight_BL):
    setting = divergence_chunks.Setting(temperature, layout.axes("vocab"))
    batch, length = layout.axes("batch"), layout.axes("sequence")

    def local(x_bld, head_dv, *rest):
        total, (dx_TD, dw_Dv) = divergence_chunks.divergence_and_gradients(
            _prepare_both(layout, x_bld, head_dv, *rest), setting
        )
        dx = reduce_scatter(dx_TD.reshape(x_bld.shape[0], -1, x_bld.shape[-1]), length, 1)
        return all_reduce(total, batch), (dx, reduce_scatter(dw_Dv, batch, 0).astype(head_dv.dtype))

    specs = _divergence_specs(layout)
    arguments = x_BLD, head_DV, teacher_x_BLC, teacher_head_CV, weight_BL
    return layout.on_each_device(local, specs, (P(), specs[:2]))(*arguments)


def _divergence_backward(_layout, _temperature, gradients, cotangent):
    dx_BLD, dw_DV = gradients
    return (dx_BLD * cotangent).astype(dx_BLD.dtype), (dw_DV * cotangent).astype(dw_DV.dtype), None, None, None


divergence.defvjp(_divergence_forward, _divergence_backward)
