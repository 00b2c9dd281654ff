"""vLLM's CPU build computes with our exports what we compute: hf-f32, and hf-w4 as far as it has kernels for it.

scripts/tools/check_vllm.py compares log-probabilities and must notice a damaged weight.
"""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from tests.conftest import ROOT
from tests.interop.cases import RAGGED, compressed_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (ROOT / ".venv-vllm" / "ready").exists(), reason="no .venv-vllm: python scripts/tools/_peer.py vllm makes it"
    ),
]
# MLA's sizes for a token are the released model's, and sides of weights multiples of 32: vLLM has no kernels for others
CONFIG = replace(
    RAGGED, vocab_size=320, hidden_size=256, intermediate_size=512, moe_intermediate_size=128, num_attention_heads=2,
    q_lora_rank=128, qk_nope_head_dim=64, v_head_dim=64,
)  # fmt: skip


@pytest.mark.parametrize(
    ("dense_layers", "profile", "reason"),
    [
        (2, "w4", ""),
        (1, "w4", "No WNA16 MoE backend"),  # its experts in 4 bits need AMX
        (2, "mixed", "Quant type (uint8b128) not supported"),  # it has no kernel for 8 bits on CPUs
    ],
)
def test_vllm_computes_the_same(dense_layers, profile, reason, tmp_path):
    """What vLLM refuses, it refuses for the reason that the documentation states."""
    checkpoint = compressed_checkpoint(tmp_path, replace(CONFIG, first_k_dense_replace=dense_layers), profile)
    program = [sys.executable, str(ROOT / "scripts" / "tools" / "check_vllm.py"), str(checkpoint)]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    found = {its.pop("format"): its for its in lines}
    text = (done.stdout + done.stderr)[-6000:]
    assert found["hf-f32"]["good"], text
    assert found["hf-w4"]["good"] or (reason and reason in found["hf-w4"].get("refused", "")), text
    assert done.returncode == (0 if found["hf-w4"]["good"] else 1)
