"""Every implementation of every operation through the suite that plug-ins and bench_device run too; kernels are interpreted."""

import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import registry, testing
from pallas_kernels.errors import NotBuilt
from pallas_kernels.integer_linear.build import compiler
from pallas_kernels.integer_linear.cases import EXPERTS, LINEAR
from pallas_kernels.quantize import reference
from pallas_kernels.scaled import Scaled

INTERPRET = {"tpu": True, "hopper": plgpu.InterpretGPUParams()}
REFUSED = {
    ("scaled_matmul", "hopper"): {"int8 100x130x70"},
    ("causal_attention", "hopper"): {"float32, length 256", "float32, length 300"},
    ("logit_statistics", "hopper"): {"float32 600x200x1100"},
    ("integer_linear", "cpu"): {case for case in LINEAR.cases if case.startswith("20 rows")},
    ("integer_experts", "cpu"): {case for case in EXPERTS.cases if case.startswith("40 tokens")},
    # other groups than of 64 inputs or a multiple, 2 bits, inputs that are no multiple of 128
    ("integer_linear", "tpu"): {case for case in LINEAR.cases if case.startswith(("7 rows", "3 rows", "2 rows", "20 rows"))},
    ("integer_experts", "tpu"): {case for case in EXPERTS.cases if case.startswith(("5 tokens", "2 tokens", "40 tokens"))},
}
# where plain JAX is something else than the definition, or the suite expects sums in float64
PLAIN = (
    "scaled_matmul", "grouped_scaled_matmul", "grouped_scaled_wgrad", "causal_attention", "logit_statistics", "grouped_swiglu",
    "integer_linear", "integer_experts",
)  # fmt: skip
# interpreted twice as long as any other, and the others have its length's blocks, its dtype and several sequences
TOO_LONG = ("causal_attention", "hopper", "bfloat16, length 256")
CASES = [
    (operation, implementation, case)
    for operation, suite in testing.SUITES.items()
    for implementation in ("xla", "cpu", "tpu", "hopper")
    if implementation in registry.implementations(operation) and (implementation != "xla" or operation in PLAIN)
    for case in suite.cases
    if (operation, implementation, case) != TOO_LONG
]


def has_compiler() -> bool:
    try:
        return bool(compiler())
    except NotBuilt:
        return False


@pytest.mark.parametrize(("operation", "implementation", "case"), CASES, ids=lambda part: part.replace(" ", "-"))
def test_implementations_equal_the_definition(operation, implementation, case):
    if implementation == "cpu" and not has_compiler():
        pytest.skip("no C++ compiler here")
    if case in REFUSED.get((operation, implementation), ()):
        with pytest.raises(AssertionError, match="takes none of the cases"):
            testing.check(operation, implementation, INTERPRET.get(implementation), [case])
    else:
        assert testing.check(operation, implementation, INTERPRET.get(implementation), [case]) == []


def test_every_operation_has_a_suite():
    assert set(testing.SUITES) == set(registry.OPERATIONS)
    for operation in registry.OPERATIONS:
        assert {"reference", "xla", "tpu"} <= set(registry.implementations(operation)), operation


def test_a_wrong_implementation_fails(monkeypatch):
    """Scales that belong to other tiles; a value that is off by its last bit; a row too few."""
    monkeypatch.setattr(registry, "_IMPLEMENTATIONS", {name: dict(of) for name, of in registry._IMPLEMENTATIONS.items()})
    right = registry._IMPLEMENTATIONS["scaled_matmul"]["xla"]
    wrong = {
        "scales": lambda a, b, dtype: right(Scaled(a.values, jnp.roll(a.scales, 1, axis=1) * 1.5), b, dtype),
        "row": lambda a, b, dtype: right(a, b, dtype)[1:],
        "dtype": lambda a, b, dtype: right(a, b, dtype).astype(jnp.float16),
    }
    for name, function in wrong.items():
        registry.register("scaled_matmul", name, function)
        with pytest.raises(AssertionError):
            testing.check("scaled_matmul", name, only=["e4m3 100x130x70, scales of 1 rows, float32"])

    def off_by_a_bit(*arguments):
        found = reference.quantize(*arguments)
        return found._replace(scales=found.scales * (1 + 2.0**-23))

    registry.register("quantize", "off", off_by_a_bit)
    with pytest.raises(AssertionError, match=r"quantize by off, case 'e4m3 1x128 100x130': scales differs in \d+ of"):
        testing.check("quantize", "off", only=["e4m3 1x128 100x130"])
    with pytest.raises(ValueError, match="quantize has no case e9m9; use some of e4m3 1x128 256x512"):
        testing.check("quantize", "off", only=["e9m9"])
