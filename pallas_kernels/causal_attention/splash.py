"""Causal attention for TPU by JAX's own splash attention kernels, which take values of another size than keys, and segments.

One device's heads and sequences: XLA cannot partition a kernel, so whoever runs on a mesh calls this inside `shard_map`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

_LANES = 128


def _block(L: int) -> int:
    """The largest of 512, 256 and 128 that divides the length: 512 queries by 512 keys and their scores fill VMEM well."""
    return next(b for b in (512, 256, _LANES) if L % b == 0)


@functools.partial(jax.named_call, name="causal_attention_splash")
def causal_attention(q_BLHX, k_BLHX, v_BLHU, segment_BL, scale: float, interpret: Any = None):
    """See `api.causal_attention`. Raises `NotImplementedError` for lengths that are no multiples of 128."""
    L, H = q_BLHX.shape[1:3]
    if L % _LANES:
        raise NotImplementedError(f"splash attention takes lengths that are multiples of {_LANES}, not {L}; use blockwise")
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    sizes = splash_attention_kernel.BlockSizes(**dict.fromkeys(names, _block(L)), use_fused_bwd_kernel=True)
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((L, L))] * H)
    kernel = splash_attention_kernel.make_splash_mha(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=bool(interpret)
    )

    def of_sequence(q_HLX, k_HLX, v_HLU, segment_L):
        return kernel(q_HLX, k_HLX, v_HLU, segment_ids=splash_attention_kernel.SegmentIds(segment_L, segment_L))

    q_BLHX = (q_BLHX * scale).astype(q_BLHX.dtype)  # the kernel does not scale
    heads_first = (jnp.swapaxes(a, 1, 2) for a in (q_BLHX, k_BLHX, v_BLHU))
    out_BHLU: Any = jax.vmap(of_sequence)(*heads_first, segment_BL.astype(jnp.int32))
    return jnp.swapaxes(out_BHLU, 1, 2)
