"""What an earlier version wrote loads in this one and goes on as it went on there.

tests/fixtures/version_0 holds a finished run, one on a mesh that was cut off, one with low precision, an imported checkpoint
and an export, made by scripts/tools/record_version.py, with what that version computed from them in expected.json.
"""

import hashlib
import json
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest

from dsv3_jax import cli
from dsv3_jax.checkpoint.load import open_checkpoint
from dsv3_jax.config import load_config
from dsv3_jax.data.companions import fields
from dsv3_jax.interop.hf_export import export
from dsv3_jax.interop.hf_import import import_hf
from dsv3_jax.training.loop import TrainResult, train
from tests.conftest import FIXTURES, load_script
from tests.interop.cases import read_all

RECORDED = FIXTURES / "version_0"
EXPECTED = json.loads((RECORDED / "expected.json").read_text())
# Between kinds of CPU: float32 rounds elsewhere. With few bits a number may round to its neighbour.
recording = load_script("tools/record_version")
SAME_MACHINE = recording.machine() == EXPECTED["machine"]
TOLERANCE = {"finished": 1e-5, "mesh": 1e-4, "precision": 1e-4}
FIELDS = {  # of the training state, by what stands before an array's name in a checkpoint
    "weights/params": "params", "weights/router_bias": "router_bias", "optimizer/opt_state": "opt_state",
    "optimizer/controller": "controller", "optimizer/errors": "residuals", "optimizer/step": "step", "ema/ema": "ema",
}  # fmt: skip


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """Unpacks recorded folders; runs name their corpus by a path in the working directory."""
    (tmp_path / "corpus.jsonl").write_bytes((RECORDED / "corpus.jsonl").read_bytes())
    monkeypatch.chdir(tmp_path)

    def unpack(name: str) -> Path:
        with tarfile.open(RECORDED / f"{name}.tar.xz") as archive:
            archive.extractall(tmp_path, filter="data")
        return tmp_path / name

    return unpack


def digest(array) -> str:
    value = np.asarray(array)
    shape = ",".join(map(str, value.shape))
    return f"{value.dtype}[{shape}] {hashlib.sha256(np.ascontiguousarray(value)).hexdigest()}"


def digests(tree, prefix: str) -> dict[str, str]:
    found = jax.tree_util.tree_leaves_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in found]
    return {"/".join(filter(None, (prefix, name))): digest(leaf) for name, (_, leaf) in zip(names, found, strict=True)}


def go_on(run: Path, steps: int) -> TrainResult:
    return train(load_config(run / "config.yaml", [f"train.steps={steps}"]), run.parent)


@pytest.mark.parametrize("name", EXPECTED["runs"])
def test_a_run_is_restored_bit_for_bit_and_goes_on(recorded, name):
    run, expected = recorded(name), EXPECTED["runs"][name]
    state = go_on(run, expected["step"]).state  # no step is left to do
    restored = {k: v for prefix, field in FIELDS.items() for k, v in digests(getattr(state, field), prefix).items()}
    assert restored == expected["arrays"]

    go_on(run, expected["rows"][-1]["step"])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, expected["rows"][-1]["step"] + 1))
    for row, then in zip(rows[expected["step"] :], expected["rows"], strict=True):
        assert row["batch_checksum"] == then["batch_checksum"]
        assert {k: row[k] for k in then} == (then if SAME_MACHINE else pytest.approx(then, rel=TOLERANCE[name]))


def test_an_imported_checkpoint_loads(recorded, capsys):
    imported = recorded("imported")
    assert fields(open_checkpoint(imported).companions(), "config.json")["eos_token_id"] == 1  # from the metadata
    assert recording.digests(imported) == EXPECTED["imported"]["arrays"]
    cli.main(["eval", str(imported), "--data", "corpus.jsonl"])
    found, then = json.loads(capsys.readouterr().out), EXPECTED["imported"]["eval"]
    assert found.pop("max_load") <= then["max_load"]  # since then, without padding
    then = {key: value for key, value in then.items() if key != "max_load"}
    assert found == (then if SAME_MACHINE else pytest.approx(then, rel=1e-5))


def test_an_export_is_imported_as_it_was(recorded):
    imported = import_hf(recorded("exported"), Path("again"))
    assert recording.digests(imported) == EXPECTED["imported"]["arrays"]


def test_a_run_is_exported_as_it_was(recorded):
    run, exported = recorded("finished"), recorded("exported")
    export(run, Path("again"), "hf-fp8")
    for file in exported.iterdir():
        if file.suffix not in (".md", ".safetensors") and file.name != "tokenizer.json":
            assert (Path("again") / file.name).read_bytes() == file.read_bytes(), file.name
    before, now = (json.loads((path / "tokenizer.json").read_text()) for path in (exported, Path("again")))
    assert before["post_processor"] is None  # since then, other programs begin texts as documents began
    assert now.pop("post_processor")["single"][0]["SpecialToken"]["id"] == "<|begin_of_text|>"
    assert now == {key: value for key, value in before.items() if key != "post_processor"}
    found, then = read_all(Path("again")), read_all(exported)
    assert found.keys() == then.keys()
    for name, tensor in then.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].tobytes() == tensor.tobytes(), name


def test_the_records_of_a_run_are_read(recorded, capsys):
    cli.main(["report", str(recorded("mesh"))])
    assert "goodput" in capsys.readouterr().out
