"""FLOPs and bytes of instructions against XLA's own count for what it can count, and against sums written out."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.cost.efficiency import Efficiency
from dsv3_jax.plan.hlo import Instruction, arrays_of, parse
from dsv3_jax.plan.roofline import CostModel, Work, convolution_flops, kernel_flops


def compiled(f, *args):
    return jax.jit(f).lower(*args).compile()


def total(p) -> Work:
    cost, found = CostModel(p, "h100", Efficiency(), 1.0), Work()
    for i in p.computations[p.entry]:
        found = found + cost.work(i, p.computations[p.entry])
    return found


@settings(max_examples=20, deadline=None)
@given(b=st.integers(1, 5), m=st.integers(2, 70), n=st.integers(2, 70), k=st.integers(2, 70))
def test_products(b, m, n, k):
    p = parse(compiled(lambda x, y: jnp.einsum("bmk,bkn->bmn", x, y), jnp.ones((b, m, k)), jnp.ones((b, k, n))).as_text())
    assert total(p).flops.total() == 2 * b * m * n * k


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3), size=st.integers(3, 12), kernel=st.integers(1, 3), features=st.integers(1, 4),
    out=st.integers(1, 4), stride=st.integers(1, 3), pad=st.integers(0, 3), dilate=st.integers(1, 2),
)  # fmt: skip
def test_convolutions_as_xla_counts_them(batch, size, kernel, features, out, stride, pad, dilate):
    def f(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (stride, 1), [(pad, pad), (0, 0)], lhs_dilation=(dilate, 1), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    lowered = jax.jit(f).lower(jnp.ones((batch, size, 5, features)), jnp.ones((kernel, 2, features, out)))
    p = parse(lowered.compiler_ir("hlo").as_hlo_module().to_string())
    convolution = next(i for c in p.computations.values() for i in c if i.opcode == "convolution")
    inside = next(c for c in p.computations.values() if convolution.name in c.instructions)
    lhs, rhs = (inside.instructions[n].arrays[0] for n in convolution.operands)
    assert convolution_flops(convolution, lhs, rhs) == lowered.cost_analysis().get("flops", 0)


def test_a_tpu_writes_batches_as_windows():
    """bf16[4096,128,192] = [4096,1536] x [128,192,1536], by 128 windows that meet one position each."""
    attributes = ", window={size=128 pad=127_127 rhs_reversal=1}, dim_labels=bf0_0oi->b0f"
    i = Instruction("c", "bf16[4096,128,192]{2,0,1}", "convolution", (), "", attributes, False)
    lhs, rhs = arrays_of("(bf16[4096,1536,1], bf16[128,192,1536])")
    assert convolution_flops(i, lhs, rhs) == 2 * 4096 * 128 * 192 * 1536


def kernel(name: str, result: str, operands: str, attributes: str = "") -> float | None:
    i = Instruction("k", result, "custom-call", (), "", f'{attributes}, metadata={{op_name="{name}"}}', False)
    given_ = [Instruction(f"o{n}", str_of(a), "parameter", (), "", "", False) for n, a in enumerate(arrays_of(operands))]
    return kernel_flops(i, given_, 0.5)


def str_of(array) -> str:
    return f"{array.dtype}[{','.join(map(str, array.dims))}]"


def test_attention_is_a_sum_over_pairs_that_are_seen():
    heads, length, key, value = 3, 256, 192, 128
    pairs = heads * sum(q + 1 for q in range(length))  # a query sees itself and what is before
    qkv = f"(bf16[{heads},{length},{key}], bf16[{heads},{length},{key}], bf16[{heads},{length},{value}])"
    forward = kernel("attention/splash_mha_fwd", f"bf16[{heads},{length},{value}]", qkv)
    assert forward == pytest.approx(2 * pairs * (key + value), rel=1 / length)
    backward = kernel("attention/splash_mha_dkv", f"bf16[{heads},{length},{key}]", qkv)
    assert backward == pytest.approx(2 * pairs * (3 * key + 2 * value), rel=1 / length)
    # Hopper's three kernels: scores and dP again in each that needs them
    blhx = f"(bf16[1,{length},{heads},{key}], bf16[1,{length},{heads},{key}], bf16[1,{length},{heads},{value}]"
    more = blhx + f", bf16[1,{length},{heads},{value}], f32[1,{heads},{length}])"
    parts = [kernel("causal_attention_hopper", f"bf16[1,{length},{heads},{size}]", more) for size in (key, key, value)]
    assert sum(p or 0 for p in parts) == pytest.approx(2 * pairs * (2 * (2 * key + value) + key + value), rel=1 / length)


@pytest.mark.parametrize(
    ("result", "operands", "flops"),
    [
        ("f32[2048,1024]", "(bf16[2048,512], bf16[512,1024], s32[2048])", 2 * 2048 * 1024 * 512),
        ("bf16[2048,1024]", "(f8e4m3fn[2048,512], f32[4,2048], f8e4m3fn[1024,512], f32[4,8])", 2 * 2048 * 1024 * 512),
        ("bf16[2048,640]", "(f8e4m3fn[2048,512], f8e4m3fn[4,512,640], s32[16])", 2 * 2048 * 640 * 512),  # grouped
        ("f32[4,512,640]", "(f8e4m3fn[2048,512], f8e4m3fn[2048,640])", 2 * 2048 * 640 * 512),  # their weights' gradient
        ("bf16[2048,640]", "(s32[9], f8e4m3fn[2048,512], f32[4,2048], f8e4m3fn[2560,512], f32[4,2560])", 2 * 2048 * 640 * 512),
        ("(f8e4m3fn[2048,512], f32[4,2048])", "(bf16[2048,512])", 0),  # quantises
        ("bf16[2048,640]", "(bf16[2048,511], bf16[513,640])", None),
    ],
)
def test_kernels_that_multiply(result, operands, flops):
    assert kernel("a/product", result, operands) == flops


def test_kernels_without_products():
    assert kernel("ffn/shard_map/swiglu_backward/pallas_call", "bf16[2048,640]", "(bf16[2048,640], bf16[2048,320])") == 0


def test_kernels_that_say_what_they_cost():
    stated = ', backend_config={"custom_call_config":{"cost_estimate":{"flops":"1000","bytes_accessed":"5"}}}'
    assert kernel("a/ragged", "f32[8]", "(f32[8])", stated) == 1000
    # rows on their way to experts fill half of their buffers
    assert kernel("jvp()/ffn/shard_map/exchange/while/body/ragged", "f32[8]", "(f32[8])", stated) == 500


def test_own_kernels_count_as_their_products():
    """They state sums and scales, too, which no figure of a plan calls FLOPs."""
    stated = ', custom_call_target="TARGET", backend_config={"custom_call_config":{"cost_estimate":{"flops":"9999999999"}}}'
    tpu, gpu = stated.replace("TARGET", "tpu_custom_call"), stated.replace("TARGET", "mosaic_gpu_v2")
    product = "f32[2048,1024]", "(bf16[2048,512], bf16[512,1024], s32[2048])"
    for name in ("jvp(head)/shard_map/logit_statistics", "ffn/scaled_matmul", "transpose(jvp(ffn))/scaled_wgrad"):
        assert kernel(f"{name}/pallas_call", *product, tpu) == 2 * 2048 * 1024 * 512
    assert kernel("head/shard_map/<lambda>/mpmd_map", *product, gpu) == 2 * 2048 * 1024 * 512
    assert kernel("cond/branch_0_fun/body/mpmd_map", "u8[2048,64]", "(f32[2048,256], f32[2048,256])", gpu) == 0


def test_bytes_of_slices_and_updates_in_place():
    """A loop over layers reads a layer's weights and writes a layer's result, not the stacks."""
    layers, size = 16, 1 << 16

    def body(x, w):
        y = jnp.tanh(x * w)
        return y, y

    p = parse(compiled(lambda x, w: jax.lax.scan(body, x, w), jnp.ones(size), jnp.ones((layers, size))).as_text())
    loops = [p.computations[i.called("body")] for c in p.computations.values() for i in c if i.opcode == "while"]
    cost = CostModel(p, "h100", Efficiency(), 1.0)
    moved = sum(cost.work(i, loops[0]).bytes for i in loops[0])
    assert moved < 8 * size * 4  # at most a few passes over one layer, of 16


def test_an_instruction_takes_the_longer_of_products_and_bytes():
    """An H100: 989 TFLOP/s in bfloat16, twice that in 8 bits, 3.35 TB/s, and 2 us for a launch."""
    program = parse("HloModule m\n\nENTRY %main (x: f32[1]) -> f32[1] {\n  ROOT %x = f32[1]{0} parameter(0)\n}\n")
    cost = CostModel(program, "h100", Efficiency(matmul=0.5, memory=0.5), 1.0)
    product, eight, memory = 2e12 / 989e12, 2e12 / 1979e12, 6.7e9 / 3.35e12
    assert cost.seconds(Work(Counter(bf16=1e12), 3.35e9)) == pytest.approx(product + 2e-6)  # its bytes take 2 ms
    assert cost.seconds(Work(Counter(e4m3=1e12), 3.35e9)) == pytest.approx(memory + 2e-6)
    assert cost.bounds(Work(Counter(e4m3=1e12), 3.35e9)) == pytest.approx((eight, memory))
    assert cost.seconds(Work()) == 0


def test_float32_on_a_tpu_takes_passes_of_bfloat16():
    text = """HloModule m, is_scheduled=true

ENTRY %main (x: f32[64,64]) -> f32[64,64] {
  %x = f32[64,64]{1,0} parameter(0)
  ROOT %y = f32[64,64]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}PRECISION
}
"""
    times = []
    for precision in ("", ", operand_precision={high,high}", ", operand_precision={highest,highest}"):
        p = parse(text.replace("PRECISION", precision))
        cost = CostModel(p, "v5p", Efficiency(), 1.0)
        times.append(cost.bounds(cost.work(p.computations["main"].root, p.computations["main"]))[0])
    np.testing.assert_allclose(np.array(times) / times[0], [1, 3, 6])
