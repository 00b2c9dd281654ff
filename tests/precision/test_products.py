"""A product of float32 numbers is one on every device: in what is lowered, in kernels, and in the programs for TPU and H100."""

import ast
import re
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from dsv3_jax.config import load_config
from dsv3_jax.model.layout import Layout
from dsv3_jax.plan.compile import compile_step
from dsv3_jax.plan.hlo import Program
from dsv3_jax.serve import generate
from dsv3_jax.serve.cache import empty_cache
from dsv3_jax.state.train_state import abstract_state, serving_graph
from dsv3_jax.training.resolve import abstract_batch
from dsv3_jax.training.step import make_eval_step, make_train_step
from pallas_kernels import products, registry
from pallas_kernels.measure import normal, with_gradients
from tests.aot import compilers_environ, set_up_aot_environment
from tests.conftest import ROOT
from tests.parallel.cases import config_of

SMALL = ["train.grad_accum_steps=1", "model.num_hidden_layers=2", "remat.policy=none"]
_PRODUCT = re.compile(
    r"stablehlo\.(?:dot_general|convolution).*precision = \[(\w+), (\w+)\].*"
    r": \(tensor<(?:\w+x)*(\w+)>, tensor<(?:\w+x)*(\w+)>\)"
)


def products_in(text: str) -> Counter:
    """How many products a program's text has of operands of two dtypes and precisions. None is left out."""
    found = Counter((a, b, p, q) for p, q, a, b in _PRODUCT.findall(text))
    assert found.total() == text.count("stablehlo.dot_general") + text.count("stablehlo.convolution") > 0
    return found


def lowered(recipe: str) -> dict[str, str]:
    """The text of a training step, of one of evaluation, and of prefilling and decoding."""
    config, layout = config_of([f"precision.recipe={recipe}", *SMALL]), Layout()
    state, batch = abstract_state(config, layout), abstract_batch(config, layout)
    texts = {
        "training": make_train_step(config, layout).lower(state, batch).as_text(),
        "evaluation": make_eval_step(config, layout).lower(state.params, state.router_bias, batch).as_text(),
    }
    model = nnx.merge(serving_graph(config, layout), state.params, state.router_bias)
    graph, arrays = nnx.split(model)
    cache = jax.eval_shape(lambda: empty_cache(config.model, layout, 1, 16, model.dtype))
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    texts["decoding"] = generate._prefill.lower(graph, arrays, cache, tokens, 0, 7).as_text()
    return texts


HIGHEST, DEFAULT = ("f32", "f32", "HIGHEST", "HIGHEST"), ("bf16", "bf16", "DEFAULT", "DEFAULT")


def test_all_products_of_the_float32_recipe_are_exact():
    for name, text in lowered("float32").items():
        assert set(products_in(text)) == {HIGHEST}, name


def test_the_routers_alone_are_exact_beside_bfloat16():
    """Router products of the one MoE layer and, in training, of the MTP module: forward, and with respect to x and w."""
    found = {name: products_in(text) for name, text in lowered("bf16").items()}
    assert {name: set(counts) for name, counts in found.items()} == {name: {HIGHEST, DEFAULT} for name in found}
    assert {name: counts[HIGHEST] for name, counts in found.items()} == {"training": 6, "evaluation": 1, "decoding": 1}


def _dot_precisions(jaxpr) -> Counter:
    """Precisions of the products of float32 in a jaxpr, and in those of its kernels and loops."""
    found: Counter = Counter()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general" and all(v.aval.dtype == jnp.float32 for v in eqn.invars):
            found[eqn.params["precision"]] += 1
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += _dot_precisions(inner)
    return found


def _attention(implementation):
    q, k, v = (normal(i, 1, 128, 2, 128) for i in range(3))
    segment = jnp.zeros((1, 128), jnp.int32)
    return lambda *qkv: registry.run("causal_attention", implementation, (*qkv, segment, 0.1)), (q, k, v)


def _experts(implementation):
    choice, weight = jnp.zeros((128, 1), jnp.int32), jnp.ones((128, 1))
    arrays = normal(0, 128, 128), normal(1, 2, 128, 2, 128), normal(2, 2, 128, 128)
    return lambda *xw: registry.run("grouped_swiglu", implementation, (*xw, choice, weight)), arrays


def _head(implementation):
    arrays = normal(0, 128, 128), normal(1, 128, 256)
    return lambda x, w: registry.run("logit_statistics", implementation, (x, w, jnp.zeros(128, int), True)).at_target_T, arrays


@pytest.mark.parametrize(
    ("case", "implementation", "gradients"),
    [(_attention, "tpu", True), (_experts, "tpu", True), (_head, "tpu", False)]
    + [(case, name, True) for case in (_attention, _experts, _head) for name in ("reference", "xla")],
)
def test_kernels_multiply_float32_exactly(case, implementation, gradients):
    """Also those of JAX, splash attention and megablox, which take no precision; forward and backward."""
    run, arrays = case(implementation)

    def both(*arrays):
        return with_gradients(run, arrays, dict(enumerate("abc"[: len(arrays)]))) if gradients else run(*arrays)

    highest = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)
    forward = _dot_precisions(jax.make_jaxpr(run)(*arrays).jaxpr)
    assert set(forward) == {highest}
    if gradients:
        found = _dot_precisions(jax.make_jaxpr(both)(*arrays).jaxpr)
        assert set(found) == {highest}
        assert found[highest] > forward[highest]


def test_a_product_is_as_precise_as_its_operands():
    f32, bf16, int8 = (jnp.zeros((2, 2), dtype) for dtype in ("float32", "bfloat16", "int8"))
    assert products.precision_of(f32, f32) == products.precision_of(f32, bf16) == jax.lax.Precision.HIGHEST
    assert products.precision_of(bf16, bf16) is products.precision_of(int8, int8) is None


_MULTIPLY = {"dot", "vdot", "inner", "matmul", "einsum", "tensordot", "dot_general", "ragged_dot", "ragged_dot_general"}


def _multiplies(node: ast.AST) -> bool:
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.MatMult)
    called = node.func if isinstance(node, ast.Call) else None
    return isinstance(called, ast.Attribute) and (called.attr in _MULTIPLY or called.attr.startswith("conv_"))


def test_no_product_leaves_its_precision_to_the_device():
    """Functions of JAX's that multiply matrices are called in one file; cases.py has expected results, by NumPy."""
    for package in ("dsv3_jax", "pallas_kernels"):
        for path in (ROOT / package).rglob("*.py"):
            if path.name not in ("products.py", "cases.py"):
                lines = [node.lineno for node in ast.walk(ast.parse(path.read_text())) if _multiplies(node)]  # type: ignore
                assert not lines, f"{path}: lines {lines} multiply by themselves; use pallas_kernels.products"


def _compiled_products(program: Program) -> Counter:
    """(dtype of the operands, precision) of every product that XLA compiled."""
    found: Counter = Counter()
    for computation in program.computations.values():
        for i in computation:
            if i.opcode in ("dot", "convolution"):
                dtypes = {computation.instructions[name].arrays[0].dtype for name in i.operands[:2]}
                precision = re.search(r"operand_precision=\{(\w+),(\w+)\}", i.attributes)
                found["/".join(sorted(dtypes)), precision.groups() if precision else None] += 1
    return found


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "h100:1x2"])
def test_compiled_products_for_tpu_and_h100(topology, tmp_path, monkeypatch):
    set_up_aot_environment()
    monkeypatch.setenv("DSV3_PLAN_PYTHON", str(ROOT / ".venv-aot" / "bin" / "python"))
    for name in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR"):
        if name not in compilers_environ():
            monkeypatch.delenv(name, raising=False)
    sizes = [
        "model.hidden_size=256", "model.num_hidden_layers=2", "model.num_nextn_predict_layers=0", "model.intermediate_size=512",
        "model.moe_intermediate_size=256", "model.kv_lora_rank=128", "model.qk_nope_head_dim=128", "model.v_head_dim=128",
        "data.seq_len=128", "data.batch_size=4", "parallel.fsdp=-1", "train.grad_accum_steps=1", f"data.cache_dir={tmp_path}",
    ]  # fmt: skip
    found = {}
    for recipe in ("float32", "bf16"):
        config = load_config(ROOT / "configs" / "tiny.yaml", [f"precision.recipe={recipe}", *sizes])
        found[recipe] = _compiled_products(compile_step(config, topology).program)
    exact = ("f32", ("highest", "highest"))
    assert set(found["float32"]) == {exact}
    routers = {key: count for key, count in found["bf16"].items() if key[0] == "f32"}
    assert set(routers) == {exact}
    assert routers[exact] < found["bf16"].total() / 2
