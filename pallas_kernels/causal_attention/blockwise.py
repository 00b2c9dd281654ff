"""Blockwise causal attention with an online softmax and its own gradient, in plain JAX (FlashAttention-2, arXiv 2307.08691).

Works on independent (batch, head) pairs, two axes throughout, so that each may be sharded. Queries and keys are cut into I
blocks of b places, whose axis comes first, so that a block lies in one piece; query block i meets key blocks 0..i only, so
that half of the square is never computed.
The forward pass keeps the output and each row's log-sum-exp; the backward pass recomputes the probabilities block by block.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.products import einsum

RESIDUALS = "causal_attention"  # checkpoint_name of what the forward pass keeps for the backward pass
_NEG = -1e30  # finite, so that a row with nothing to attend to yet gives exp(0), not NaN; it is rescaled away later


def _block_size(L: int) -> int:
    """128: forward and backward take 39 ms here where 256 takes 50 and 512 takes 75 (2 cores, 24 heads in all, L = 512)."""
    return min(128, -(-L // 8) * 8)


def _scores(rows, columns, seg_rows, seg_columns, scale, visible):
    """f32[B, H, b, b] scaled products of two blocks, masked to `visible` pairs of the same segment."""
    s = einsum("nhrx,nhcx->nhrc", rows, columns, dtype=jnp.float32) * scale
    same_Bbb = seg_rows[:, :, None] == seg_columns[:, None, :]
    return jnp.where((visible & same_Bbb)[:, None], s, _NEG)


def _causal(i, j, b):
    """bool[b, b]: which queries (rows) of block i may see which keys of block j."""
    return i * b + jnp.arange(b)[:, None] >= j * b + jnp.arange(b)[None, :]


def _block(array, i):
    return lax.dynamic_index_in_dim(array, i, keepdims=False)


def _forward(q_IBHbX, k_IBHbX, v_IBHbU, segment_IBb, scale):
    _, B, H, b, U = v_IBHbU.shape

    def query_block(i):
        q, seg_q = _block(q_IBHbX, i), _block(segment_IBb, i)

        def key_block(j, carry):
            out, total, top = carry
            s = _scores(q, _block(k_IBHbX, j), seg_q, _block(segment_IBb, j), scale, _causal(i, j, b))
            new_top = jnp.maximum(top, s.max(-1))
            p = jnp.exp(s - new_top[..., None])
            shrink = jnp.exp(top - new_top)
            v = _block(v_IBHbU, j)
            pv = einsum("nhqk,nhku->nhqu", p.astype(v.dtype), v, dtype=jnp.float32)
            return out * shrink[..., None] + pv, total * shrink + p.sum(-1), new_top

        init = tuple(
            jnp.full(shape, fill, jnp.float32) for shape, fill in (((B, H, b, U), 0), ((B, H, b), 0), ((B, H, b), _NEG))
        )
        out, total, top = lax.fori_loop(0, i + 1, key_block, init)
        return (out / total[..., None]).astype(v_IBHbU.dtype), top + jnp.log(total)

    return lax.map(query_block, jnp.arange(q_IBHbX.shape[0]))


def _backward(q_IBHbX, k_IBHbX, v_IBHbU, segment_IBb, out_IBHbU, lse_IBHb, dout_IBHbU, scale):
    blocks, _, _, b = lse_IBHb.shape
    # row sums of p * dp, which the softmax's gradient needs (FlashAttention-2, section 3.1)
    delta_IBHb = jnp.sum(out_IBHbU.astype(jnp.float32) * dout_IBHbU.astype(jnp.float32), axis=-1)

    def key_block(dq_IBHbX, j):
        k, v, seg_k = _block(k_IBHbX, j), _block(v_IBHbU, j), _block(segment_IBb, j)

        def query_block(i, carry):
            dq_IBHbX, dk, dv = carry
            q, dout = _block(q_IBHbX, i), _block(dout_IBHbU, i)
            # scores transposed, [B, H, keys, queries]: of the four products that use them only dq's then needs a transpose
            s = _scores(k, q, seg_k, _block(segment_IBb, i), scale, _causal(i, j, b).T)
            p = jnp.exp(s - _block(lse_IBHb, i)[:, :, None])
            dv += einsum("nhkq,nhqu->nhku", p.astype(v.dtype), dout, dtype=jnp.float32)
            dp = einsum("nhku,nhqu->nhkq", v, dout, dtype=jnp.float32)
            ds = (p * (dp - _block(delta_IBHb, i)[:, :, None]) * scale).astype(q.dtype)
            dk += einsum("nhkq,nhqx->nhkx", ds, q, dtype=jnp.float32)
            dq = _block(dq_IBHbX, i) + einsum("nhkq,nhkx->nhqx", ds, k, dtype=jnp.float32)
            return lax.dynamic_update_index_in_dim(dq_IBHbX, dq, i, 0), dk, dv

        init = (dq_IBHbX, jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
        dq_IBHbX, dk, dv = lax.fori_loop(j, blocks, query_block, init)
        return dq_IBHbX, (dk.astype(k.dtype), dv.astype(v.dtype))

    dq_IBHbX, (dk_IBHbX, dv_IBHbU) = lax.scan(key_block, jnp.zeros(q_IBHbX.shape, jnp.float32), jnp.arange(blocks))
    return dq_IBHbX.astype(q_IBHbX.dtype), dk_IBHbX, dv_IBHbU


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q_IBHbX, k_IBHbX, v_IBHbU, segment_IBb, scale):
    return _forward(q_IBHbX, k_IBHbX, v_IBHbU, segment_IBb, scale)[0]


def _attention_fwd(q_IBHbX, k_IBHbX, v_IBHbU, segment_IBb, scale):
    out_IBHbU, lse_IBHb = checkpoint_name(_forward(q_IBHbX, k_IBHbX, v_IBHbU, segment_IBb, scale), RESIDUALS)
    return out_IBHbU, (q_IBHbX, k_IBHbX, v_IBHbU, segment_IBb, out_IBHbU, lse_IBHb)


def _attention_bwd(scale, residuals, dout_IBHbU):
    q_IBHbX, k_IBHbX, v_IBHbU, segment_IBb, out_IBHbU, lse_IBHb = residuals
    return *_backward(q_IBHbX, k_IBHbX, v_IBHbU, segment_IBb, out_IBHbU, lse_IBHb, dout_IBHbU, scale), None


_attention.defvjp(_attention_fwd, _attention_bwd)


@functools.partial(jax.named_call, name="causal_attention_blockwise")
def causal_attention(q_BLHX, k_BLHX, v_BLHU, segment_BL, scale: float):
    """See `api.causal_attention`."""
    B, L, H, U = v_BLHU.shape
    b = _block_size(L)
    pad = -L % b

    def in_blocks(x_BLHX):
        x_BLHX = jnp.pad(x_BLHX, ((0, 0), (0, pad), (0, 0), (0, 0)))
        return x_BLHX.reshape(B, -1, b, H, x_BLHX.shape[-1]).transpose(1, 0, 3, 2, 4)

    # padding gets a segment of its own: no real query sees it, and its rows still have themselves to attend to
    segment_BL = jnp.pad(segment_BL, ((0, 0), (0, pad)), constant_values=-1)
    segment_IBb = jnp.moveaxis(segment_BL.reshape(B, -1, b), 1, 0)
    out_IBHbU = _attention(in_blocks(q_BLHX), in_blocks(k_BLHX), in_blocks(v_BLHU), segment_IBb, scale)
    return out_IBHbU.transpose(1, 0, 3, 2, 4).reshape(B, L + pad, H, U)[:, :L]
