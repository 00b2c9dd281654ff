"""Other programs compute with a compressed checkpoint's exports what we compute: transformers, gptqmodel and llama.cpp.

scripts/tools/check_compressed.py makes hf-w4, hf-gptq and gguf, compares their integers and each client's logits with our
dequantised model, and must notice a weight whose bytes have their halves swapped.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import dsv3_jax as dsv3
from tests.conftest import FIXTURES, ROOT
from tests.interop.cases import compressed_checkpoint
from tests.interop.test_quantized import CONFIG

CLIENTS = ROOT / ".venv-clients" / "ready"  # 6 GB, and llama.cpp's compilation: more than a stage of tests may make by itself
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CLIENTS.exists(), reason="no .venv-clients: python scripts/tools/_peer.py clients makes it"),
]


def check(checkpoint: Path) -> tuple[int, dict[str, dict], str]:
    """Exit code, what was found of each format, and everything printed."""
    program = [sys.executable, str(ROOT / "scripts" / "tools" / "check_compressed.py"), str(checkpoint)]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return done.returncode, {found["format"]: found for found in lines}, done.stdout + done.stderr


@pytest.mark.parametrize(("profile", "refused"), [("mixed", set()), ("bits", {"hf-w4"})])
def test_clients_compute_the_same(profile, refused, tmp_path):
    """Its exit code has said so: logits, integers, keys and the damaged copy."""
    config = replace(CONFIG, vocab_size=300)
    checkpoint = compressed_checkpoint(tmp_path, config, profile, "experts.group=32", "linears.group=32")
    code, found, text = check(checkpoint)
    assert code == 0, text[-6000:]
    assert {format for format, its in found.items() if "refused" in its} == refused
    for format in found.keys() - refused:
        assert found[format]["tensors_with_the_same_integers"]["gguf"] == 48  # of the trunk
        assert not found[format]["control_has_the_same_integers"]
    assert len(found["gguf"]["logit_difference"]) == 2  # without MTP and with it


@pytest.mark.parametrize("name", ["v3_tiny_yarn", "v3_tiny_no_q_lora"])
def test_llama_cpp_computes_the_same_with_any_checkpoint(name, tmp_path):
    code, found, text = check(dsv3.import_hf(FIXTURES / name, tmp_path / "ckpt", ("data.seq_len=16",)))
    assert code == 0, text[-6000:]
    assert set(found) == {"gguf-f32", "gguf-f16", "gguf-q8_0"}
