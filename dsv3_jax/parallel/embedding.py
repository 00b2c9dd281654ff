"""Embedding on a mesh. The table is sharded along D: a device looks the tokens of all devices up in its own columns, and the
results are exchanged. That moves T * D numbers, not V * D, and the table's gradient needs no sum over devices.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from dsv3_jax.model.layout import Layout
from dsv3_jax.parallel.collectives import all_gather, all_to_all


def _axes(layout: Layout):
    """Mesh axes of the batch and of its sequences, and the table's spec."""
    batch, length = layout.axes("batch"), layout.axes("sequence")
    return batch, length, P(None, batch + length or None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def embed(layout: Layout, dtype, table_VD, token_BL):
    """See `model.layout.Layout.embed`."""
    batch, length, table = _axes(layout)

    def local(table_Vd, token_bL):
        token_BL = all_gather(token_bL, batch, 0)
        x = table_Vd[token_BL].astype(dtype)
        x = all_to_all(x, length, 1, 2)
        return all_to_all(x, batch, 0, 2)

    specs = (table, layout.spec("batch", None))
    return layout.on_each_device(local, specs, layout.spec("batch", "sequence", None))(table_VD, token_BL)


def _forward(layout, dtype, table_VD, token_BL):
    return embed(layout, dtype, table_VD, token_BL), (token_BL, jnp.zeros((0,), table_VD.dtype), table_VD.shape[0])


def _backward(layout: Layout, dtype, residuals, dx_BLD):
    token_BL, like, V = residuals
    batch, length, table = _axes(layout)

    def local(token_bL, dx):
        token_BL = all_gather(token_bL, batch, 0)
        dx = all_to_all(dx, batch, 2, 0)
        dx = all_to_all(dx, length, 2, 1)
        return jnp.zeros((V, dx.shape[-1]), jnp.float32).at[token_BL].add(dx.astype(jnp.float32)).astype(like.dtype)

    specs = (layout.spec("batch", None), layout.spec("batch", "sequence", None))
    return layout.on_each_device(local, specs, table)(token_BL, dx_BLD), None


embed.defvjp(_forward, _backward)
