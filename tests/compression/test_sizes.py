"""Sizes and plans of compression: against published and hand-counted figures, and against a container's own arrays."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.compression.blocks import places
from dsv3_jax.compression.container import CompressedWriter, integer_arrays_of
from dsv3_jax.compression.gptq import SWEEPS
from dsv3_jax.compression.plan import gptq_work, linears_of, plan_compression
from dsv3_jax.compression.profile import load_profile
from dsv3_jax.compression.sizes import (
    Weight,
    compressed_size,
    decode_rate,
    fp8_bytes,
    kv_b_plain,
    plain_bytes,
    profile_bytes,
    size_of,
    weights_of,
)  # fmt: skip
from dsv3_jax.config import load_config
from dsv3_jax.cost.topologies import parse_topology
from dsv3_jax.interop.hf_tensors import sources
from dsv3_jax.model.counts import count_parameters
from pallas_kernels.integer_weight import IntegerFormat
from tests.compression.test_compress import MODEL

CONFIG = load_config(Path(__file__).parents[2] / "configs" / "v3_671b.yaml")
V3 = CONFIG.model


@pytest.mark.parametrize(
    ("profile", "stored", "times", "read"),
    [("w4", 349, 3.85, 20.4), ("mixed", 357, 3.76, 28.0), ("pruned", 265, 5.07, 20.4), ("arm-i8mm", 388, 3.46, 29.7)],
)
def test_v3_has_the_sizes_that_were_counted_apart(profile, stored, times, read):
    """10^9 bytes, by an independent count; the last digits of both are rounded."""
    bf16, found = size_of(V3, plain_bytes), compressed_size(V3, load_profile(profile))
    assert found.main / 1e9 == pytest.approx(stored, abs=0.6)
    assert bf16.main / found.main == pytest.approx(times, abs=0.006)
    assert found.read / 1e9 == pytest.approx(read, abs=0.06)


def test_v3_in_16_and_in_8_bits_and_with_kv_b_kept():
    bf16, fp8, w4 = (size_of(V3, of) for of in (plain_bytes, fp8_bytes, profile_bytes(load_profile("w4"))))
    kept = size_of(V3, kv_b_plain(profile_bytes(load_profile("w4"))))
    assert [round(s.read / 1e8) for s in (bf16, fp8, w4, kept)] == [733, 377, 204, 219]  # published: 73.2, 37.7, 20.4, 21.9
    assert bf16.main / 1e9 == pytest.approx(1342, abs=0.5)
    assert (bf16.read / w4.read, fp8.read / w4.read) == pytest.approx((3.59, 1.84), abs=0.006)
    assert decode_rate(w4, 307.2) == pytest.approx(307.2 / 20.42, rel=1e-3)
    assert size_of(V3, fp8_bytes) == compressed_size(V3, load_profile("fp8"))


def test_every_parameter_is_counted_once():
    assert sum(w.size for w in weights_of(V3) if not w.name.startswith("mtp/")) == count_parameters(V3).total


@pytest.mark.parametrize("name", ["w4", "bits"])
def test_a_containers_arrays_have_the_bytes(name, tmp_path):
    """A container declares its arrays before anything is computed; their shapes and dtypes are read from its files."""
    profile = load_profile(name, ("linears.group=16", "experts.group=8"))
    CompressedWriter(tmp_path / "c", "test", MODEL, integer_arrays_of(MODEL, profile), {})
    stored = 0
    for file in tmp_path.rglob("zarr.json"):
        array = json.loads(file.read_text())
        if array.get("node_type") == "array":
            size = 2 if array["data_type"] == "bfloat16" else np.dtype(array["data_type"]).itemsize
            stored += math.prod(array["shape"]) * size
    found = compressed_size(MODEL, profile)
    assert found.main + found.mtp == stored


def test_a_linear_layer_counted_by_hand():
    """[32, 48] in groups of 16: in 4 bits 768 bytes of codes and 2 x 48 scales of 2 bytes; zero points are a byte more."""
    w = Weight("dense_blocks/ffn/w_down_FD", True, 1, 32, 48, 2)
    assert profile_bytes(load_profile("w4", ("linears.group=16",)))(w) == 768 + 2 * 48 * 2
    asymmetric = ("linears.bits=2", "linears.group=16", "linears.symmetric=false")
    assert profile_bytes(load_profile("w4", asymmetric))(w) == 384 + 2 * 48 * 3
    assert profile_bytes(load_profile("npu-int8"))(w) == 32 * 48 + 48 * 2  # one scale an output
    assert fp8_bytes(w) == 32 * 48 + 4


def test_linear_layers_are_those_of_the_checkpoints_tensors():
    tensors = [s for s in sources(MODEL) if s.is_fp8]
    assert sum(w.size for w in weights_of(MODEL) if w.linear) == sum(math.prod(s.shape) for s in tensors)
    assert {(w.name, w.inputs) for w in weights_of(MODEL) if w.linear} == {(s.array, s.shape[1]) for s in tensors}


def test_the_work_of_one_matrix_counted_by_hand():
    """K = 256 is two blocks of 128; two experts; 10 rows each. Sums over the loops, not the closed formulas."""
    K, N, copies = 256, 3, 2
    work = gptq_work(Weight("moe_blocks/ffn/w_down_EMD", True, copies, K, N, 2), 10, IntegerFormat(4, 64))
    in_block = sum(2 * 128 * N for _ in range(K))
    across = sum(2 * K * 128 * N for _ in range(K // 128))
    assert work.flops["rounding"] == copies * (in_block + across)
    assert work.flops["moments"] == copies * 10 * 2 * K * K
    cholesky = sum(j * (K - j) for j in range(K)) * 2  # column j subtracts j products from the K - j entries below
    solve = sum(2 * i for i in range(K)) * K
    assert work.flops["factorisation"] == pytest.approx(copies * (cholesky + solve), rel=0.01)  # but for terms in K^2
    assert work.rounding_bytes == copies * (K * 2 * 128 * N * 4 + (K // 128) * 2 * K * N * 4)
    assert work.steps == K


def test_the_work_of_a_descent_counted_by_hand():
    """K = 256 is eight groups of 32; what it adds to GPTQ, whose codes in 4 bits have none."""
    K, N, g, weight = 256, 3, 32, Weight("moe_blocks/ffn/w_down_EMD", True, 1, 256, 3, 2)
    with_one, without = (gptq_work(weight, 10, IntegerFormat(bits, g)) for bits in (2, 4))
    of_group = 2 * 2 * g * g * N + sum(2 * g * N for _ in range(g)) + 2 * K * g * N
    sweeps = sum(of_group for _ in range(SWEEPS * K // g))
    assert with_one.flops["rounding"] - without.flops["rounding"] == 2 * K * K * N + sweeps
    moved = SWEEPS * (K * 2 * g * N * 4 + K // g * 2 * K * N * 4)
    assert with_one.rounding_bytes - without.rounding_bytes == moved
    assert with_one.steps - without.steps == SWEEPS * K


def test_a_plan_of_v3():
    plan = plan_compression(CONFIG, load_profile("w4"), parse_topology("h100:1x8"))
    assert (plan.tokens, plan.tokens_per_expert, plan.devices) == (65_536, 2048, 8)
    moe = next(place for place in places(V3) if place.moe)
    assert sum(w.inputs for w in linears_of(V3, moe)) == 2 * 7168 + 1536 + 512 + 16384 + 2 * (7168 + 2048)
    assert plan.spread.flops["moments"] == 59 * 65_536 * 8 * 2 * (7168**2 + 2048**2)
    gib = {what: size / 2**30 for what, size in plan.memory_first.items()}
    assert gib["a layer's weights"] == pytest.approx(11.6e9 * 4 / 2**30, rel=0.02)  # 256 x 3 x 7168 x 2048 and a little
    assert gib["second moments"] == pytest.approx((256 / 8 + 2) * 7168**2 * 4 / 2**30)
    assert not plan.fits
    assert 0.05 < sum(plan.seconds.values()) / 3600 < 5
    rounding = plan_compression(CONFIG, load_profile("w4", ("method=round",)), parse_topology("h100:1x8"))
    assert rounding.spread.flops["moments"] == rounding.first.steps == 0
