"""Which implementation runs: what a name means, what `auto` takes on which device, and what every kernel says that it costs."""

import ast
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

import pallas_kernels
from pallas_kernels import Unavailable, causal_attention, devices, grouped_swiglu, linear_cross_entropy, registry, testing
from pallas_kernels.gradient_codes.api import mean_of_codes, pack_codes
from pallas_kernels.gradient_codes.reference import Levels
from pallas_kernels.measure import normal
from pallas_kernels.quantize.api import quantize
from pallas_kernels.scaled import Gemms
from pallas_kernels.scaled_matmul.api import scaled_matmul
from pallas_kernels.swiglu_quantize.api import swiglu_backward, swiglu_quantize
from tests.conftest import ROOT

H100 = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3", compute_capability="9.0")
A100 = SimpleNamespace(platform="gpu", device_kind="NVIDIA A100-SXM4-80GB", compute_capability="8.0")
B200 = SimpleNamespace(platform="gpu", device_kind="NVIDIA B200", compute_capability="10.0")
CPU = SimpleNamespace(platform="cpu", device_kind="cpu")


def lowered(operation: str, platform: str) -> str:
    """The operation's program with `auto`, lowered for a platform."""
    case = next(iter(testing.SUITES[operation].cases.values()))
    arrays, fill = registry.split_arrays(case.arguments())
    program = jax.jit(lambda *arrays: registry.run(operation, "auto", fill(arrays)))
    return program.trace(*arrays).lower(lowering_platforms=(platform,)).as_text()


def has_hopper_kernel(operation: str) -> bool:
    """Whether the traced program of `auto` has a branch for CUDA."""
    case = next(iter(testing.SUITES[operation].cases.values()))
    arrays, fill = registry.split_arrays(case.arguments())
    branches = []

    def recorded(*arrays, default, **platforms):
        branches.extend(platforms)
        return default(*arrays)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.lax, "platform_dependent", recorded)
        jax.eval_shape(lambda *arrays: registry.run(operation, "auto", fill(arrays)), *arrays)
    return "cuda" in branches


@pytest.mark.parametrize("operation", registry.OPERATIONS)
def test_auto_takes_the_kernel_of_the_platform_that_has_one(operation, monkeypatch):
    in_registry = registry.implementations(operation)
    assert ("tpu_custom_call" in lowered(operation, "tpu")) == ("tpu" in in_registry)
    assert "tpu_custom_call" not in lowered(operation, "cpu")
    for device, is_hopper in ((H100, True), (A100, False), (B200, False), (CPU, False)):
        monkeypatch.setattr(devices, "target", lambda device=device: device)
        assert has_hopper_kernel(operation) == (is_hopper and "hopper" in in_registry), device.device_kind


@pytest.mark.parametrize(("device", "found"), [(H100, True), (A100, False), (B200, False), (CPU, False)])
def test_a_gpu_is_asked_for_its_compute_capability(device, found, monkeypatch):
    assert devices.is_hopper(device) == found
    nameless = SimpleNamespace(platform=device.platform, device_kind=device.device_kind)  # as a mesh's abstract device
    assert devices.is_hopper(nameless) == found
    monkeypatch.setattr(devices, "target", lambda: device)
    if device in (A100, B200):
        with pytest.raises(Unavailable, match=rf"compute capability 9.x, not {device.device_kind}; use xla"):
            quantize(jnp.ones((4, 128)), 1, implementation="hopper")


def test_the_mesh_in_context_says_which_device():
    mesh = jax.sharding.AbstractMesh(
        (1,), ("x",), abstract_device=jax.sharding.AbstractDevice(B200.device_kind, num_cores=None, platform="gpu")
    )
    with jax.sharding.use_abstract_mesh(mesh):
        assert devices.target().device_kind == B200.device_kind
    assert devices.target() == jax.devices()[0]


def test_auto_falls_back_and_a_name_does_not():
    """A shape that no kernel takes."""
    gate_up = normal(0, 8, 2 * 40)
    for name in ("tpu", "hopper"):
        with pytest.raises(Unavailable, match="multiple of 128 columns"):
            swiglu_quantize(gate_up, implementation=name)
        with pytest.raises(Unavailable, match="multiple of 128 columns"):
            swiglu_backward(swiglu_quantize(gate_up)[1], gate_up[:, :40], jnp.ones(8), name)
    program = jax.jit(swiglu_quantize).trace(gate_up).lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" not in program
    with pytest.raises(Unavailable, match="up to 8192"):
        jax.eval_shape(lambda x: swiglu_quantize(x, implementation="tpu"), jax.ShapeDtypeStruct((8, 2 * 8320), jnp.bfloat16))


def test_what_kernels_do_not_take():
    a = quantize(jnp.ones((4, 128)), 1, "int8")
    with pytest.raises(NotImplementedError, match="int8"):
        scaled_matmul(a, a, implementation="hopper")
    q, levels = jnp.ones((1, 4, 1, 8)), Levels((-1.0, 1.0), of_rms=True)
    with pytest.raises(NotImplementedError, match="bfloat16, not float32"):
        causal_attention(q, q, q, jnp.zeros((1, 4), jnp.int32), 0.2, "hopper")
    with pytest.raises(NotImplementedError, match="bfloat16, not float32"):
        linear_cross_entropy(jnp.ones((2, 8)), jnp.ones((8, 4)), jnp.zeros(2, jnp.int32), jnp.ones(2), "hopper")
    for name in ("tpu", "hopper"):
        with pytest.raises(Unavailable, match="blocks of 256 numbers, not 64"):
            pack_codes(*[jnp.ones((2, 64))] * 3, levels, name)
    with pytest.raises(Unavailable, match="at most 32 replicas, not 33"):
        mean_of_codes(jnp.zeros((33, 1, 32), jnp.uint8), jnp.ones((33, 1)), levels, "tpu")


def test_a_plug_in_replaces_the_experts_in_16_bits(monkeypatch):
    monkeypatch.setattr(registry, "_IMPLEMENTATIONS", {name: dict(of) for name, of in registry._IMPLEMENTATIONS.items()})
    x, w_gate_up, w_down = jnp.ones((4, 8)), jnp.ones((2, 8, 2, 3)), jnp.ones((2, 3, 8))
    arguments = x, w_gate_up, w_down, jnp.zeros((4, 1), jnp.int32), jnp.ones((4, 1))
    pallas_kernels.register("grouped_swiglu", "mychip", lambda x, *others: 7 * x)
    assert (grouped_swiglu(*arguments, implementation="mychip") == 7).all()
    with pytest.raises(ValueError, match=r"gemms\.implementation"):
        grouped_swiglu(*arguments, Gemms(), implementation="mychip")


def test_names_that_mean_nothing():
    with pytest.raises(ValueError, match="'auto' chooses"):
        pallas_kernels.register("quantize", "auto", print)
    with pytest.raises(ValueError, match="named kernel, not with auto"):
        quantize(jnp.ones((4, 128)), 1, interpret=True)


def calls_of_kernels() -> list[tuple[str, ast.Call]]:
    found = []
    for path in sorted((ROOT / "pallas_kernels").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("pl.pallas_call", "plgpu.kernel"):
                found.append((f"{path.relative_to(ROOT)}:{node.lineno}", node))
    return found


def test_every_kernel_states_what_it_costs():
    calls = calls_of_kernels()
    assert len(calls) >= 16
    for where, call in calls:
        assert "cost_estimate" in {keyword.arg for keyword in call.keywords}, where


def test_costs_are_what_a_hand_counts():
    """quantize of [256, 512] in bfloat16: 5 operations a number; 2 bytes read and 1 written of each, and 4 x 256 scales of 4.

    Codes of 2 bits of 64 blocks of 256: three float32 numbers read and one written, 64 bytes of codes and a scale of 4 a block.
    """

    def estimate(function, *shapes):
        jaxpr = jax.make_jaxpr(function)(*shapes)
        return next(equation.params["cost_estimate"] for equation in jaxpr.eqns if "cost_estimate" in equation.params)

    x = jax.ShapeDtypeStruct((256, 512), jnp.bfloat16)
    found = estimate(lambda x: quantize(x, 1, implementation="tpu"), x)
    assert found == pl.CostEstimate(flops=655_360, transcendentals=0, bytes_accessed=262_144 + 131_072 + 4_096)
    blocks = [jax.ShapeDtypeStruct((64, 256), jnp.float32)] * 3
    table = Levels((-1.5, -0.5, 0.5, 1.5), of_rms=True)
    found = estimate(lambda *a: pack_codes(*a, table, "tpu"), *blocks)
    assert found.bytes_accessed == 4 * 4 * 64 * 256 + 64 * (64 + 4)
    # y [512, 128] over K = 256: 2 x 512 x 128 x 256, and 3 for each of 2 partial sums; a is read once and b once
    a, b = (quantize(jnp.ones((rows, 256)), 1) for rows in (512, 128))
    found = estimate(lambda a, b: scaled_matmul(a, b, implementation="tpu"), a, b)
    assert found.flops == 33_554_432 + 3 * 2 * 65_536
    assert found.bytes_accessed == (512 + 128) * 256 + 2 * 4 * (512 + 128) + 4 * 512 * 128
