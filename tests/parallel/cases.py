"""What the tests of sharding share: an odd-sized model, meshes, and one device's results to compare with."""

import functools
from dataclasses import replace
from typing import NamedTuple

import jax
import numpy as np

from dsv3_jax.config import Config, load_config
from dsv3_jax.data.batch import Batch
from dsv3_jax.model.layout import Layout
from dsv3_jax.parallel.layout import layout_for
from dsv3_jax.state.train_state import TrainState, abstract_state, new_state
from dsv3_jax.training.step import apply_gradients, gradients, training_recipe
from tests.conftest import ROOT

# Latents and head sizes are odd; 5 MoE layers don't divide into stages; group-limited routing and the balance loss are on, and
# so is MTP, unless a test leaves it out: with it, a step takes half as long again to compile.
MODEL = [
    "model.vocab_size=72", "model.hidden_size=40", "model.intermediate_size=56", "model.moe_intermediate_size=24",
    "model.num_hidden_layers=6", "model.num_attention_heads=4", "model.q_lora_rank=10", "model.kv_lora_rank=6",
    "model.qk_nope_head_dim=6", "model.qk_rope_head_dim=4", "model.v_head_dim=5", "model.n_routed_experts=8",
    "model.num_experts_per_tok=3", "model.initializer_range=0.2", "data.seq_len=20", "data.batch_size=16",
    "train.sequence_balance_alpha=0.01", "train.grad_accum_steps=2", "optim.warmup_steps=4", "optim.lr=1e-3",
    "optim.eps=1e-5",  # Adam divides a gradient that is all rounding by itself; a larger eps keeps such weights where they are
]  # fmt: skip

MESHES = {
    name: [f"parallel.{part}" for part in name.split()]
    for name in (
        "data=8",
        "pipe=2",
        "pipe=4 pipe_schedule=gpipe",
        "fsdp=8",
        "expert=8",
        "tensor=4",
        "data=2 fsdp=4",
        "data=4 expert=2",
        "fsdp=2 expert=4",
        "fsdp=4 tensor=2",
        "expert=4 tensor=2",
        "pipe=2 tensor=2",
        "pipe=2 fsdp=4",
        "data=2 pipe=2 expert=2",
        "fsdp=2 expert=2 tensor=2",
        "pipe=2 expert=2 tensor=2",
        "data=2 pipe=2 fsdp=2 pipe_chunks=2",
        "expert=8 expert_transport=two_level expert_ranks_per_node=2",
    )
}

# The meshes whose training is compared with one device's. Together they have every pair of axes but data and tensor, which
# distillation compares (tests/cluster has fsdp=8 and expert=8, over two processes), and every schedule and transport.
TRAINED = {
    "fsdp=2 expert=2 tensor=2": "fast", "data=2 pipe=2 fsdp=2 pipe_chunks=2": "fast", "pipe=2 expert=2 tensor=2": "slow",
    "tensor=4": "slow", "data=4 expert=2": "slow", "pipe=4 pipe_schedule=gpipe": "slow",
    "expert=8 expert_transport=two_level expert_ranks_per_node=2": "slow",
}  # fmt: skip
WITHOUT_MTP = "model.num_nextn_predict_layers=0"
# of these with MTP: with and without a pipeline
WITH_MTP = {"fsdp=2 expert=2 tensor=2", "data=2 pipe=2 fsdp=2 pipe_chunks=2"}


def overrides_of(mesh: str) -> list[str]:
    return MESHES[mesh] if mesh in WITH_MTP else [*MESHES[mesh], WITHOUT_MTP]


def config_of(overrides: list[str]) -> Config:
    return load_config(ROOT / "configs" / "tiny.yaml", [*MODEL, *overrides])


def batch_of(config: Config, seed: int) -> Batch:
    """Random tokens, with document boundaries anywhere and some padding."""
    random = np.random.default_rng(seed)
    shape = (config.data.batch_size, config.data.seq_len + 1 + config.model.num_nextn_predict_layers)
    segments = np.sort(random.integers(0, 3, shape).astype(np.int32), axis=1)
    segments[0, -6:] = -1
    return Batch(random.integers(0, config.model.vocab_size, shape).astype(np.int32), segments)


def make_hot(state: TrainState) -> TrainState:
    """All tokens of every layer to the first experts, which live on one device."""
    bias = jax.tree.map(lambda b: b.at[..., :3].add(10.0), state.router_bias)
    return replace(state, router_bias=bias)


def step_of(config: Config):
    """(layout, jitted (state, batch) -> (state, gradients, metrics)): a training step that shows its gradients."""
    layout = layout_for(config)
    recipe = training_recipe(config, layout)

    def step(state, batch):
        grads, metrics, _ = gradients(config, layout, state, batch, recipe)
        return apply_gradients(config, state, grads, metrics, recipe)[0], grads, metrics

    return layout, jax.jit(step)


@functools.cache
def initial_state(mtp_layers: int = 1) -> TrainState:
    """On one device; the same for all meshes, and made once, because compiling it takes longer than a test's steps."""
    return new_state(config_of([f"model.num_nextn_predict_layers={mtp_layers}"]))


def state_on(config: Config, layout: Layout) -> TrainState:
    abstract = abstract_state(config, layout)
    zero = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), abstract.residuals)
    shardings = jax.tree.map(lambda a: a.sharding, abstract)
    state = initial_state(config.model.num_nextn_predict_layers)
    return jax.device_put(replace(state, residuals=zero), shardings)


class Trained(NamedTuple):
    first: list  # gradients and metrics of the first step
    losses: list[float]


def results(overrides: list[str]) -> tuple[Trained, Trained]:
    """On the mesh that the overrides give: 8 steps, half of them after the warm-up, and one with hot experts."""
    config = config_of(overrides)
    layout, step = step_of(config)

    def train(state: TrainState, steps: int) -> Trained:
        first, losses = [], []
        for i in range(steps):
            state, *out = step(state, batch_of(config, i))
            losses.append(float(out[1].loss))
            first = first or jax.device_get(out)
        return Trained(first, losses)

    return train(state_on(config, layout), 8), train(make_hot(state_on(config, layout)), 1)


@functools.cache
def one_device(mtp: bool) -> tuple[Trained, Trained]:
    return results([] if mtp else [WITHOUT_MTP])


def assert_same_gradients(ours, theirs, rtol: float) -> None:
    """Each tensor's largest difference against its largest value."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(theirs), jax.tree.leaves(ours), strict=True):
        error = np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(a).max()
        assert error <= rtol, f"{jax.tree_util.keystr(path, simple=True)}: {error:.2e}"
