"""Where the model's arrays live. The model names axes; a layout knows what they are sharded over.

`Layout` is that of one device: it moves nothing. What stands around the model (training, checkpoints, serving) asks the same
object about devices and stored arrays. `parallel/layout.py` has the one for meshes. Names of activation axes:
batch; sequence (the length as it is split between blocks); heads, ffn, vocab (split inside a block, whose length is complete).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.sharding import Sharding, SingleDeviceSharding
from jaxtyping import Array, Float, Int

from pallas_kernels import causal_attention, grouped_swiglu, integer_experts, linear_cross_entropy, linear_divergence
from pallas_kernels.integer_weight import IntegerWeight
from pallas_kernels.scaled import Gemms
from pallas_kernels.scaled_linear.api import scaled_linear, scaled_swiglu_linear


class Traffic(NamedTuple):
    """How many copies of tokens an MoE layer sends away, over all devices: to other expert ranks, and to other nodes."""

    to_ranks: Float[Array, "*layers"]
    to_nodes: Float[Array, "*layers"]


@dataclass(frozen=True)
class Layout:
    """One device. The methods are those of a mesh's layout, so that the model is written once."""

    @property
    def outside_pipeline(self) -> "Layout":
        """The layout of what is not in a pipeline's stages: embedding, dense layers, head, MTP modules."""
        return self

    def constrain(self, x: Array, *axes: str | None) -> Array:
        """Say how an activation is laid out; the values stay."""
        return x

    def gather(self, layer: Any, dtype: jnp.dtype) -> Any:
        """A layer's (or module's) parameters as it computes with them: matrices in `dtype`, not sharded along `embed`."""
        return layer

    def tokenwise(self, f: Callable, *arrays: Array) -> Any:
        """f(*arrays) for an `f` that treats every token [B, L] of the first array by itself; not differentiated."""
        return f(*arrays)

    def embed(self, table_VD: Float[Array, "V D"], token_BL: Int[Array, "B L"], dtype: jnp.dtype) -> Float[Array, "B L D"]:
        return table_VD[token_BL].astype(dtype)

    def scaled_linear(
        self, x: Float[Array, "B L K"] | Float[Array, "B L 2 K"], w: Float[Array, "K ..."], gemms: Gemms,
        axes: tuple[str | None, ...],
    ) -> Float[Array, "B L ..."]:  # fmt: skip
        """x w, or swiglu(x) w of a gate and what passes it, from operands in 8 bits (see `pallas_kernels.scaled_linear`).

        `axes` are w's logical axes.
        """
        product = scaled_swiglu_linear if x.ndim == 4 else scaled_linear
        y_TN = product(x.reshape(x.shape[0] * x.shape[1], -1), w.reshape(w.shape[0], -1), gemms)
        return y_TN.reshape(*x.shape[:2], *w.shape[1:])

    def attention(
        self,
        q_BLHX: Float[Array, "B L H X"],
        k_BLHX: Float[Array, "B L H X"],
        v_BLHU: Float[Array, "B L H U"],
        segment_BL: Int[Array, "B L"],
        scale: float,
        implementation: str,
    ) -> Float[Array, "B L H U"]:
        """Causal attention within segments (see `pallas_kernels.causal_attention`)."""
        return causal_attention(q_BLHX, k_BLHX, v_BLHU, segment_BL, scale, implementation)

    def experts(
        self,
        x_BLD: Float[Array, "B L D"],
        w_gate_up_ED2M: Float[Array, "E D 2 M"] | IntegerWeight,
        w_down_EMD: Float[Array, "E M D"] | IntegerWeight,
        expert_BLK: Int[Array, "B L K"],
        weight_BLK: Float[Array, "B L K"],
        gemms: Gemms | None,
        implementation: str = "auto",
    ) -> tuple[Float[Array, "B L D"], Traffic]:
        """The routed experts' weighted sum, wherever they live (see `pallas_kernels.grouped_swiglu`); drops no token."""
        (B, L, D), K = x_BLD.shape, expert_BLK.shape[-1]
        axes = ("experts", None, None, "moe_ffn"), ("experts", "moe_ffn", None)
        tokens = x_BLD.reshape(B * L, D), expert_BLK.reshape(B * L, K), weight_BLK.reshape(B * L, K)
        weights = w_gate_up_ED2M, w_down_EMD
        if not isinstance(w_gate_up_ED2M, IntegerWeight):
            weights = w_gate_up_ED2M.astype(x_BLD.dtype), w_down_EMD.astype(x_BLD.dtype)

        def held(w_gate_up_ED2M, w_down_EMD, x_TD, expert_TK, weight_TK):
            if isinstance(w_gate_up_ED2M, IntegerWeight):
                return integer_experts(x_TD, w_gate_up_ED2M, w_down_EMD, expert_TK, weight_TK)
            return grouped_swiglu(x_TD, w_gate_up_ED2M, w_down_EMD, expert_TK, weight_TK, gemms, implementation)

        return self.held_experts(held, weights, axes, *tokens).reshape(B, L, D), Traffic(jnp.float32(0), jnp.float32(0))

    def held_experts(
        self,
        f: Callable[..., Array],
        weights: tuple[Any, ...],
        axes: tuple[tuple[str | None, ...], ...],
        x_TD: Float[Array, "T D"],
        expert_TK: Int[Array, "T K"],
        weight_TK: Float[Array, "T K"],
    ) -> Float[Array, "T D"]:
        """f(*weights, x_TD, expert_TK, weight_TK), a sum over experts, by those who hold them.

        An expert's number is counted among those that the weights given to `f` have; f skips the number after the last.
        """
        return f(*weights, x_TD, expert_TK, weight_TK)

    def cross_entropy(
        self,
        x_BLD: Float[Array, "B L D"],
        head_DV: Float[Array, "D V"],
        target_BL: Int[Array, "B L"],
        weight_BL: Float[Array, "B L"],
        implementation: str,
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Weighted sums of nll and of right guesses (see `pallas_kernels.linear_cross_entropy`)."""
        x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
        head_DV = head_DV.astype(x_BLD.dtype)
        return linear_cross_entropy(x_TD, head_DV, target_BL.reshape(-1), weight_BL.reshape(-1), implementation)

    def divergence(
        self,
        x_BLD: Float[Array, "B L D"],
        head_DV: Float[Array, "D V"],
        teacher_x_BLC: Float[Array, "B L C"],
        teacher_head_CV: Float[Array, "C V"],
        weight_BL: Float[Array, "B L"],
        temperature: float,
    ) -> Float[Array, ""]:
        """Weighted sum of the divergence of a model's predictions from a teacher's (see `pallas_kernels.linear_divergence`)."""
        x_TD, teacher_x_TC = (x.reshape(-1, x.shape[-1]) for x in (x_BLD, teacher_x_BLC))
        heads = head_DV.astype(x_BLD.dtype), teacher_head_CV.astype(teacher_x_BLC.dtype)
        return linear_divergence(x_TD, heads[0], teacher_x_TC, heads[1], weight_BL.reshape(-1), temperature)

    # --- devices and stored arrays: for what stands around the model ---------------------------------------------------

    @property
    def devices(self) -> tuple[Any, ...]:
        """All devices of the layout, which are of one kind."""
        return (jax.devices()[0],)

    @property
    def axis_sizes(self) -> dict[str, int]:
        """The mesh's axes of more than one device."""
        return {}

    @property
    def device(self) -> Any:
        return self.devices[0]

    @property
    def size(self) -> int:
        return len(self.devices)

    @property
    def replicas(self) -> int:
        return self.axis_sizes.get("data", 1)

    @property
    def stages(self) -> int:
        """Stages of the pipeline, 1 without."""
        return self.axis_sizes.get("pipe", 1)

    def axes(self, name: str) -> tuple[str, ...]:
        """The mesh axes (of more than one device) of a logical activation axis."""
        return ()

    def shards(self, name: str) -> int:
        """How many parts a logical activation axis is split into."""
        return math.prod(self.axis_sizes[axis] for axis in self.axes(name))

    def spec(self, *names: str | None) -> P:
        """The spec of an activation with these logical axes."""
        return P()

    def stored_spec(self, variable: nnx.Variable) -> P:
        """The spec of a parameter between steps, and of an optimiser's array beside it."""
        return P()

    def sharding(self, spec: P) -> Sharding:
        return SingleDeviceSharding(self.device)

    def place(self, shape: tuple[int, ...], *axes: str | None) -> Sharding:
        """Where a decoder's array with these logical axes lies."""
        return self.replicated

    @property
    def replicated(self) -> Sharding:
        return self.sharding(P())

    @property
    def batch_sharding(self) -> Sharding:
        """The sharding of arrays whose first axis is the rows of a batch."""
        return self.sharding(P())

    def on_each_device(self, f: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """`f` of each device's shards."""
        return f

    def jit(self, f: Callable, arguments: Any, results: Any, donate: tuple[int, ...] = ()) -> Callable:
        """jit with the shardings of arguments and results; on one device they go without saying."""
        return jax.jit(f, donate_argnums=donate)

    @property
    def serving(self) -> "Layout":
        """The layout with which a model decodes whose weights are stored in this one."""
        return self

    @property
    def decoding(self) -> "Layout":
        """The layout of an engine's decoder, whose weights are brought into it once."""
        return self
