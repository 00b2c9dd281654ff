"""Another program, transformers on torch in an environment of its own, computes with our exports what we compute.

scripts/tools/check_export.py loads each there, compares logits (2e-4 in float32) and greedy tokens, wants no key missing and
none unexpected but MTP's, and must notice damaged copies of it.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer

import dsv3_jax as dsv3
from dsv3_jax.interop.hf_export import export
from tests.conftest import FIXTURES, ROOT
from tests.interop.cases import RAGGED, random_model
from tests.interop.test_export import run_on_a_mesh  # noqa: F401  (a fixture)

pytestmark = pytest.mark.slow

# several blocks along every axis that is longer than one, as transformers wants it
BLOCKS = replace(
    RAGGED, hidden_size=256, intermediate_size=384, moe_intermediate_size=128, q_lora_rank=128, kv_lora_rank=64,
    qk_nope_head_dim=96, qk_rope_head_dim=32, v_head_dim=64, num_attention_heads=4, num_nextn_predict_layers=0,
)  # fmt: skip


EXPORTS = [
    ("v3_tiny", "hf-f32"), ("v3_tiny", "hf-bf16"), ("v3_tiny", "hf-fp8"), ("v3_tiny_yarn", "hf-bf16"),
    ("v3_tiny_no_q_lora", "hf-fp8"), ("options_a", "hf-f32"), ("options_b", "hf-bf16"), ("options_c", "hf-f32"),
    ("blocks", "hf-fp8"),
]  # fmt: skip


def check(*directories: Path) -> tuple[int, list[dict], str]:
    """Exit code, a result for each directory, and everything printed."""
    program = [sys.executable, str(ROOT / "scripts" / "tools" / "check_export.py"), *map(str, directories)]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return done.returncode, found, done.stdout + done.stderr


@pytest.fixture(scope="module")
def checked(tmp_path_factory, run_on_a_mesh) -> dict:  # noqa: F811
    """{export: (its model's configuration, what the client found)}, all by one process of the client; the run's is "run"."""
    root = tmp_path_factory.mktemp("exports")
    configs = {}
    for name, format in EXPORTS:
        model = random_model(BLOCKS) if name == "blocks" else dsv3.load_hf(FIXTURES / name)
        shard_bytes = 400_000 if name == "v3_tiny_yarn" else 10**9
        dsv3.save_hf(model, root / f"{name}-{format}", format, shard_bytes=shard_bytes)
        configs[name, format] = model.config
    export(run_on_a_mesh, root / "run", "hf-f32")
    code, found, text = check(*(root / f"{name}-{format}" for name, format in EXPORTS), root / "run")
    assert code == 0, text[-6000:]
    results = dict(zip([*EXPORTS, "run"], found, strict=True))
    return {which: (configs.get(which), result) for which, result in results.items()}


@pytest.mark.parametrize(("name", "format"), EXPORTS)
def test_transformers_computes_the_same(name, format, checked):
    """Its exit code has said that logits and tokens are the same and that damages are noticed."""
    config, found = checked[name, format]
    assert found["export"]["dtype"] == "torch.float32"
    assert found["export"]["missing_keys"] == []
    mtp = f"model.layers.{config.num_hidden_layers}."
    assert all(key.startswith(mtp) for key in found["export"]["unexpected_keys"])
    assert bool(found["export"]["unexpected_keys"]) == (name == "options_b")
    controls = {key: value for key, value in found.items() if key != "export"}
    assert len(controls) == (2 if format == "hf-fp8" else 1)
    assert all(value["max_logit_difference"] > 1e-2 for value in controls.values())


def test_a_trained_run_with_its_tokenizer(run_on_a_mesh, checked):  # noqa: F811
    """From eight devices; AutoTokenizer gives the run's tokens, with the begin token that its documents had."""
    _, found = checked["run"]
    tokenizer = Tokenizer.from_file(str(run_on_a_mesh / "tokenizer.json"))
    ids = tokenizer.encode("def main():\n    return 0\n", add_special_tokens=False).ids
    assert found["export"]["tokens"] == [tokenizer.token_to_id("<|begin_of_text|>"), *ids]


def test_exports_that_the_client_would_read_wrongly_are_not_passed(tmp_path):
    """Blocks that end early, and what is no export at all."""
    dsv3.save_hf(random_model(RAGGED), tmp_path / "ragged", "hf-fp8")
    code, _, text = check(tmp_path / "ragged")
    assert code == 2
    assert "neither a multiple of 128 nor one block" in text
    code, _, text = check(tmp_path)
    assert code == 2
    assert "has no config.json" in text
