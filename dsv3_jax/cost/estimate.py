"""A step's memory and time by arithmetic alone, for ranking thousands of meshes before a few are compiled.

Coarse on purpose: formulas of the model's sizes, the efficiencies of `efficiency.ASSUMED`, no schedule. What it ranks first is
compiled afterwards, and those figures count.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
from flax import nnx

from dsv3_jax.config import Config, ModelConfig
from dsv3_jax.cost.all_reduce import ring, tree
from dsv3_jax.cost.efficiency import Efficiency
from dsv3_jax.cost.links import Collective, Links, Location, sent_bytes
from dsv3_jax.cost.memory import abstract_layout, parameter_counts, parameters_per_device, state_bytes_per_device
from dsv3_jax.cost.topologies import Topology, mesh_label
from dsv3_jax.exchange.codec import Codec
from dsv3_jax.exchange.exchange import compressible_share
from dsv3_jax.model.counts import training_flops_per_token
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.parallel.experts import SLACK
from dsv3_jax.parallel.mesh import AXES
from dsv3_jax.parallel.schedule import make_schedule
from dsv3_jax.precision.recipes import RECIPES

# Share of the forward pass that the backward pass recomputes, by remat.policy; `selective` recomputes norms, rotations,
# up-projections and SwiGLU.
RECOMPUTED = {"none": 0.0, "selective": 0.15, "offload": 0.15, "full": 1.0, "sqrt": 1.0}
# Numbers that a layer keeps per token for the backward pass, in units of hidden_size; counted on compiled programs.
KEPT = {"none": 16.0, "selective": 8.0, "offload": 1.0, "full": 1.0, "sqrt": 0.3}
_EXCHANGE_BUFFERS = 8  # buffers of all rows of an expert exchange that are alive at the same time
_EXCHANGES = 5  # of rows to or from experts in a layer: there and back, and backward there with two arrays and back with one
PASSES_OF_FLOAT32 = 6  # products in bfloat16 that a TPU makes one of float32 numbers of
_BETWEEN = 0.75  # passes over memory between products, over the products' time in 16 bits at their peak


@dataclass(frozen=True)
class Hidden:
    """Shares of communication time that work hides: of weights and their gradients, which no layer waits for, and of tokens."""

    weights: float
    tokens: float


# Of the schedules that XLA makes of this package's step by default, read from compiled programs (v5p:8x8x8, h100:128x8).
XLA_HIDES = {"tpu": Hidden(0.0, 0.17), "gpu": Hidden(0.03, 0.07)}
GRADIENTS = "gradients of replicas"
_TOKEN_COMMUNICATION = ("tokens to experts", "activations over tensor")


@dataclass(frozen=True)
class Candidate:
    """A configuration on a mesh, with its estimate; per device and step."""

    config: Config
    sizes: dict[str, int]  # of the mesh's axes
    memory: float  # bytes
    work: float  # seconds
    communication: dict[str, float]  # seconds by what is sent
    occupancy: float  # share of the pipeline stages' time that is work
    seconds: float

    @property
    def label(self) -> str:
        c = self.config
        return (
            f"{mesh_label(self.sizes)}; {c.precision.recipe}, remat {c.remat.policy}, {c.train.grad_accum_steps} microbatches"
        )


_flops_per_token = functools.cache(training_flops_per_token)


@functools.cache
def _abstract_parameters(model: ModelConfig) -> nnx.State:
    transformer = nnx.eval_shape(lambda: Transformer(model, recipe=RECIPES["bf16"], rngs=nnx.Rngs(0)))
    return nnx.state(transformer, nnx.Param)


def compressed_share(config: Config, sizes: dict[str, int]) -> float:
    """Share of a device's parameters whose gradients can cross `data` compressed."""
    return compressible_share(_abstract_parameters(config.model), abstract_layout(sizes))


def pipeline_occupancy(config: Config, sizes: dict[str, int]) -> float:
    """Share of the stages' time that is work; 1 without a pipeline."""
    if sizes["pipe"] == 1:
        return 1.0
    parallel = config.parallel
    return make_schedule(parallel.pipe_schedule, sizes["pipe"], parallel.pipe_chunks, config.train.grad_accum_steps).occupancy


def _locations(topology: Topology) -> list[Location]:
    """Where the devices are, in the order of a mesh whose last axes are nearest."""
    if not topology.is_tpu:
        hosts, gpus = topology.shape
        return [(0, host, (host * gpus + i,)) for host in range(hosts) for i in range(gpus)]
    cores = topology.facts["links"]["ici"]["cores"]
    chips = [tuple(map(int, p)) for p in np.ndindex(*topology.shape)]
    return [(s, 0, chip) for s in range(topology.slices) for chip in chips for _ in range(cores)]


def _first_group(sizes: dict[str, int], axes: tuple[str, ...]) -> tuple[int, ...]:
    """The first devices that differ along these axes only."""
    ids = np.arange(math.prod(sizes.values())).reshape([sizes[a] for a in AXES])
    rest = [i for i, a in enumerate(AXES) if a not in axes]
    size = math.prod(sizes[a] for a in axes)
    return tuple(ids.transpose(*rest, *(AXES.index(a) for a in axes)).reshape(-1, size)[0].tolist())


class Estimator:
    """Estimates steps on one topology.

    Args:
        hidden: Shares of communication behind work; those of XLA's default schedules if not given.
        zero3: Weights are gathered and gradients scattered for each microbatch, as this package does; without, once a step.
    """

    def __init__(self, topology: Topology, efficiency: Efficiency, hidden: Hidden | None = None, zero3: bool = True):
        self._topology, self._efficiency, self._zero3 = topology, efficiency, zero3
        self._hidden = hidden or XLA_HIDES["tpu" if topology.is_tpu else "gpu"]
        self._links = Links(topology.kind, _locations(topology), topology.shape)

    def estimate(self, config: Config, sizes: dict[str, int]) -> Candidate:
        """Memory and time of a step of `config` on a mesh of these axis sizes. Cheap: nothing is traced."""
        tokens = config.data.batch_size * config.data.seq_len / math.prod(sizes.values())  # per device, over all axes
        work = self._work(config, tokens)
        communication = self._communication(config, sizes, tokens)
        exposed = sum(self.exposed_seconds(what, seconds) for what, seconds in communication.items())
        occupancy = pipeline_occupancy(config, sizes)
        memory = self._memory(config, sizes, tokens)
        return Candidate(config, sizes, memory, work, communication, occupancy, (work + exposed) / occupancy)

    def exposed_seconds(self, what: str, seconds: float) -> float:
        """The part of the communication's seconds that no work hides; `what` is a key of `Candidate.communication`."""
        return seconds * (1 - (self._hidden.tokens if what in _TOKEN_COMMUNICATION else self._hidden.weights))

    def exchange_seconds(self, config: Config, sizes: dict[str, int]) -> float:
        """Seconds in which gradients cross `data`.

        Uncompressed, that is a sum in float32. Compressed, codes go to the replicas that sum them up, the sums' codes come
        back, and what is not compressed is summed in float32.
        """
        bits, across, stored = config.parallel.compress, ("data",), parameters_per_device(config, sizes)
        assert bits != "auto", "compression.resolve_compression comes first"
        if not bits:
            return self._seconds("all-reduce", sizes, across, stored * 4)
        codec, share = Codec(bits), compressed_share(config, sizes)
        codes = share * stored * codec.block_bytes / codec.block
        return (
            self._seconds("all-to-all", sizes, across, codes)
            + self._seconds("all-gather", sizes, across, codes / sizes["data"])
            + self._seconds("all-reduce", sizes, across, (1 - share) * stored * 4)
        )

    def replica_spread(self, sizes: dict[str, int]) -> tuple[int, int]:
        """(slices or hosts that the replicas of a shard are on, replicas on each)."""
        return self._links.spread(_first_group(sizes, ("data",)))

    def flat_sum_seconds(self, config: Config, sizes: dict[str, int]) -> dict[str, float]:
        """Seconds of a float32 sum over `data` by algorithm, for those that see one kind of link, the slowest.

        Libraries for GPUs and between TPU slices have these; inside a torus there are none, and the dict is empty.
        """
        islands, _ = self.replica_spread(sizes)
        if islands == 1 and self._topology.is_tpu:
            return {}
        link = self._links.link("network" if islands > 1 else "nvlink", self._efficiency.link)
        operands = 4.0 * parameters_per_device(config, sizes), sizes["data"], link
        return {"ring": ring(*operands), "tree": tree(*operands)}

    def _seconds(self, kind: str, sizes: dict[str, int], axes: tuple[str, ...], operand_bytes: float) -> float:
        """Seconds of a collective along these axes, with `operand_bytes` on each device."""
        size = math.prod(sizes[a] for a in axes)
        if size == 1 or not operand_bytes:
            return 0.0
        c = Collective("", kind, (_first_group(sizes, axes),), axes, sent_bytes(kind, operand_bytes, size), "")
        return self._links.route(c).seconds / self._efficiency.link

    def _memory(self, config: Config, sizes: dict[str, int], tokens: float) -> float:
        """Bytes: the state, gradients, activations kept, the experts' exchange, the head."""
        m, micro = config.model, config.train.grad_accum_steps
        stored = parameters_per_device(config, sizes)
        memory = state_bytes_per_device(config, sizes) + stored * 4  # and gradients
        layers = m.num_hidden_layers / sizes["pipe"]
        microbatch_tokens = tokens * sizes["pipe"] / micro
        in_flight = min(micro, sizes["pipe"] * 2) if sizes["pipe"] > 1 else 1
        memory += in_flight * layers * microbatch_tokens * m.hidden_size * 2 * KEPT[config.remat.policy]
        rows = microbatch_tokens * m.num_experts_per_tok
        memory += _EXCHANGE_BUFFERS * SLACK * rows * m.hidden_size * 2 * (sizes["expert"] > 1)
        memory += 2 * min(microbatch_tokens, 2048) * m.vocab_size * 4 / sizes["tensor"] + m.hidden_size * m.vocab_size * 4
        if sizes["pipe"] > 1:  # a stage's weights in bfloat16, and their gradients on their way back in float32
            memory += stored * 6
        return memory

    def _communication(self, config: Config, sizes: dict[str, int], tokens: float) -> dict[str, float]:
        """Seconds by what is sent."""
        m, counts = config.model, parameter_counts(config.model)
        recomputes = RECOMPUTED[config.remat.policy] > 0
        rounds = config.train.grad_accum_steps if self._zero3 else 1
        passes = rounds * (1 + (recomputes and self._zero3))
        fsdp, fsdp_expert = ("fsdp",), ("fsdp", "expert")
        all_experts = counts.main["routed experts"]
        experts = all_experts / (sizes["expert"] * sizes["tensor"] * sizes["pipe"])
        others = (counts.total + counts.mtp - all_experts) / (sizes["tensor"] * sizes["pipe"])
        rows = tokens * m.num_experts_per_tok * m.hidden_size * 2
        if not self._topology.is_tpu and sizes["expert"] > self._topology.shape[1]:  # once to each node that a token needs
            rows *= min(1.0, m.topk_group / m.num_experts_per_tok)
        gathered = math.prod(sizes[a] for a in fsdp_expert)
        return {
            "experts' weights": passes * self._seconds("all-gather", sizes, fsdp, experts * 2 / sizes["fsdp"])
            + rounds * self._seconds("reduce-scatter", sizes, fsdp, experts * 4),
            "other weights": passes * self._seconds("all-gather", sizes, fsdp_expert, others * 2 / gathered)
            + rounds * self._seconds("reduce-scatter", sizes, fsdp_expert, others * 2),
            "tokens to experts": _EXCHANGES * m.num_moe_layers
            * self._seconds("all-to-all", sizes, ("expert",), rows),
            "activations over tensor": (4 + 2 * recomputes) * m.num_hidden_layers
            * self._seconds("all-gather", sizes, ("tensor",), tokens * m.hidden_size * 2),
            GRADIENTS: self.exchange_seconds(config, sizes),
            "stages' weights": self._seconds(
                "all-gather", sizes, ("pipe",), (experts + others) / sizes["fsdp"] / sizes["pipe"] * 6
            ),
        }  # fmt: skip

    def _work(self, config: Config, tokens: float) -> float:
        """Seconds of a device's products, with what goes on between them."""
        m, recipe = config.model, RECIPES[config.precision.recipe]
        useful = _flops_per_token(m, config.data.seq_len) * tokens
        keys = (config.data.seq_len + 1) / 2
        core = 6.0 * m.num_hidden_layers * m.num_attention_heads * (m.qk_head_dim + m.v_head_dim) * keys * tokens
        head = 6.0 * m.hidden_size * m.vocab_size * (1 + m.num_nextn_predict_layers) * tokens
        attention = 6.0 * parameter_counts(m).main["attention"] * tokens
        eight = (useful - core - head - (0 if recipe.attention else attention)) if recipe.experts else 0.0
        peaks, forward = self._topology.facts["tera_ops"], 1 + RECOMPUTED[config.remat.policy] / 3
        format = (recipe.experts.forward if recipe.experts else "") or "bf16"
        slow, in_bf16 = peaks["bf16"], useful * forward / peaks["bf16"] / 1e12
        if recipe.dtype == "float32":
            slow, in_bf16 = peaks.get("float32", slow / PASSES_OF_FLOAT32), 2 * in_bf16
        fast = peaks.get(format, slow) if recipe.experts else slow
        seconds = (eight * forward / fast + (core + useful - core - head - eight) * forward / slow + head / slow) / 1e12
        between = _BETWEEN * in_bf16  # passes over memory, which 8 bits don't shorten, and of twice the bytes in float32
        return seconds / self._efficiency.matmul + between
