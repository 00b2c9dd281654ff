"""Causal attention for TPU by JAX's own splash attention kernels, which take values of another size than keys, and segments.

One device's heads and sequences: XLA cannot partition a kernel, so whoever runs on a mesh calls this inside `shard_map`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.causal_attention.blockwise import RESIDUALS
from pallas_kernels.products import as_precise_as_operands

_LANES = 128


def _block(L: int) -> int:
    """The largest of 512, 256 and 128 that divides the length: 512 queries by 512 keys and their scores fill VMEM well."""
    return next(b for b in (512, 256, _LANES) if L % b == 0)


@functools.partial(jax.named_call, name="causal_attention_splash")
def causal_attention(q_BLHX, k_BLHX, v_BLHU, segment_BL, scale: float, interpret: Any = None):
    """See `api.causal_attention`; lengths are padded to multiples of 128."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (  # takes a second
        splash_attention_kernel,
        splash_attention_mask,
    )

    L, H = q_BLHX.shape[1:3]
    pad = -L % _LANES
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    sizes = splash_attention_kernel.BlockSizes(**dict.fromkeys(names, _block(L + pad)), use_fused_bwd_kernel=True)
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((L + pad, L + pad))] * H)
    make = functools.partial(
        splash_attention_kernel.make_splash_mha, mask, block_sizes=sizes, head_shards=1, q_seq_shards=1,
        residual_checkpoint_name=RESIDUALS, interpret=bool(interpret),
    )  # fmt: skip

    def of_sequences(q_BHLX, k_BHLX, v_BHLU, segment_BL):
        kernel = make()  # its arrays belong to whatever traces it: forward and backward pass each make their own

        def of_sequence(q_HLX, k_HLX, v_HLU, segment_L):
            return kernel(q_HLX, k_HLX, v_HLU, segment_ids=splash_attention_kernel.SegmentIds(segment_L, segment_L))

        return jax.vmap(of_sequence)(q_BHLX, k_BHLX, v_BHLU, segment_BL)

    def heads_first(x_BLHX):
        x_BLHX = jnp.pad(x_BLHX, ((0, 0), (0, pad), (0, 0), (0, 0))) if pad else x_BLHX
        return jnp.swapaxes(x_BLHX, 1, 2)

    # padding gets a segment of its own: no real query sees it, and its rows still have themselves to attend to
    segment_BL = jnp.pad(segment_BL.astype(jnp.int32), ((0, 0), (0, pad)), constant_values=-1)
    q_BLHX = (q_BLHX * scale).astype(q_BLHX.dtype)  # the kernel does not scale
    q_BHLX, k_BHLX, v_BHLU = map(heads_first, (q_BLHX, k_BLHX, v_BLHU))
    attend = as_precise_as_operands(of_sequences, q_BHLX, k_BHLX, v_BHLU)
    out_BHLU: Any = attend(q_BHLX, k_BHLX, v_BHLU, segment_BL)
    return jnp.swapaxes(out_BHLU, 1, 2)[:, :L]
