"""Grouped SwiGLU for CPU and GPU: loops over blocks of tokens that share an expert, with a hand-written gradient.

Slots (token, choice) are laid out as rows: each expert owns a region of whole blocks, large ones first and small ones for
the rest, so that most of the work is in large matmuls and little of it is padding. The rows that pad a region have weight 0,
so they change nothing, forward or backward. A slot without an expert has the row after the last, which stays zero. The loops
run over the blocks that exist (a traced count): nothing is dropped, no capacity is reserved, and an expert's weights are read
in place.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.quantize.reference import rounded
from pallas_kernels.scaled import TILE, Gemms

RESIDUALS = "grouped_swiglu"  # checkpoint_name of what the forward pass keeps for the backward pass


class _Blocks(NamedTuple):
    """Blocks of one size: how many there are, and the expert and first row of each."""

    size: int
    count: jax.Array
    expert_b: jax.Array
    row_b: jax.Array


class _Layout(NamedTuple):
    row_TK: jax.Array  # where a slot lies; R (the row after the last) for one without an expert
    token_R: jax.Array  # the token of a row; T (out of bounds) for padding
    slot_R: jax.Array  # the slot t*K + k of a row; T*K for padding
    blocks: tuple[_Blocks, ...]


def _block_sizes(slots: int, experts: int) -> tuple[int, ...]:
    """Rows of the blocks, largest first: those of 512, 256 and 64 that an expert's even share of the slots fills.

    Matmuls of 512 rows run at about twice the rate of 128 rows here (2 cores, 384 x 512 weights), and below 64 rows a
    block costs as much as one of 64. Decoding one sequence, single rows read the weights without a copy of them.
    """
    sizes = tuple(size for size in (512, 256, 64) if size * experts <= slots)
    return sizes or ((1,) if slots <= 8 else (8,))


def _regions(count_E, sizes: tuple[int, ...]):
    """Blocks of each size that every expert gets: as many large ones as fill up to less than a smallest one's rows."""
    left_E, blocks = count_E, []
    for size in sizes:
        blocks_E = (left_E + sizes[-1] - 1) // size
        left_E = jnp.maximum(left_E - blocks_E * size, 0)
        blocks.append(blocks_E)
    return blocks


def _layout(expert_TK, experts: int) -> _Layout:
    (T, K), P = expert_TK.shape, expert_TK.size
    sizes = _block_sizes(P, experts)
    slot_expert_P = expert_TK.reshape(-1)
    count_E = jnp.bincount(slot_expert_P, length=experts)
    blocks_sE = _regions(count_E, sizes)
    rows_E = sum(b * size for b, size in zip(blocks_sE, sizes, strict=True))
    first_E = jnp.cumsum(rows_E) - rows_E

    # place of a slot among those of its expert, in token order
    order_P = jnp.argsort(slot_expert_P, stable=True)
    rank_P = jnp.arange(P) - (jnp.cumsum(count_E) - count_E)[slot_expert_P[order_P]]
    rows = P + experts * sizes[-1]  # no region is padded by more than a smallest block
    placed_P = jnp.where(slot_expert_P[order_P] < experts, first_E[slot_expert_P[order_P]] + rank_P, rows)
    row_P = jnp.zeros(P, jnp.int32).at[order_P].set(placed_P.astype(jnp.int32))
    slot_R = jnp.full(rows, P, jnp.int32).at[row_P].set(jnp.arange(P, dtype=jnp.int32))

    blocks, begin_E = [], first_E
    for size, blocks_E in zip(sizes, blocks_sE, strict=True):
        last_E = jnp.cumsum(blocks_E)
        b = jnp.arange(min(P, rows // size + experts))
        expert_b = jnp.minimum(jnp.searchsorted(last_E, b, side="right"), experts - 1)
        row_b = begin_E[expert_b] + (b - (last_E - blocks_E)[expert_b]) * size
        blocks.append(_Blocks(size, last_E[-1], expert_b, row_b))
        begin_E = begin_E + blocks_E * size
    return _Layout(row_P.reshape(T, K), slot_R // K, slot_R, tuple(blocks))


def _sum_choices(y_RD, layout: _Layout):
    """Back to tokens: the sum over a token's K choices."""
    # K gathers and adds: one gather and a reduction over K costs ten times as much on CPU
    return sum(y_RD[layout.row_TK[:, k]] for k in range(layout.row_TK.shape[1]))


def _dot(a, b, contract: tuple[int, int]):
    """Matrix product with float32 accumulation over one dimension of each operand."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _rows(array, start, size: int):
    return lax.dynamic_slice_in_dim(array, start, size)


def _put_rows(array, rows, start):
    return lax.dynamic_update_slice_in_dim(array, rows.astype(array.dtype), start, 0)


def _over_blocks(layout: _Layout, body, carry):
    """carry = body(carry, size, row, expert) over every block."""
    for blocks in layout.blocks:

        def step(b, carry, blocks=blocks):
            return body(carry, blocks.size, blocks.row_b[b], blocks.expert_b[b])

        carry = lax.fori_loop(0, blocks.count, step, carry)
    return carry


def _tokens(x_TD, layout: _Layout, row, size: int):
    """The tokens of a block's rows. Padding shows some token: its weight, 0, is what keeps it from counting."""
    return x_TD.at[_rows(layout.token_R, row, size)].get(mode="clip")


class _Rounding(NamedTuple):
    """What operands go through on their way into a product: nothing, or 8 bits."""

    gemms: Gemms | None

    def _rounded(self, a, rows: int, format: str):
        assert self.gemms is not None
        return rounded(a, None if self.gemms.per_tensor else rows, getattr(self.gemms, format), self.gemms.power_of_two)

    def tiles(self, a, product: str):
        """Rows of activations; a scale for 128 numbers of a row."""
        return a if self.gemms is None else self._rounded(a, 1, product)

    def columns(self, a, weight_R):
        """The same rows, for a sum over them: a scale for 128 rows of a block; padding, whose weight is 0, has no say in it."""
        return a if self.gemms is None else self._rounded(jnp.where(weight_R != 0, a, 0).T, 1, "wgrad").T

    def weights(self, w_EXY, product: str):
        return w_EXY if self.gemms is None else jax.vmap(lambda w: self._rounded(w, TILE, product))(w_EXY)


def _forward(gemms: Gemms | None, x_TD, w_gate_up_EDX, w_down_EMD, expert_TK, weight_TK):
    layout, to = _layout(expert_TK, w_down_EMD.shape[0]), _Rounding(gemms)
    weight_R = weight_TK.reshape(-1).at[layout.slot_R].get(mode="fill", fill_value=0)
    tokens_TD = to.tiles(x_TD, "forward")
    w_gate_up_EDX, w_down_EMD = to.weights(w_gate_up_EDX, "forward"), to.weights(w_down_EMD, "forward")

    def block(carry, size, row, expert):
        y_RD, gate_up_RX = carry
        gate_up = _dot(_tokens(tokens_TD, layout, row, size), w_gate_up_EDX[expert], (1, 0))
        gate, up = jnp.split(gate_up, 2, axis=-1)
        h = jax.nn.silu(gate) * up * _rows(weight_R, row, size)[:, None]
        h = to.tiles(h.astype(x_TD.dtype), "forward")
        y_RD = _put_rows(y_RD, _dot(h, w_down_EMD[expert], (1, 0)), row)
        return y_RD, _put_rows(gate_up_RX, gate_up, row)

    R = layout.token_R.size
    init = (jnp.zeros((R + 1, x_TD.shape[1]), x_TD.dtype), jnp.zeros((R, w_gate_up_EDX.shape[2]), x_TD.dtype))
    y_RD, gate_up_RX = _over_blocks(layout, block, init)
    return _sum_choices(y_RD, layout), gate_up_RX


def _backward(gemms: Gemms | None, x_TD, w_gate_up_EDX, w_down_EMD, expert_TK, weight_TK, gate_up_RX, dy_TD):
    layout, to = _layout(expert_TK, w_down_EMD.shape[0]), _Rounding(gemms)
    weight_R = weight_TK.reshape(-1).at[layout.slot_R].get(mode="fill", fill_value=0)
    tokens_TD, dtokens_TD = to.tiles(x_TD, "forward"), to.tiles(dy_TD, "dgrad")
    wd_gate_up_EDX, wd_down_EMD = to.weights(w_gate_up_EDX, "dgrad"), to.weights(w_down_EMD, "dgrad")

    def block(carry, size, row, expert):
        dx_RD, dw_gate_up_EDX, dw_down_EMD, dweight_R = carry
        gate, up = jnp.split(_rows(gate_up_RX, row, size).astype(jnp.float32), 2, axis=-1)
        weight = _rows(weight_R, row, size)[:, None]
        sigmoid = jax.nn.sigmoid(gate)
        silu = gate * sigmoid
        dweighted = _dot(_tokens(dtokens_TD, layout, row, size), wd_down_EMD[expert], (1, 1))
        dweight = jnp.sum(dweighted * silu * up, axis=-1)
        dh = dweighted * weight
        dgate_up = jnp.concatenate([dh * up * (sigmoid + silu * (1 - sigmoid)), dh * silu], axis=-1).astype(x_TD.dtype)
        dx_RD = _put_rows(dx_RD, _dot(to.tiles(dgate_up, "dgrad"), wd_gate_up_EDX[expert], (1, 1)), row)
        x, dy = _tokens(tokens_TD, layout, row, size), _tokens(dy_TD, layout, row, size)
        h = to.tiles((silu * up * weight).astype(x_TD.dtype), "forward")
        x, dy, h, dgate_up = (to.columns(a, weight) for a in (x, dy, h, dgate_up))
        dw_gate_up_EDX = dw_gate_up_EDX.at[expert].add(_dot(x, dgate_up, (0, 0)))
        dw_down_EMD = dw_down_EMD.at[expert].add(_dot(h, dy, (0, 0)))
        return dx_RD, dw_gate_up_EDX, dw_down_EMD, _put_rows(dweight_R, dweight, row)

    init = (
        jnp.zeros((weight_R.size + 1, x_TD.shape[1]), x_TD.dtype),
        jnp.zeros(w_gate_up_EDX.shape, jnp.float32),
        jnp.zeros(w_down_EMD.shape, jnp.float32),
        jnp.zeros(weight_R.size + 1, weight_R.dtype),
    )
    dx_RD, dw_gate_up_EDX, dw_down_EMD, dweight_R = _over_blocks(layout, block, init)
    return (
        _sum_choices(dx_RD, layout),
        dw_gate_up_EDX.astype(w_gate_up_EDX.dtype),
        dw_down_EMD.astype(w_down_EMD.dtype),
        None,
        dweight_R[layout.row_TK],
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _swiglu(gemms: Gemms | None, x_TD, w_gate_up_EDX, w_down_EMD, expert_TK, weight_TK):
    return _forward(gemms, x_TD, w_gate_up_EDX, w_down_EMD, expert_TK, weight_TK)[0]


def _swiglu_fwd(gemms: Gemms | None, *args):
    y_TD, gate_up_RX = _forward(gemms, *args)
    return y_TD, (args, checkpoint_name(gate_up_RX, RESIDUALS))


def _swiglu_bwd(gemms: Gemms | None, residuals, dy_TD):
    args, gate_up_RX = residuals
    return _backward(gemms, *args, gate_up_RX=gate_up_RX, dy_TD=dy_TD)


_swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)


@functools.partial(jax.named_call, name="grouped_swiglu_blocked")
def grouped_swiglu(x_TD, w_gate_up_ED2M, w_down_EMD, expert_TK, weight_TK, gemms: Gemms | None = None):
    """See `api.grouped_swiglu`."""
    E, D, _, M = w_gate_up_ED2M.shape
    return _swiglu(gemms, x_TD, w_gate_up_ED2M.reshape(E, D, 2 * M), w_down_EMD, expert_TK, weight_TK)
