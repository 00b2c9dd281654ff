"""Rows of routed tokens: every expert owns a region of whole blocks, so that a block's rows meet one expert's weights."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Blocks(NamedTuple):
    """Blocks of one size: how many there are, and the expert and first row of each."""

    size: int
    count: jax.Array
    expert_b: jax.Array
    row_b: jax.Array


class Rows(NamedTuple):
    row_TK: jax.Array  # where a slot lies; R (the row after the last) for one without an expert
    token_R: jax.Array  # the token of a row; T (out of bounds) for padding
    slot_R: jax.Array  # the slot t*K + k of a row; T*K for padding
    blocks: tuple[Blocks, ...]


def _regions(count_E, sizes: tuple[int, ...]):
    """Blocks of each size that every expert gets: as many large ones as fill up to less than a smallest one's rows."""
    left_E, blocks = count_E, []
    for size in sizes:
        blocks_E = (left_E + sizes[-1] - 1) // size
        left_E = jnp.maximum(left_E - blocks_E * size, 0)
        blocks.append(blocks_E)
    return blocks


def rows_of_slots(expert_TK, experts: int, sizes: tuple[int, ...]) -> Rows:
    """`sizes` of blocks, largest first, each a multiple of the next."""
    (T, K), P = expert_TK.shape, expert_TK.size
    slot_expert_P = expert_TK.reshape(-1)
    count_E = jnp.bincount(slot_expert_P, length=experts)
    blocks_sE = _regions(count_E, sizes)
    rows_E = sum(b * size for b, size in zip(blocks_sE, sizes, strict=True))
    first_E = jnp.cumsum(rows_E) - rows_E

    # place of a slot among those of its expert, in token order
    order_P = jnp.argsort(slot_expert_P, stable=True)
    rank_P = jnp.arange(P) - (jnp.cumsum(count_E) - count_E)[slot_expert_P[order_P]]
    # no region is padded by as much as a smallest block, and those without slots not at all
    R = (P // sizes[-1] + min(experts, P)) * sizes[-1]
    placed_P = jnp.where(slot_expert_P[order_P] < experts, first_E[slot_expert_P[order_P]] + rank_P, R)
    row_P = jnp.zeros(P, jnp.int32).at[order_P].set(placed_P.astype(jnp.int32))
    slot_R = jnp.full(R, P, jnp.int32).at[row_P].set(jnp.arange(P, dtype=jnp.int32))

    blocks, begin_E = [], first_E
    for size, blocks_E in zip(sizes, blocks_sE, strict=True):
        last_E = jnp.cumsum(blocks_E)
        b = jnp.arange(min(P, R // size + experts))
        expert_b = jnp.minimum(jnp.searchsorted(last_E, b, side="right", method="compare_all"), experts - 1)
        row_b = begin_E[expert_b] + (b - (last_E - blocks_E)[expert_b]) * size
        blocks.append(Blocks(size, last_E[-1], expert_b, row_b))
        begin_E = begin_E + blocks_E * size
    return Rows(row_P.reshape(T, K), slot_R // K, slot_R, tuple(blocks))


def sum_choices(y_RD, rows: Rows) -> jax.Array:
    """Back to tokens: the sum over a token's K choices; nothing for those without an expert."""
    # K gathers and adds: one gather and a reduction over K costs ten times as much on CPU
    choices = [y_RD.at[row_T].get(mode="fill", fill_value=0) for row_T in rows.row_TK.T]
    return functools.reduce(jnp.add, choices)
