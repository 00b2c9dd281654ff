"""The configuration: one typed, frozen tree.

Precedence: dataclass default, YAML preset, `key=value` overrides (read and checked by config_input.py); each section checks
the fields it owns. Model keys carry the names of Hugging Face's `DeepseekV3Config`. Nothing here imports JAX.
"""

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml

from dsv3_jax.checks import choices, in_range, not_negative, positive, require
from dsv3_jax.config_input import checked, merge_overrides, read_sections
from dsv3_jax.errors import UserError

_STRICT = pydantic.ConfigDict(extra="forbid", strict=True)
_MOST_LAYERS, _MOST_EXPERTS, _MOST_MTP = 2**14, 2**16, 16  # what is done for each of them stays bounded
LARGEST_SEED = 2**32 - 1  # JAX takes no more bits


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding; the fields of Hugging Face's `rope_parameters`. YaRN is arXiv 2309.00071."""

    __pydantic_config__ = _STRICT
    rope_theta: float = 10000.0  # base of the rotation frequencies
    rope_type: Literal["default", "yarn"] = "default"  # default: RoPE; yarn: stretched to longer contexts
    factor: float = 1.0  # YaRN: how many times the original context
    original_max_position_embeddings: int = 4096  # YaRN: the context of pre-training, in tokens
    beta_fast: float = 32.0  # YaRN: dimensions that rotate more often than this in it stay as they are
    beta_slow: float = 1.0  # YaRN: those that rotate less often are stretched by all of factor
    mscale: float = 1.0  # YaRN: scales rotated queries and keys
    mscale_all_dim: float = 0.0  # YaRN: scales the softmax, over all dimensions
    # null: derived from factor, mscale and mscale_all_dim (see model/rope.py)
    attention_factor: float | None = None
    truncate: bool = True  # YaRN: round the bounds of the ramp to dimensions

    def __post_init__(self) -> None:
        in_range("model.rope_parameters", self)
        positive("model.rope_parameters", self, "rope_theta", "original_max_position_embeddings")
        require(
            self.factor >= 1,
            f"model.rope_parameters.factor={self.factor} must be at least 1 (1 leaves the context as it is)",
        )


@dataclass(frozen=True)
class ModelConfig:
    """Architecture (arXiv 2412.19437, section 2). Names and meanings are those of `DeepseekV3Config`."""

    __pydantic_config__ = _STRICT
    vocab_size: int = 4096  # tokens of the tokenizer
    hidden_size: int = 128  # width of the residual stream
    intermediate_size: int = 384  # inner width of dense layers' feed-forward
    moe_intermediate_size: int = 96  # inner width of an expert
    num_hidden_layers: int = 4  # dense and MoE layers together
    first_k_dense_replace: int = 1  # how many of them, from the first, are dense
    num_nextn_predict_layers: int = 1  # multi-token-prediction modules; 0: none
    num_attention_heads: int = 4  # heads of MLA
    q_lora_rank: int | None = 64  # rank of the compressed queries; null: queries are not compressed
    kv_lora_rank: int = 64  # rank of the latent that keys and values come from, and that a cache keeps
    qk_nope_head_dim: int = 32  # per head: dimensions of queries and keys without rotation
    qk_rope_head_dim: int = 16  # per head: rotated dimensions; one key for all heads
    v_head_dim: int = 32  # per head: dimensions of values
    n_routed_experts: int = 16  # experts of an MoE layer that the router chooses from
    n_shared_experts: int = 1  # experts that every token goes through, as one of that many times the width
    num_experts_per_tok: int = 4  # routed experts of a token
    n_group: int = 4  # groups of experts for group-limited routing
    topk_group: int = 2  # groups that a token may use
    norm_topk_prob: bool = True  # weights of a token's experts add up to 1 before scaling
    routed_scaling_factor: float = 2.5  # times the weights of a token's experts
    rms_norm_eps: float = 1e-6  # added to the mean square
    initializer_range: float = 0.02  # standard deviation of initial weights
    max_position_embeddings: int = 4096  # the longest sequence, in tokens
    rope_interleave: bool = True  # rotated pairs are neighbours (2i, 2i + 1), not halves
    rope_parameters: RopeConfig = field(default_factory=RopeConfig)
    tie_word_embeddings: bool = False  # the head is the transposed embedding
    attention_bias: bool = False  # biases in the attention's down-projections and output

    def __post_init__(self) -> None:
        in_range(
            "model", self, num_hidden_layers=_MOST_LAYERS, n_routed_experts=_MOST_EXPERTS, num_nextn_predict_layers=_MOST_MTP
        )
        positive(
            "model", self, "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size",
            "num_hidden_layers", "num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim",
            "v_head_dim", "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group",
            "max_position_embeddings", "rms_norm_eps", "initializer_range", "routed_scaling_factor",
        )  # fmt: skip
        not_negative("model", self, "num_nextn_predict_layers", "first_k_dense_replace")
        if self.q_lora_rank is not None:
            positive("model", self, "q_lora_rank")
        experts, groups = self.n_routed_experts, self.n_group
        require(
            self.qk_rope_head_dim % 2 == 0,
            f"model.qk_rope_head_dim={self.qk_rope_head_dim} must be even: RoPE rotates pairs",
        )
        require(
            experts % groups == 0,
            f"model.n_group={groups} does not divide model.n_routed_experts={experts}; use one of {choices(experts)}",
        )
        require(
            experts // groups >= 2,
            f"model.n_group={groups} leaves {experts // groups} expert a group; a group's score is the sum of its "
            f"best 2, so use at most {experts // 2} groups",
        )
        require(
            self.topk_group <= groups,
            f"model.topk_group={self.topk_group} exceeds model.n_group={groups}; use 1 to {groups}",
        )
        reachable = experts // groups * self.topk_group
        require(
            self.num_experts_per_tok <= reachable,
            f"model.num_experts_per_tok={self.num_experts_per_tok} exceeds the {reachable} experts that "
            f"model.topk_group={self.topk_group} groups hold; use 1 to {reachable}",
        )

    @property
    def num_dense_layers(self) -> int:
        return min(self.first_k_dense_replace, self.num_hidden_layers)

    @property
    def num_moe_layers(self) -> int:
        return self.num_hidden_layers - self.num_dense_layers

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it is cut. `path=None` is the source text of Python's standard library."""

    __pydantic_config__ = _STRICT
    path: str | None = None  # a file, folder or glob of .txt, .jsonl or .parquet, also as .gz or .zst; several with commas
    text_field: str = "text"  # the field of .jsonl and the column of .parquet; a.b: the field b in a
    tokenizer: str | None = None  # a tokenizer.json; None trains a byte-level BPE of model.vocab_size once
    seq_len: int = 256  # tokens of a sequence
    batch_size: int = 16  # global, in sequences
    validation_fraction: float = 0.05  # of documents, chosen by hash; of a single document, its end
    validation_path: str | None = None  # held-out documents of their own, as path: then all of path is trained on
    special_tokens: bool = False  # names of control tokens in a text become those tokens; false: they are text
    allow_changed: bool = False  # for this start: go on although the corpus is not the one that the run was trained on
    cache_dir: str | None = None  # None: $XDG_CACHE_HOME/dsv3_jax or ~/.cache/dsv3_jax

    def __post_init__(self) -> None:
        in_range("data", self)
        positive("data", self, "seq_len", "batch_size")
        require(
            0 < self.validation_fraction < 1,
            f"data.validation_fraction={self.validation_fraction} must lie between 0 and 1, both excluded",
        )


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule (report, section 4.2), in absolute steps, so that a run can be extended."""

    __pydantic_config__ = _STRICT
    name: Literal["adamw"] = "adamw"  # one of optim/registry.py
    lr: float = 2e-3  # the learning rate after warm-up
    lr_final: float = 2e-4  # after the decay
    warmup_steps: int = 20  # linear from 0 to lr over these
    decay_start: int = 300  # constant until here
    decay_steps: int = 300  # cosine from lr to lr_final over these
    beta1: float = 0.9  # decay of the first moment
    beta2: float = 0.95  # decay of the second moment
    eps: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 0.1  # on matrices only
    clip_norm: float = 1.0  # the largest global norm of gradients
    moment_dtype: Literal["recipe", "float32", "bfloat16"] = "recipe"  # recipe: what precision.recipe stores them in
    ema_decay: float = 0.0  # 0: no moving average of the parameters

    def __post_init__(self) -> None:
        in_range("optim", self, unlimited=("clip_norm",))
        positive("optim", self, "lr", "decay_steps", "eps", "clip_norm")
        not_negative("optim", self, "lr_final", "warmup_steps", "weight_decay")
        require(
            self.lr_final <= self.lr,
            f"optim.lr_final={self.lr_final} exceeds optim.lr={self.lr}, from which the rate decays to it; use at most that",
        )
        require(
            self.decay_start >= self.warmup_steps,
            f"optim.decay_start={self.decay_start} lies before the end of the warm-up at "
            f"optim.warmup_steps={self.warmup_steps}",
        )
        for name in ("beta1", "beta2", "ema_decay"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optim.{name}={value} must lie in [0, 1)")


@dataclass(frozen=True)
class TrainConfig:
    """Length, cadence and the loss terms of the report (sections 2.1.2, 2.2 and 4.2)."""

    __pydantic_config__ = _STRICT
    steps: int = 600  # length of the run
    init_from: str | None = None  # a run or checkpoint whose weights a new run begins with, such as an imported one
    seed: int = 0  # of initial weights and the order of documents
    grad_accum_steps: int = 1  # microbatches of a step, also a pipeline's
    eval_every: int = 100  # steps between evaluations on held-out documents; the last step is evaluated too
    eval_batches: int = 8  # batches of an evaluation during training
    mtp_loss_weight: float = 0.3  # lambda of the multi-token-prediction loss (equation 25), until mtp_switch_step
    mtp_loss_weight_final: float = 0.1  # and from there on
    mtp_switch_step: int = 400  # from mtp_loss_weight to mtp_loss_weight_final
    bias_update_speed: float = 0.001  # gamma of the auxiliary-loss-free balancing
    sequence_balance_alpha: float = 1e-4  # weight of the sequence-wise balance loss
    # seconds without the end of a step (or 10 median steps, if longer) after which a process of several ends itself
    stuck_after_s: float = 300.0
    # the same while it compiles, restores, evaluates or waits for a save (training/watchdog.py)
    slow_after_s: float = 3600.0

    def __post_init__(self) -> None:
        in_range("train", self, unlimited=("stuck_after_s", "slow_after_s"), seed=LARGEST_SEED)
        positive("train", self, "steps", "grad_accum_steps", "eval_every", "eval_batches", "stuck_after_s", "slow_after_s")
        not_negative(
            "train", self, "seed", "mtp_loss_weight", "mtp_loss_weight_final", "mtp_switch_step",
            "bias_update_speed", "sequence_balance_alpha",
        )  # fmt: skip


@dataclass(frozen=True)
class DistillConfig:
    """Learning from another model's predictions (arXiv 1503.02531), such as a pruned model's from those of the original.

    The loss is KL(teacher || model), and `loss_weight` times the cross-entropy; in both, MTP modules count with their weight in
    the plain loss, each beside the teacher's module. The teacher has the same tokenizer and as many modules.
    """

    __pydantic_config__ = _STRICT
    teacher: str | None = None  # a run or checkpoint; null: no distillation
    loss_weight: float = 0.0  # of the cross-entropy, beside the divergence from the teacher
    temperature: float = 1.0  # that both models' logits are divided by; the divergence is multiplied by its square

    def __post_init__(self) -> None:
        in_range("distill", self)
        positive("distill", self, "temperature")
        not_negative("distill", self, "loss_weight")


@dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the mesh axes, from slow to fast links; one of them may be -1: all devices that are left."""

    __pydantic_config__ = _STRICT
    data: int = 1  # replicas; only gradients cross it
    pipe: int = 1  # pipeline stages
    fsdp: int = 1  # shards of parameters, gradients and moments (ZeRO-3); a layer is gathered while it runs
    expert: int = 1  # shards of the routed experts; tokens travel to them
    tensor: int = 1  # shards of heads, feed-forward and vocabulary; the sequence between blocks

    pipe_schedule: Literal["gpipe", "1f1b"] = "1f1b"  # see parallel/schedule.py; microbatches: train.grad_accum_steps
    pipe_chunks: int = 1  # pieces of the model a stage holds (interleaving); more shorten the pipeline's filling
    # how tokens reach experts (parallel/experts.py): `flat`, in one exchange; `two_level`, across nodes and then inside
    expert_transport: Literal["auto", "flat", "two_level"] = "auto"
    expert_ranks_per_node: int | None = None  # None: as many neighbours along `expert` as share a host
    expert_parts: int = 1  # pieces of a device's tokens: one travels while another is computed
    # bits of gradients between the replicas of `data`, with error feedback (exchange/exchange.py); 0: float32, as they are;
    # auto: 2, where that is expected to pay (cost/compression.py)
    compress: Literal[0, 1, 2, 4, 8, "auto"] = 0
    compress_after: int = 200  # steps as they are: few bits need the second moments that these leave
    max_state_gib: float | None = None  # GiB of weights and moments per device, at most, on any mesh that a run shrinks to

    def __post_init__(self) -> None:
        in_range("parallel", self, unlimited=("max_state_gib",))
        axes = ("data", "pipe", "fsdp", "expert", "tensor")
        for axis in axes:
            size = getattr(self, axis)
            require(size >= 1 or size == -1, f"parallel.{axis}={size}: use 1 or more devices, or -1 for all that are left")
        filled = [axis for axis in axes if getattr(self, axis) == -1]
        require(len(filled) <= 1, f"parallel.{' and parallel.'.join(filled)} are all -1; only one axis can be filled up")
        positive("parallel", self, "pipe_chunks", "expert_parts")
        not_negative("parallel", self, "compress_after")
        for name in ("expert_ranks_per_node", "max_state_gib"):
            if getattr(self, name) is not None:
                positive("parallel", self, name)


RecipeName = Literal["float32", "bf16", "deepseek", "article", "int8", "fp8_per_tensor"]


@dataclass(frozen=True)
class PrecisionConfig:
    """`float32`: everything. `bf16`: matmuls and activations in bfloat16, master weights and router in float32.

    `deepseek`, `article`, `int8`, `fp8_per_tensor`: as bf16, with products in 8 bits (see precision/recipes.py). `auto`: what
    pays on the platform where the run starts (`dsv3 platforms`).
    The first `first_steps` steps are in `first_recipe`; nothing of the state depends on it. With `controller` a layer's
    products leave 8 bits when their numbers stop fitting, and return after `cooldown_steps` calm steps (see
    precision/controller.py).
    """

    __pydantic_config__ = _STRICT
    recipe: Literal[RecipeName, "auto"] = "float32"  # see above
    first_recipe: RecipeName = "bf16"  # the recipe of the first steps
    first_steps: int = 0  # how many steps are in first_recipe
    controller: bool = False  # layers leave 8 bits when their numbers stop fitting
    cooldown_steps: int = 50  # calm steps until a layer returns to 8 bits

    def __post_init__(self) -> None:
        in_range("precision", self)
        not_negative("precision", self, "first_steps")
        positive("precision", self, "cooldown_steps")
        require(
            not self.controller or self.recipe not in ("float32", "bf16"),
            f"precision.controller=true has nothing to control in precision.recipe={self.recipe!r}; use deepseek, article, "
            f"int8 or fp8_per_tensor",
        )


@dataclass(frozen=True)
class RematConfig:
    """What the backward pass recomputes.

    `none`: nothing. `selective`: norms, rotations, MLA up-projections and SwiGLU (report, section 3.2.3), keeping the
    large products. `offload`: as selective, keeping them in the host's memory. `full`: each layer from its input. `sqrt`:
    as full, and the inputs of only every sqrt(layers)-th layer are kept, at the price of one more forward pass.
    """

    __pydantic_config__ = _STRICT
    policy: Literal["none", "selective", "offload", "full", "sqrt"] = "selective"  # see above


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save: whichever comes first. The last step is always saved.

    Kept are the latest, beside them those of every `keep_every`-th step, and the `keep_best` that had the lowest held-out loss
    (that of the last evaluation before them). `local_dir` is a place on each host, in memory (`/dev/shm/dsv3`) or on its own
    disk (`$SLURM_TMPDIR`: variables are filled in), for a copy of its devices' part of the latest, from which a start after a
    failure reads what it can; a run that comes to its end removes it.
    """

    __pydantic_config__ = _STRICT
    every_minutes: float = 10.0  # time between checkpoints
    every_steps: int | None = None  # steps between checkpoints; null: by time only
    keep: int = 3  # how many of the latest are kept
    keep_every: int | None = None  # also keep those of every so many steps
    keep_best: int = 0  # also keep so many with the lowest held-out loss
    local_dir: str | None = None  # a directory on each host for copies; null: none

    def __post_init__(self) -> None:
        in_range("checkpoint", self, unlimited=("every_minutes",))
        positive("checkpoint", self, "every_minutes", "keep")
        not_negative("checkpoint", self, "keep_best")
        for name in ("every_steps", "keep_every"):
            if getattr(self, name) is not None:
                positive("checkpoint", self, name)


@dataclass(frozen=True)
class Config:
    __pydantic_config__ = _STRICT
    name: str = "run"  # the run's folder under runs/
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    remat: RematConfig = field(default_factory=RematConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        require(
            re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name) is not None,
            f"name={self.name!r} names the run's folder; use letters, digits, '.', '_' and '-'",
        )
        require(
            self.data.seq_len <= self.model.max_position_embeddings,
            f"data.seq_len={self.data.seq_len} exceeds model.max_position_embeddings={self.model.max_position_embeddings}",
        )
        require(
            self.distill.teacher is None or self.parallel.pipe == 1,
            f"parallel.pipe={self.parallel.pipe}: a pipeline's stages do not hold distill.teacher={self.distill.teacher}; use "
            f"parallel.pipe=1 and other axes",
        )
        accum, batch = self.train.grad_accum_steps, self.data.batch_size
        require(
            batch % accum == 0,
            f"train.grad_accum_steps={accum} does not divide data.batch_size={batch}; use one of {choices(batch)}",
        )


def config_from_dict(raw: dict, source: str = "config") -> Config:
    """Check a nested dict against the tree. Raises `UserError` naming the key, the value and what would be valid."""
    parallel = raw.get("parallel")
    if isinstance(parallel, dict) and parallel.get("compress") is True:  # pydantic would take it for 1 bit
        raise UserError(f"{source}: parallel.compress=true: use 1, 2, 4 or 8 bits, auto, or 0 for none")
    return checked(Config, raw, source)


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML preset and apply overrides.

    Args:
        path: A YAML file, such as configs/tiny.yaml or a run's config.yaml. What it does not state has its default.
        overrides: `key=value`, e.g. `optim.lr=1e-3`; values are YAML (`1e-3`, `null`, `true`, `text`).

    Returns:
        The checked configuration.

    Raises:
        UserError: The file cannot be read, or a key or value is wrong; the message names it and what would be valid.
    """
    raw = read_sections(path)
    merge_overrides(raw, overrides, Config)
    return config_from_dict(raw, str(path))


def config_to_dict(config: Any) -> dict:
    """The tree, or a section, as nested dicts."""
    return dataclasses.asdict(config)


def config_to_yaml(config: Config) -> str:
    return yaml.safe_dump(config_to_dict(config), sort_keys=False)
