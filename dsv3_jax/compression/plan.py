"""What `dsv3 compress` will take, by arithmetic alone: memory, FLOPs and hours. No weights are read, nothing is timed.

The formulas count what layer.py and gptq.py do. A linear layer of K inputs and N outputs, whose weights are `copies` matrices
(experts), on R rows (tokens) each:

- Moments: x^T x of every row, 2 R K^2. q_a and kv_a share theirs.
- Factorisation: Cholesky K^3 / 3, then R U = I by a triangular solve with K right-hand sides, K^3.
- Rounding, in blocks of B inputs: input j moves the block's weights, 2 B N each, so 2 B K N; each block moves all inputs,
  2 B K N, K / B times. Together 2 K N (B + K). One block is read and written for each input, the weight for each block, in
  float32: 8 K N (B + K / B) bytes. The K inputs follow each other: K steps, for all experts at once.
- Descent, where there is one: a sweep is the same with groups for blocks, and each group's scale takes two products more of the
  group with itself, 4 K N g. Before the first, H dw takes 2 K^2 N.
- Forward: what a stage reads is computed anew from the block's input (blocks.py), and then the block is run. Of each weight it
  takes 2 R K N as often as `_PASSES` says; attention's core runs twice, with 2 H (X + U) for each of the (L + 1) / 2 keys
  that a query sees in the mean.

Routed experts' moments, factorisations and rounding are spread over the devices; everything else is on the first one.
"""

import math
from dataclasses import dataclass, field

from dsv3_jax.compression.blocks import Place, places
from dsv3_jax.compression.experts import TOGETHER
from dsv3_jax.compression.gptq import SWEEPS, block_of, descends
from dsv3_jax.compression.profile import Profile, is_routed
from dsv3_jax.compression.sizes import Weight, weights_of
from dsv3_jax.config import Config, ModelConfig
from dsv3_jax.cost.efficiency import ASSUMED
from dsv3_jax.cost.estimate import PASSES_OF_FLOAT32
from dsv3_jax.cost.topologies import Topology
from pallas_kernels.integer_weight import IntegerFormat

FACTORISATION = 0.1  # of the products' rate: what a factorisation of a few thousand rows reaches
STEP_S = 30e-6  # a step of the loop over inputs: five kernels of 5 us that wait for each other, and the loop's condition
_KINDS = ("moments", "factorisation", "rounding", "forward")
_PASSES = {"w_q_a_DQ": 3, "w_kv_a_DX": 3, "w_o_HUD": 1, "w_down_FD": 1, "w_down_EMD": 1}  # others twice


@dataclass
class Work:
    """FLOPs by what they are for, bytes moved by rounding, and steps that follow each other."""

    flops: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_KINDS, 0.0))
    rounding_bytes: float = 0.0
    steps: int = 0

    def add(self, other: "Work") -> None:
        for what, flops in other.flops.items():
            self.flops[what] += flops
        self.rounding_bytes += other.rounding_bytes
        self.steps += other.steps


def layers_of(config: ModelConfig, place: Place) -> int:
    """How many blocks' weights are stacked in the arrays that a block's are in."""
    return 1 if place.stack == "mtp" else config.num_moe_layers if place.moe else config.num_dense_layers


def linears_of(config: ModelConfig, place: Place) -> list[Weight]:
    """The linear layers of one block; `copies` are its experts."""
    layers = layers_of(config, place)
    of_block = [w for w in weights_of(config) if w.linear and w.name.startswith(place.prefix)]
    return [Weight(w.name, True, w.copies // layers, w.inputs, w.outputs, w.bytes) for w in of_block]


def gptq_work(w: Weight, rows: float, format: IntegerFormat) -> Work:
    """Moments, factorisation, rounding and descent of a layer's matrices, each of which reads so many rows."""
    K, N, B = w.inputs, w.outputs, block_of(w.inputs)
    g, sweeps = format.of(K).group, SWEEPS if descends(format) else 0
    shared = w.name.endswith("w_kv_a_DX")  # has the moments of q_a, or of q
    flops = {
        "moments": 0.0 if shared else 2.0 * rows * K**2 * w.copies,
        "factorisation": (K**3 / 3 + K**3) * w.copies,
        "rounding": 2.0 * K * N * (B + K + sweeps * (3 * g + K) + K * (sweeps > 0)) * w.copies,
        "forward": 0.0,
    }
    return Work(flops, 8.0 * K * N * (B + K / B + sweeps * (g + K / g)) * w.copies, K * (1 + sweeps))


def forward_flops(config: ModelConfig, linears: list[Weight], tokens: int, seq_len: int) -> float:
    """FLOPs of a block's calibration tokens: for what its stages read, and for what leaves it."""
    total = 0.0
    for w in linears:
        used = w.copies * config.num_experts_per_tok / config.n_routed_experts if is_routed(w.name) else 1
        total += 2.0 * tokens * w.inputs * w.outputs * used * _PASSES.get(w.name.rsplit("/", 1)[1], 2)
    core = 2.0 * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim) * (seq_len + 1) / 2
    return total + 2 * core * tokens


@dataclass(frozen=True)
class CompressionPlan:
    """What compressing a model on a topology takes."""

    topology: Topology
    devices: int  # that share the experts
    tokens: int  # of the calibration set, if the text has as many
    tokens_per_expert: float  # in the mean
    first: Work  # on the first device
    spread: Work  # on all devices that share the experts, together
    memory_first: dict[str, float]  # bytes on the first device by what they are, while it compresses the largest block
    memory_others: float  # bytes on each other device

    @property
    def fits(self) -> bool:
        """Whether the first device, which has most, has room."""
        return sum(self.memory_first.values()) <= self.topology.room

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by what they go to, at the rates of hardware.yaml and the assumed shares of them."""
        facts = self.topology.facts
        rate = facts["tera_ops"].get("float32", facts["tera_ops"]["bf16"] / PASSES_OF_FLOAT32) * 1e12 * ASSUMED.matmul
        memory = facts["memory_tb_s"] * 1e12 * ASSUMED.memory

        def computing(what: str) -> float:
            return (self.first.flops[what] + self.spread.flops[what] / self.devices) / rate

        moving = (self.first.rounding_bytes + self.spread.rounding_bytes / self.devices) / memory
        return {
            "moments": computing("moments"),
            "factorisation": computing("factorisation") / FACTORISATION,
            "rounding": max(computing("rounding"), moving),
            "waiting for the last input": (self.first.steps + self.spread.steps) * STEP_S,
            "forward": computing("forward"),
        }


def _memory(config: ModelConfig, profile: Profile, place: Place, tokens: int, devices: int) -> tuple[dict[str, float], float]:
    """Bytes on the first device by what they are, and on each other device, while one block is compressed, in float32."""
    layers = layers_of(config, place)
    block = 4.0 * sum(w.size // layers for w in weights_of(config) if w.name.startswith(place.prefix))
    gptq = profile.method == "gptq"
    largest = max(linears_of(config, place), key=lambda w: w.size)
    share = devices if is_routed(largest.name) else 1
    moments = 4.0 * largest.copies * largest.inputs**2 * gptq
    # a factorisation has the damped moments, their factor and its inverse; rounding the permuted weight, codes, scale and zero
    together = min(TOGETHER / (largest.copies / share), 1.0) if share > 1 else 1.0
    working = (3 * moments + 4 * 4.0 * largest.size * gptq) / share * together
    streams = 3 + 2 * (profile.prune.fraction > 0)  # before and after attention, normed; and the original's
    first = {
        "a layer's weights": block,
        "what the codes stand for": 4.0 * largest.size,
        "second moments": moments / share + (8.0 * largest.inputs**2 if share > 1 else 0),  # its own, and one more for the mean
        "GPTQ": working,
        "calibration set": 4.0 * streams * tokens * config.hidden_size,
    }
    return first, (moments / share + working if share > 1 else 0.0)


def plan_compression(config: Config, profile: Profile, topology: Topology) -> CompressionPlan:
    """What compressing a model of this configuration takes. Raises `UserError` if the profile does not fit it."""
    model = config.model
    profile.check_fits(model)
    windows = -(-profile.calibration.tokens // config.data.seq_len)
    windows = max(windows // profile.calibration.batch * profile.calibration.batch, min(windows, profile.calibration.batch))
    tokens = windows * config.data.seq_len
    per_expert = tokens * model.num_experts_per_tok / model.n_routed_experts
    devices = math.gcd(topology.size, model.n_routed_experts)
    first, spread, memory = Work(), Work(), ({}, 0.0)
    for place in places(model):
        linears = linears_of(model, place)
        first.flops["forward"] += forward_flops(model, linears, tokens, config.data.seq_len)
        for w in linears:
            format = profile.integer_format_of(w.name)
            if profile.method == "gptq" and format is not None:
                routed = is_routed(w.name)
                (spread if routed else first).add(gptq_work(w, per_expert if routed else tokens, format))
        memory = max(memory, _memory(model, profile, place, tokens, devices), key=lambda m: sum(m[0].values()))
    return CompressionPlan(topology, devices, tokens, per_expert, first, spread, *memory)
