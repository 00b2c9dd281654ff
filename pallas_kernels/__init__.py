"""Fused operations, one folder each: `api` (contract and dispatch), `reference` (the definition, for reading), backends.

Imports nothing from dsv3_jax. A caller who names an implementation gets it or an error; only "auto" chooses, and it does
so when the program is lowered for a platform, so that a program compiled on a CPU machine for another target is right.
"""

from pallas_kernels.causal_attention.api import causal_attention
from pallas_kernels.grouped_swiglu.api import grouped_swiglu
from pallas_kernels.grouped_swiglu.dense import dense_is_worthwhile, dense_swiglu
from pallas_kernels.linear_cross_entropy.api import linear_cross_entropy
from pallas_kernels.registry import register

__all__ = ["causal_attention", "dense_is_worthwhile", "dense_swiglu", "grouped_swiglu", "linear_cross_entropy", "register"]
