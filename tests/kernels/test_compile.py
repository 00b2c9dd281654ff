"""Every low-precision kernel through the targets' own compilers, at the released model's sizes."""

import json

import pytest

from tests.aot import in_aot_environment

REFUSED = {
    "h100: scaled_matmul int8": "no int8 kernel",
    "h100: grouped scaled_matmul int8": "no int8 kernel",
    "h100: grouped scaled_wgrad int8": "no int8 kernel",
    "block larger than VMEM": "vmem",
}  # and what the reason says


@pytest.mark.slow(minutes=4)
def test_kernels_compile_for_their_targets():
    done = in_aot_environment("scripts/tools/compile_kernels.py")
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.strip().splitlines()[-1])
    assert {name.split(":")[0] for name in results} == {"v5p", "v6e", "tpu7x", "h100"}
    for name, found in results.items():
        reason = next((reason for part, reason in REFUSED.items() if part in name), None)
        assert found["compiled"] == (reason is None), f"{name}: {found}"
        if "pack_codes" in name:
            assert found["bytes"] < 17.1 * 14.7e6, name  # three numbers read, one and at most 8 bits written, and scales
            assert found["ratio"] > 1.5, name
        if name.endswith("integer token"):
            assert found["bytes_over_formula"] < 1.05, f"{name}: {found}"
        if reason is not None:
            assert reason in found["reason"].lower(), f"{name}: {found}"
        elif name.startswith("h100") and "integer" not in name:
            assert found["spilled_bytes"] == 0, name
            multiplies = "QGMMA" if "scaled_" in name else "HGMMA" if "attention" in name or "cross_entropy" in name else None
            assert all(op.startswith(str(multiplies)) for op in found["tensor_core"]), name
            assert bool(found["tensor_core"]) == (multiplies is not None), name
