"""A step's memory and time by arithmetic alone, for ranking thousands of meshes before a few are compiled.

Coarse on purpose: formulas of the model's sizes, the efficiencies of `efficiency.ASSUMED`, no schedule. What it ranks first is
compiled afterwards, and those figures count.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh

from dsv3_jax.config import Config, ModelConfig
from dsv3_jax.cost.all_reduce import ring, tree
from dsv3_jax.cost.efficiency import Efficiency
from dsv3_jax.cost.feasible import counts_of, state_bytes, stored_parameters
from dsv3_jax.cost.links import Collective, Links, Place, sent_bytes
from dsv3_jax.cost.topologies import Topology, mesh_label
from dsv3_jax.exchange.compress import Codec
from dsv3_jax.exchange.exchange import share_in_few_bits
from dsv3_jax.model.counts import training_flops_per_token
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.parallel.experts import SLACK
from dsv3_jax.parallel.mesh import AXES
from dsv3_jax.parallel.schedule import make_schedule
from dsv3_jax.precision.platforms import HARDWARE
from dsv3_jax.precision.recipes import RECIPES

# Forward passes that are done again, by remat.policy; `selective` does norms, rotations, up-projections and SwiGLU again.
RECOMPUTED = {"none": 0.0, "selective": 0.15, "offload": 0.15, "full": 1.0, "sqrt": 1.0}
# Numbers that a layer keeps of a token for the backward pass, over hidden_size; counted on compiled programs.
KEPT = {"none": 16.0, "selective": 8.0, "offload": 1.0, "full": 1.0, "sqrt": 0.3}
_EXCHANGE_BUFFERS = 8  # of all rows, at a time
_EXCHANGES = 5  # of rows to or from experts in a layer: there and back, and backward there with two arrays and back with one
_BETWEEN = 0.75  # passes over memory between products, over the products' time in 16 bits at their peak


@dataclass(frozen=True)
class Hidden:
    """Shares of communication behind work: of weights and their gradients, which wait for no layer, and of activations."""

    weights: float
    tokens: float


# Of the schedules that XLA makes of this package's step by default, read from compiled programs (v5p:8x8x8, h100:128x8).
COMPILED = {"tpu": Hidden(0.0, 0.17), "gpu": Hidden(0.03, 0.07)}
GRADIENTS = "gradients of replicas"
_OF_TOKENS = ("tokens to experts", "activations over tensor")


@dataclass(frozen=True)
class Candidate:
    """A configuration with its mesh, and what arithmetic says: bytes and seconds of a device and step."""

    config: Config
    sizes: dict[str, int]
    memory: float
    work: float
    communication: dict[str, float]  # by what is sent
    occupancy: float
    seconds: float

    @property
    def label(self) -> str:
        c = self.config
        return (
            f"{mesh_label(self.sizes)}; {c.precision.recipe}, remat {c.remat.policy}, {c.train.grad_accum_steps} microbatches"
        )


@functools.cache
def _useful(model: ModelConfig, seq_len: int) -> float:
    return training_flops_per_token(model, seq_len)


@functools.cache
def _abstract_parameters(model: ModelConfig) -> nnx.State:
    transformer = nnx.eval_shape(lambda: Transformer(model, recipe=RECIPES["bf16"], rngs=nnx.Rngs(0)))
    return nnx.state(transformer, nnx.Param)


def few_bits_share(config: Config, sizes: dict[str, int]) -> float:
    """Of a device's numbers, those whose gradients can cross `data` in few bits."""
    mesh = AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES)
    return share_in_few_bits(_abstract_parameters(config.model), mesh)


def pipeline_occupancy(config: Config, sizes: dict[str, int]) -> float:
    """Share of the stages' time that is work; 1 without a pipeline."""
    if sizes["pipe"] == 1:
        return 1.0
    parallel = config.parallel
    return make_schedule(parallel.pipe_schedule, sizes["pipe"], parallel.pipe_chunks, config.train.grad_accum_steps).occupancy


def _places(topology: Topology) -> list[Place]:
    """In the order of a mesh whose last axes are nearest."""
    if not topology.is_tpu:
        hosts, gpus = topology.shape
        return [(0, host, (host * gpus + i,)) for host in range(hosts) for i in range(gpus)]
    cores = HARDWARE[topology.kind]["links"]["ici"]["cores"]
    chips = [tuple(map(int, p)) for p in np.ndindex(*topology.shape)]
    return [(s, 0, chip) for s in range(topology.slices) for chip in chips for _ in range(cores)]


def _group(sizes: dict[str, int], axes: tuple[str, ...]) -> tuple[int, ...]:
    """The first devices that differ along these axes only."""
    ids = np.arange(math.prod(sizes.values())).reshape([sizes[a] for a in AXES])
    rest = [i for i, a in enumerate(AXES) if a not in axes]
    size = math.prod(sizes[a] for a in axes)
    return tuple(ids.transpose(*rest, *(AXES.index(a) for a in axes)).reshape(-1, size)[0].tolist())


class Estimator:
    """Of one topology. `estimate` is cheap. `zero3`: weights are gathered and gradients scattered for each microbatch, as this
    package does; without, once a step, which others do."""

    def __init__(self, topology: Topology, efficiency: Efficiency, hidden: Hidden | None = None, zero3: bool = True):
        self._topology, self._efficiency, self._zero3 = topology, efficiency, zero3
        self._hidden = hidden or COMPILED["tpu" if topology.is_tpu else "gpu"]
        self._facts = HARDWARE[topology.kind]
        self._links = Links(topology.kind, _places(topology), topology.shape)

    def _seconds(self, kind: str, sizes: dict[str, int], axes: tuple[str, ...], operand_bytes: float) -> float:
        """Of a collective along these axes whose operand has so many bytes a device."""
        size = math.prod(sizes[a] for a in axes)
        if size == 1 or not operand_bytes:
            return 0.0
        c = Collective("", kind, (_group(sizes, axes),), axes, sent_bytes(kind, operand_bytes, size), "")
        return self._links.route(c).seconds / self._efficiency.link

    def unhidden(self, what: str, seconds: float) -> float:
        """Of seconds of communication, those that no work hides."""
        return seconds * (1 - (self._hidden.tokens if what in _OF_TOKENS else self._hidden.weights))

    def estimate(self, config: Config, sizes: dict[str, int]) -> Candidate:
        m, devices, micro = config.model, math.prod(sizes.values()), config.train.grad_accum_steps
        counts = counts_of(m)
        tokens = config.data.batch_size * config.data.seq_len / devices  # a device's share, over all axes
        again = RECOMPUTED[config.remat.policy]
        experts = counts.main["routed experts"]
        others = counts.total + counts.mtp - experts
        stored = stored_parameters(config, sizes)
        memory = state_bytes(config, sizes) + stored * 4  # and gradients
        layers = m.num_hidden_layers / sizes["pipe"]
        whole = tokens * sizes["pipe"] / micro  # tokens of a microbatch on a device
        flying = min(micro, sizes["pipe"] * 2) if sizes["pipe"] > 1 else 1
        memory += flying * layers * whole * m.hidden_size * 2 * KEPT[config.remat.policy]
        memory += _EXCHANGE_BUFFERS * SLACK * whole * m.num_experts_per_tok * m.hidden_size * 2 * (sizes["expert"] > 1)
        memory += 2 * min(whole, 2048) * m.vocab_size * 4 / sizes["tensor"] + m.hidden_size * m.vocab_size * 4
        if sizes["pipe"] > 1:  # a stage's weights in bfloat16, and their gradients on their way back in float32
            memory += stored * 6

        work = self._work(config, tokens, again)
        rounds = micro if self._zero3 else 1
        passes = rounds * (1 + (again > 0 and self._zero3))
        fsdp, spread = ("fsdp",), ("fsdp", "expert")
        local = experts / (sizes["expert"] * sizes["tensor"] * sizes["pipe"])
        dense = others / (sizes["tensor"] * sizes["pipe"])
        rows = tokens * m.num_experts_per_tok * m.hidden_size * 2
        if not self._topology.is_tpu and sizes["expert"] > self._topology.shape[1]:  # once to each node that a token needs
            rows *= min(1.0, m.topk_group / m.num_experts_per_tok)
        gathered = math.prod(sizes[a] for a in spread)
        communication = {
            "experts' weights": passes * self._seconds("all-gather", sizes, fsdp, local * 2 / sizes["fsdp"])
            + rounds * self._seconds("reduce-scatter", sizes, fsdp, local * 4),
            "other weights": passes * self._seconds("all-gather", sizes, spread, dense * 2 / gathered)
            + rounds * self._seconds("reduce-scatter", sizes, spread, dense * 2),
            "tokens to experts": _EXCHANGES * m.num_moe_layers
            * self._seconds("all-to-all", sizes, ("expert",), rows),
            "activations over tensor": (4 + 2 * (again > 0)) * m.num_hidden_layers
            * self._seconds("all-gather", sizes, ("tensor",), tokens * m.hidden_size * 2),
            GRADIENTS: self.across_data(config, sizes),
            "stages' weights": self._seconds(
                "all-gather", sizes, ("pipe",), (local + dense) / sizes["fsdp"] / sizes["pipe"] * 6
            ),
        }  # fmt: skip
        occupancy = pipeline_occupancy(config, sizes)
        exposed = sum(self.unhidden(what, seconds) for what, seconds in communication.items())
        return Candidate(config, sizes, memory, work, communication, occupancy, (work + exposed) / occupancy)

    def across_data(self, config: Config, sizes: dict[str, int]) -> float:
        """Seconds of what crosses `data`: a sum in float32, or codes to those that sum them up, and from them, and a sum of
        what stays in float32."""
        bits, across, stored = config.parallel.compress, ("data",), stored_parameters(config, sizes)
        assert bits != "auto", "resolve_compression comes first"
        if not bits:
            return self._seconds("all-reduce", sizes, across, stored * 4)
        codec, share = Codec(bits), few_bits_share(config, sizes)
        codes = share * stored * codec.block_bytes / codec.block
        return (
            self._seconds("all-to-all", sizes, across, codes)
            + self._seconds("all-gather", sizes, across, codes / sizes["data"])
            + self._seconds("all-reduce", sizes, across, (1 - share) * stored * 4)
        )

    def replicas(self, sizes: dict[str, int]) -> tuple[int, int]:
        """(slices or hosts that the replicas of a shard are on, replicas on each)."""
        return self._links.spread(_group(sizes, ("data",)))

    def flat(self, config: Config, sizes: dict[str, int]) -> dict[str, float]:
        """Seconds of a sum in float32 over `data` by algorithms that see one kind of link, the slowest: GPUs', or slices'."""
        apart, _ = self.replicas(sizes)
        if apart == 1 and self._topology.is_tpu:
            return {}
        link = self._links.link("network" if apart > 1 else "nvlink", self._efficiency.link)
        carried = 4.0 * stored_parameters(config, sizes), sizes["data"], link
        return {"ring": ring(*carried), "tree": tree(*carried)}

    def _work(self, config: Config, tokens: float, again: float) -> float:
        """Seconds of a device's products, with what goes on between them."""
        m, recipe = config.model, RECIPES[config.precision.recipe]
        useful = _useful(m, config.data.seq_len) * tokens
        keys = (config.data.seq_len + 1) / 2
        core = 6.0 * m.num_hidden_layers * m.num_attention_heads * (m.qk_head_dim + m.v_head_dim) * keys * tokens
        head = 6.0 * m.hidden_size * m.vocab_size * (1 + m.num_nextn_predict_layers) * tokens
        attention = 6.0 * counts_of(m).main["attention"] * tokens
        eight = (useful - core - head - (0 if recipe.attention else attention)) if recipe.experts else 0.0
        peaks, forward = self._facts["tera_ops"], 1 + again / 3
        format = (recipe.experts.forward if recipe.experts else "") or "bf16"
        fast, slow = peaks.get(format, peaks["bf16"]), peaks["bf16"]
        seconds = (eight * forward / fast + (core + useful - core - head - eight) * forward / slow + head / slow) / 1e12
        between = _BETWEEN * (useful * forward / slow) / 1e12  # passes over memory, which 8 bits don't shorten
        return seconds / self._efficiency.matmul + between
