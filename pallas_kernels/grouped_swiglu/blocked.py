"""Grouped SwiGLU for CPU and GPU: loops over blocks of tokens that share an expert, with a hand-written gradient.

Slots (token, choice) are laid out as rows: each expert owns a region of whole blocks, large ones first and small ones for
the rest, so that most of the work is in large matmuls and little of it is padding. The rows that pad a region have weight 0,
so they change nothing, forward or backward. A slot without an expert has no row and counts as zero. The loops run over the
blocks that exist (a traced count): nothing is dropped, no capacity is reserved, and an expert's weights are read in place.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.grouped_swiglu.rows import Rows, rows_of_slots, sum_choices
from pallas_kernels.products import dot_general

RESIDUALS = "grouped_swiglu"  # checkpoint_name of what the forward pass keeps for the backward pass


def _block_sizes(slots: int, experts: int) -> tuple[int, ...]:
    """Rows of the blocks, largest first: those of 512, 256 and 64 that an expert's even share of the slots fills.

    Matmuls of 512 rows run at about twice the rate of 128 rows here (2 cores, 384 x 512 weights), and below 64 rows a
    block costs as much as one of 64. Decoding one sequence, single rows read the weights without a copy of them.
    """
    sizes = tuple(size for size in (512, 256, 64) if size * experts <= slots)
    return sizes or ((1,) if slots <= 8 else (8,))


def _layout(expert_TK, experts: int) -> Rows:
    return rows_of_slots(expert_TK, experts, _block_sizes(expert_TK.size, experts))


def _dot(a, b, contract: tuple[int, int]):
    """Matrix product with float32 accumulation over one dimension of each operand."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return dot_general(a, b, dims, dtype=jnp.float32)


def _rows(array, start, size: int):
    return lax.dynamic_slice_in_dim(array, start, size)


def _put_rows(array, rows, start):
    return lax.dynamic_update_slice_in_dim(array, rows.astype(array.dtype), start, 0)


def _over_blocks(layout: Rows, body, carry):
    """carry = body(carry, size, row, expert) over every block."""
    for blocks in layout.blocks:

        def step(b, carry, blocks=blocks):
            return body(carry, blocks.size, blocks.row_b[b], blocks.expert_b[b])

        carry = lax.fori_loop(0, blocks.count, step, carry)
    return carry


def _tokens(x_TD, layout: Rows, row, size: int):
    """The tokens of a block's rows. Padding shows some token: its weight, 0, is what keeps it from counting."""
    return x_TD.at[_rows(layout.token_R, row, size)].get(mode="clip")


def forward(x_TD, w_gate_up_EDX, w_down_EMD, expert_TK, weight_TK):
    """(the result, what the backward pass needs of it). Weights may be integers: each block's become dense, one expert's."""
    (D, *X), M, dtype = w_gate_up_EDX.shape[1:], w_down_EMD.shape[1], x_TD.dtype
    layout = _layout(expert_TK, w_down_EMD.shape[0])
    weight_R = weight_TK.reshape(-1).at[layout.slot_R].get(mode="fill", fill_value=0)

    def block(carry, size, row, expert):
        y_RD, gate_up_RX = carry
        gate_up = _dot(_tokens(x_TD, layout, row, size), w_gate_up_EDX[expert].reshape(D, math.prod(X)).astype(dtype), (1, 0))
        gate, up = jnp.split(gate_up, 2, axis=-1)
        h = jax.nn.silu(gate) * up * _rows(weight_R, row, size)[:, None]
        y_RD = _put_rows(y_RD, _dot(h.astype(dtype), w_down_EMD[expert].reshape(M, D).astype(dtype), (1, 0)), row)
        return y_RD, _put_rows(gate_up_RX, gate_up, row)

    R = layout.token_R.size
    init = (jnp.zeros((R, D), dtype), jnp.zeros((R, math.prod(X)), dtype))
    y_RD, gate_up_RX = _over_blocks(layout, block, init)
    return sum_choices(y_RD, layout), gate_up_RX


def _backward(x_TD, w_gate_up_EDX, w_down_EMD, expert_TK, weight_TK, gate_up_RX, dy_TD):
    layout = _layout(expert_TK, w_down_EMD.shape[0])
    weight_R = weight_TK.reshape(-1).at[layout.slot_R].get(mode="fill", fill_value=0)

    def block(carry, size, row, expert):
        dx_RD, dw_gate_up_EDX, dw_down_EMD, dweight_R = carry
        gate, up = jnp.split(_rows(gate_up_RX, row, size).astype(jnp.float32), 2, axis=-1)
        weight = _rows(weight_R, row, size)[:, None]
        sigmoid = jax.nn.sigmoid(gate)
        silu = gate * sigmoid
        x, dy = _tokens(x_TD, layout, row, size), _tokens(dy_TD, layout, row, size)
        dweighted = _dot(dy, w_down_EMD[expert], (1, 1))
        dweight = jnp.sum(dweighted * silu * up, axis=-1)
        dh = dweighted * weight
        dgate_up = jnp.concatenate([dh * up * (sigmoid + silu * (1 - sigmoid)), dh * silu], axis=-1).astype(x_TD.dtype)
        dx_RD = _put_rows(dx_RD, _dot(dgate_up, w_gate_up_EDX[expert], (1, 1)), row)
        h = (silu * up * weight).astype(x_TD.dtype)
        dw_gate_up_EDX = dw_gate_up_EDX.at[expert].add(_dot(x, dgate_up, (0, 0)))
        dw_down_EMD = dw_down_EMD.at[expert].add(_dot(h, dy, (0, 0)))
        return dx_RD, dw_gate_up_EDX, dw_down_EMD, _put_rows(dweight_R, dweight, row)

    init = (
        jnp.zeros((weight_R.size, x_TD.shape[1]), x_TD.dtype),
        jnp.zeros(w_gate_up_EDX.shape, jnp.float32),
        jnp.zeros(w_down_EMD.shape, jnp.float32),
        jnp.zeros(weight_R.size, weight_R.dtype),
    )
    dx_RD, dw_gate_up_EDX, dw_down_EMD, dweight_R = _over_blocks(layout, block, init)
    return (
        sum_choices(dx_RD, layout),
        dw_gate_up_EDX.astype(w_gate_up_EDX.dtype),
        dw_down_EMD.astype(w_down_EMD.dtype),
        None,
        dweight_R.at[layout.row_TK].get(mode="fill", fill_value=0),
    )


@jax.custom_vjp
def _swiglu(x_TD, w_gate_up_EDX, w_down_EMD, expert_TK, weight_TK):
    return forward(x_TD, w_gate_up_EDX, w_down_EMD, expert_TK, weight_TK)[0]


def _swiglu_fwd(*args):
    y_TD, gate_up_RX = forward(*args)
    return y_TD, (args, checkpoint_name(gate_up_RX, RESIDUALS))


def _swiglu_bwd(residuals, dy_TD):
    args, gate_up_RX = residuals
    return _backward(*args, gate_up_RX=gate_up_RX, dy_TD=dy_TD)


_swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)


@functools.partial(jax.named_call, name="grouped_swiglu_blocked")
def grouped_swiglu(x_TD, w_gate_up_ED2M, w_down_EMD, expert_TK, weight_TK):
    """See `api.grouped_swiglu`."""
    E, D, _, M = w_gate_up_ED2M.shape
    return _swiglu(x_TD, w_gate_up_ED2M.reshape(E, D, 2 * M), w_down_EMD, expert_TK, weight_TK)
