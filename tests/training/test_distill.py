"""Distillation: gradients of the divergence from a teacher, on meshes too, and whole runs that learn from a checkpoint."""

import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.checkpoint.storage import read_metadata
from dsv3_jax.config import load_config
from dsv3_jax.errors import UserError
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.parallel.layout import layout_for
from dsv3_jax.precision.recipes import RECIPES
from dsv3_jax.state.train_state import abstract_state, new_state
from dsv3_jax.training.loop import train
from dsv3_jax.training.step import gradients
from dsv3_jax.training.teacher import Teacher
from tests.conftest import ROOT
from tests.parallel.cases import assert_same_gradients
from tests.training.test_step import batch_of

TINY = ROOT / "configs" / "tiny.yaml"
DISTILL = ["distill.teacher=somewhere", "distill.temperature=2", "train.sequence_balance_alpha=0"]
SMALL = [
    "model.vocab_size=72", "model.hidden_size=32", "model.intermediate_size=32", "model.moe_intermediate_size=16",
    "model.num_hidden_layers=2", "model.num_attention_heads=2", "model.q_lora_rank=16", "model.kv_lora_rank=16",
    "model.qk_nope_head_dim=8", "model.qk_rope_head_dim=8", "model.v_head_dim=8", "model.n_routed_experts=8",
    "model.initializer_range=0.2", "data.seq_len=16", "data.batch_size=8",
]  # fmt: skip


def taught(*overrides):
    """(configuration, a jitted (student's state, teacher's weights, batch) -> gradients and metrics, its arguments)."""
    config = load_config(TINY, [*SMALL, *DISTILL, *overrides])
    layout = layout_for(config)

    def state_of(seed):
        shardings = jax.tree.map(lambda a: a.sharding, abstract_state(config, layout))
        seeded = replace(config, train=replace(config.train, seed=seed))
        return jax.device_put(new_state(replace(seeded, parallel=type(config.parallel)())), shardings)

    other = state_of(1)
    teacher = Teacher(config, (other.params, other.router_bias), {})

    def run(state, weights, batch):
        model = teacher.model(layout, RECIPES["float32"], *weights)
        return gradients(config, layout, state, batch, teacher=model)[:2]

    return config, jax.jit(run), (state_of(0), teacher.weights, batch_of(config))


def kl_by_hand(params, router_bias, config, teacher_weights, batch):
    """Equal to the objective: mean over targets of tau^2 KL, the MTP module's with its weight of 0.3."""

    def logits(params, router_bias):
        graph = nnx.split(nnx.eval_shape(lambda: Transformer(config.model, rngs=nnx.Rngs(0))))[0]
        model = nnx.merge(graph, params, router_bias)
        inputs = batch.inputs(1)
        hidden, _ = model.hidden(*inputs)
        later, _ = model.mtp_hidden(0, hidden, batch.tokens_ahead(1, 1), inputs.segments)
        return [h @ model.head_weight() for h in (hidden, later)]

    total = 0.0
    for ahead, weight, ours, theirs in zip(
        (1, 2), (1.0, 0.3), logits(params, router_bias), logits(*teacher_weights), strict=True
    ):
        log_q, log_p = jax.nn.log_softmax(ours / 2), jax.nn.log_softmax(theirs / 2)
        counts = batch.targets(ahead, 1)[1]
        kl = jnp.where(counts, (jnp.exp(log_p) * (log_p - log_q)).sum(-1), 0).sum() / counts.sum()
        total += weight * 4 * kl
    return total


@pytest.fixture(scope="module")
def on_one_device():
    config, run, arguments = taught()
    return config, run, arguments, jax.device_get(run(*arguments))


def test_gradients_are_those_of_the_divergence_alone(on_one_device):
    """Against autodiff of the divergence written out; float32 sums in another order, through two layers."""
    config, _, (state, weights, batch), (found, metrics) = on_one_device
    value, expected = jax.jit(jax.value_and_grad(kl_by_hand), static_argnums=2)(
        state.params, state.router_bias, config, weights, batch
    )
    assert float(metrics.loss) == pytest.approx(float(value), rel=1e-5)
    assert float(metrics.loss) == pytest.approx(float(metrics.divergence) + 0.3 * float(metrics.mtp_divergence), rel=1e-5)
    assert float(metrics.cross_entropy) > 3  # is measured nevertheless
    assert_same_gradients(found, jax.device_get(expected), rtol=1e-4)


def test_nothing_is_learned_from_itself(on_one_device):
    """Rounding in another order is left: 1e-5 beside a gradient of norm 1."""
    _, run, (state, _, batch), _ = on_one_device
    grads, metrics = jax.device_get(run(state, (state.params, state.router_bias), batch))
    assert float(metrics.divergence) == pytest.approx(0, abs=1e-9)
    assert max(float(np.abs(g).max()) for g in jax.tree.leaves(grads)) < 1e-5


@pytest.mark.slow
def test_the_cross_entropy_may_stand_beside_it(on_one_device):
    *_, (_, alone) = on_one_device
    _, run, arguments = taught("distill.loss_weight=2")
    _, metrics = jax.device_get(run(*arguments))
    plain = float(metrics.cross_entropy) + 0.3 * float(metrics.mtp_cross_entropy)
    assert float(metrics.loss) == pytest.approx(float(alone.loss) + 2 * plain, rel=1e-5)


@pytest.mark.slow
def test_a_mesh_gives_the_same(on_one_device):
    *_, (expected, alone) = on_one_device
    _, run, arguments = taught("parallel.data=2", "parallel.fsdp=2", "parallel.tensor=2")
    grads, metrics = jax.device_get(run(*arguments))
    assert float(metrics.loss) == pytest.approx(float(alone.loss), rel=1e-5)
    assert_same_gradients(grads, expected, rtol=1e-4)


@pytest.fixture(scope="module")
def teacher_run(micro_overrides_in, tmp_path_factory):
    """A run of two steps, and its overrides; not to be changed."""
    root = tmp_path_factory.mktemp("teacher")
    overrides = [*micro_overrides_in(root), "train.eval_every=100"]
    train(load_config(TINY, [*overrides, "name=teacher", "train.steps=2"]), root)
    return root, overrides


def student(teacher_run, *extra):
    root, overrides = teacher_run
    given = f"distill.teacher={root}/teacher", f"train.init_from={root}/teacher", "checkpoint.every_steps=2"
    return load_config(TINY, [*overrides, *given, *extra])


@pytest.mark.slow
def test_a_run_learns_from_a_checkpoint_and_goes_on(teacher_run, tmp_path):
    """What it does after a restart is bit for bit what it would have done; its checkpoints know the teacher."""
    straight = train(student(teacher_run, "name=a", "train.steps=4"), tmp_path)
    train(student(teacher_run, "name=b", "train.steps=2"), tmp_path)
    resumed = train(student(teacher_run, "name=b", "train.steps=4"), tmp_path)
    for a, b in zip(*(jax.tree.leaves(jax.device_get(r.state.params)) for r in (straight, resumed)), strict=True):
        np.testing.assert_array_equal(a, b)
    rows = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["divergence"] == pytest.approx(0, abs=1e-6)  # it began as its teacher
    known = read_metadata(tmp_path / "a" / "checkpoints" / "4")["teacher"]
    assert known["path"] == f"{teacher_run[0]}/teacher/checkpoints/2"
    # moved, it is the same teacher; another is refused, and so is none
    shutil.copytree(teacher_run[0] / "teacher", tmp_path / "moved")
    train(student(teacher_run, "name=b", "train.steps=4", f"distill.teacher={tmp_path}/moved"), tmp_path)
    with pytest.raises(UserError, match=r"distill.teacher=.*/a: until its last checkpoint the run learned from .*/teacher"):
        train(student(teacher_run, "name=b", "train.steps=5", f"distill.teacher={tmp_path}/a"), tmp_path)
    with pytest.raises(UserError, match=r"distill.teacher=null, and the run learned from .*/teacher"):
        train(student(teacher_run, "name=b", "train.steps=5", "distill.teacher=null"), tmp_path)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["distill.teacher=/nowhere"], "/nowhere does not exist"),
        (["train.init_from=null", "model.num_nextn_predict_layers=1"], "predict_layers=1, and distill.teacher=.* has 0"),
        (["train.init_from=null", "model.vocab_size=320"], "model.vocab_size=320, and distill.teacher=.* has 300"),
        (["parallel.pipe=2"], "parallel.pipe=2: a pipeline's stages do not hold distill.teacher"),
        (["distill.temperature=0"], "distill.temperature=0.* must be positive"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(teacher_run, tmp_path, extra, message):
    with pytest.raises(UserError, match=message):
        train(student(teacher_run, "name=c", *extra), tmp_path)
    assert not (tmp_path / "c" / "checkpoints").exists()
