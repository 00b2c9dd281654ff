"""Fused operations, one folder each: `api` (contract), `reference` (the definition, for reading), one file a backend.

Imports nothing from dsv3_jax. `registry` says what the names of implementations mean, and what `auto` takes; `testing.check`
holds an implementation, of this package or of a plug-in, to the operation's definition.
"""

from pallas_kernels.causal_attention.api import causal_attention
from pallas_kernels.errors import Unavailable
from pallas_kernels.gradient_codes.api import mean_of_codes, pack_codes
from pallas_kernels.grouped_swiglu.api import grouped_swiglu
from pallas_kernels.grouped_swiglu.dense import dense_is_worthwhile, dense_swiglu
from pallas_kernels.integer_linear.api import integer_experts, integer_linear
from pallas_kernels.linear_cross_entropy.api import linear_cross_entropy
from pallas_kernels.linear_divergence.api import linear_divergence
from pallas_kernels.registry import register

__all__ = [
    "Unavailable", "causal_attention", "dense_is_worthwhile", "dense_swiglu", "grouped_swiglu", "integer_experts",
    "integer_linear", "linear_cross_entropy", "linear_divergence", "mean_of_codes", "pack_codes", "register",
]  # fmt: skip
