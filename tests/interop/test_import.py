"""Hugging Face checkpoints become ours: the same numbers, in little memory, all or nothing, by several processes too."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import dsv3_jax as dsv3
from dsv3_jax.checkpoint.manifest import verify
from dsv3_jax.checkpoint.scratch import claim, scratch_of
from dsv3_jax.config import load_config
from dsv3_jax.errors import UserError
from dsv3_jax.interop.hf_export import export
from dsv3_jax.interop.hf_files import open_hf
from dsv3_jax.interop.hf_import import import_hf, imported_config
from dsv3_jax.interop.hf_tensors import sources
from dsv3_jax.model.names import variables_by_name
from tests.commands import dsv3 as command
from tests.conftest import FIXTURES, ROOT
from tests.interop.cases import BF16, RAGGED, fp8_checkpoint, noise_checkpoint, random_model, read_all, write

NAMES = sorted(p.parent.name for p in FIXTURES.glob("*/reference.npz"))


def tensors_of(model: dsv3.Transformer) -> dict[str, np.ndarray]:
    """A model's weights under Hugging Face's names."""
    arrays = {name: np.asarray(v.get_value()) for name, v in variables_by_name(nnx.state(model)).items()}
    return {s.tensor: s.to_tensor(arrays[s.array][s.full_index]) for s in sources(model.config)}


@pytest.mark.parametrize("name", NAMES)
def test_an_imported_checkpoint_computes_what_transformers_does(name, tmp_path):
    reference = np.load(FIXTURES / name / "reference.npz")
    import_hf(FIXTURES / name, tmp_path / "ckpt")
    model = dsv3.load(tmp_path / "ckpt")
    assert np.abs(np.asarray(model(reference["input_ids_0"])) - reference["logits_0"]).max() <= 2e-4
    new = reference["greedy_ids"].shape[1] - reference["prompt_ids"].shape[1]
    np.testing.assert_array_equal(dsv3.generate(model, reference["prompt_ids"], new), reference["greedy_ids"])


@pytest.mark.parametrize("format", ["hf-f32", "hf-bf16"])
@pytest.mark.parametrize("name", ["v3_tiny_yarn", "options_a", "options_b", "ragged"])
def test_import_then_export_gives_every_byte_back(name, format, tmp_path):
    source = FIXTURES / name
    if name == "ragged":
        source = dsv3.save_hf(random_model(RAGGED), tmp_path / "source", "hf-f32")
    dtype = np.float32 if format == "hf-f32" else BF16
    bias = "e_score_correction_bias"
    tensors = {
        n: t if bias in n else t.astype(dtype)
        for n, t in load_file(source / "model.safetensors").items()
        if not (name == "options_a" and n == "lm_head.weight")  # tied
    }
    written = write(tmp_path / "hf", tensors, json.loads((source / "config.json").read_text()))
    import_hf(written, tmp_path / "ckpt")
    export(tmp_path / "ckpt", tmp_path / "back", format)
    back = read_all(tmp_path / "back")
    for n, tensor in tensors.items():
        assert (back[n].dtype, back[n].tobytes()) == (tensor.dtype, tensor.tobytes()), n
    extra = set(back) - set(tensors)
    assert all(n.endswith(("embed_tokens.weight", "shared_head.head.weight")) for n in extra)  # what MTP modules share
    embedding = (tmp_path / "ckpt/weights/params/embed_VD/value/zarr.json").read_text()
    assert json.loads(embedding)["data_type"] == np.dtype(dtype).name  # bfloat16 takes no more room than it did


@pytest.fixture(scope="module")
def ragged_fp8(tmp_path_factory):
    root = tmp_path_factory.mktemp("fp8")
    dsv3.save_hf(random_model(RAGGED), root / "f32", "hf-f32")
    return fp8_checkpoint(root / "f32", root / "fp8")


def test_block_fp8_is_its_formula(ragged_fp8, tmp_path):
    """Exactly value * scale, blocks that end early included (576 rows), loaded and imported; bfloat16 if asked for."""
    directory, meant = ragged_fp8
    assert meant["model.layers.1.self_attn.kv_a_proj_with_mqa.weight"].shape == (576, 200)
    import_hf(directory, tmp_path / "exact")
    for model in (dsv3.load_hf(directory), dsv3.load(tmp_path / "exact")):
        for name, tensor in tensors_of(model).items():
            np.testing.assert_array_equal(tensor, meant[name], err_msg=name)
    import_hf(directory, tmp_path / "rounded", bfloat16=True)
    for name, tensor in tensors_of(dsv3.load(tmp_path / "rounded")).items():
        wanted = meant[name].astype(BF16).astype(np.float32) if meant[name].ndim > 1 else meant[name]
        np.testing.assert_array_equal(tensor, wanted, err_msg=name)
    assert json.loads((tmp_path / "rounded/weights/params/embed_VD/value/zarr.json").read_text())["data_type"] == "bfloat16"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t, c: t.pop("model.layers.0.mlp.up_proj.weight_scale_inv"), "mlp.up_proj.weight_scale_inv is missing"),
        (
            lambda t, c: t.update({"model.layers.0.mlp.up_proj.weight_scale_inv": np.ones((3, 3), np.float32)}),
            "mlp.up_proj.weight_scale_inv has shape [3, 3]; config.json implies [3, 2]",
        ),
        (lambda t, c: c.pop("quantization_config"), "has no quantization_config"),
        (
            lambda t, c: t.update({"model.norm.weight_scale_inv": np.ones((1, 1), np.float32)}),
            "model.norm.weight_scale_inv is unexpected",
        ),
        (
            lambda t, c: t.update({"model.norm.weight": np.ones(200, np.int32)}),
            "tensor model.norm.weight has dtype I32; use one of F32",
        ),
        (
            lambda t, c: t.update({"model.layers.2.shared_head.head.weight": np.ones((70, 200), BF16)}),
            "model.layers.2.shared_head.head.weight differs from lm_head.weight",
        ),
    ],
)
def test_wrong_tensors_are_refused_by_name(ragged_fp8, tmp_path, change, expected):
    """Loading and importing refuse them alike, and nothing is written."""
    tensors, config = read_all(ragged_fp8[0]), json.loads((ragged_fp8[0] / "config.json").read_text())
    change(tensors, config)
    directory = write(tmp_path / "bad", tensors, config)
    for read in (dsv3.load_hf, lambda path: import_hf(path, tmp_path / "ckpt")):
        with pytest.raises(UserError) as error:
            read(directory)
        assert expected in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad"]


@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"expert": 4, "tensor": 2}, {"fsdp": 2, "expert": 2, "tensor": 2}, {"data": 2}])
def test_loading_onto_a_mesh(mesh, tmp_path):
    """Spread as training stores weights; the same logits from there and from an imported checkpoint."""
    parallel = dsv3.ParallelConfig(**mesh)
    reference = np.load(FIXTURES / "v3_tiny_no_q_lora" / "reference.npz")
    model = dsv3.load_hf(FIXTURES / "v3_tiny_no_q_lora", parallel=parallel)
    overrides = tuple(f"parallel.{axis}={size}" for axis, size in mesh.items())
    import_hf(FIXTURES / "v3_tiny_no_q_lora", tmp_path / "ckpt", overrides)
    imported = dsv3.load(tmp_path / "ckpt")
    for ours in (model, imported):
        assert np.abs(np.asarray(ours(reference["input_ids_0"])) - reference["logits_0"]).max() <= 2e-4
        weights = ours.moe_blocks.ffn.w_down_EMD.get_value()
        assert len(weights.devices()) == np.prod(list(mesh.values()))
    for a, b in zip(jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(imported)), strict=True):
        assert a.sharding == b.sharding
        np.testing.assert_array_equal(a, b)


def test_an_imported_config_is_what_was_asked_for(tmp_path):
    import_hf(FIXTURES / "v3_tiny", tmp_path / "v3", ("precision.recipe=bf16", "data.batch_size=4"))
    from dsv3_jax.checkpoint.load import open_checkpoint

    config = open_checkpoint(tmp_path / "v3").config
    assert (config.name, config.precision.recipe, config.data.batch_size, config.data.seq_len) == ("v3", "bf16", 4, 256)
    assert config.model == dsv3.load_hf(FIXTURES / "v3_tiny").config
    # a schedule for a model that has learnt: the report's for fine-tuning is 5e-6 to 1e-6, its last pre-training had MTP at 0.1
    # and left the router's bias alone
    optim, training = config.optim, config.train
    assert (optim.lr, optim.lr_final) == (1e-5, 1e-6)
    assert (training.mtp_loss_weight, training.mtp_loss_weight_final, training.bias_update_speed) == (0.1, 0.1, 0.0)
    assert load_config(tmp_path / "v3" / "config.yaml") == config
    import_hf(FIXTURES / "v3_tiny", tmp_path / "asked", ("optim.lr=3e-4", "optim.warmup_steps=200"))
    assert load_config(tmp_path / "asked" / "config.yaml").optim == replace(optim, lr=3e-4, warmup_steps=200)
    found = imported_config(open_hf(FIXTURES / "v3_tiny"), "paths", ("data.path=texts/*.txt", "data.cache_dir=cache"))
    assert (found.data.path, found.data.cache_dir) == (f"{Path.cwd()}/texts/*.txt", f"{Path.cwd()}/cache")
    with pytest.raises(UserError, match=r"model\.\* comes from config\.json"):
        import_hf(FIXTURES / "v3_tiny", tmp_path / "other", ("model.vocab_size=3",))


def test_special_tokens_that_are_none_are_refused_before_anything_is_written(tmp_path):
    """What stands in a checkpoint is under its checksums: it could not be mended after the import."""
    shutil.copytree(FIXTURES / "v3_tiny", tmp_path / "hf")
    (tmp_path / "hf/generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(UserError, match=r"^generation_config\.json: eos_token_id=</s> must be the id of a token"):
        import_hf(tmp_path / "hf", tmp_path / "ckpt")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_targets_that_cannot_be_written(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    with pytest.raises(UserError, match="exists already"):
        import_hf(FIXTURES / "v3_tiny", tmp_path / "full")
    (tmp_path / "empty").mkdir()
    import_hf(FIXTURES / "v3_tiny", tmp_path / "empty")
    verify(tmp_path / "empty")
    # by the command: one line, exit code 2
    done = command("import", str(FIXTURES / "v3_tiny"), str(tmp_path / "full"), cwd=ROOT)
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1)
    assert "exists already" in done.stderr


def test_two_writers_do_not_meet(tmp_path):
    claimed = claim(tmp_path / "ckpt")
    with pytest.raises(UserError, match="is being written by another process"):
        import_hf(FIXTURES / "v3_tiny", tmp_path / "ckpt")
    claimed.drop()
    import_hf(FIXTURES / "v3_tiny", tmp_path / "ckpt")


def test_a_disk_too_small_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(UserError, match=r"needs 0\.0 GB and .* has 0\.0 GB left"):
        import_hf(FIXTURES / "v3_tiny", tmp_path / "ckpt")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """200 MB: long enough to be killed in."""
    return noise_checkpoint(tmp_path_factory.mktemp("large") / "hf", 32)


def digests(checkpoint) -> dict:
    """Digests of the arrays' files."""
    listing = json.loads((checkpoint / "manifest.json").read_text())["files"]
    return {name: entry for name, entry in listing.items() if "/c/" in name}


@pytest.mark.slow
def test_a_killed_import_leaves_nothing_that_loads_and_goes_on(large, tmp_path):
    """Killed at random points until it has had its time; each time nothing stands at the target, and less is left to do."""
    program = [sys.executable, str(ROOT / "tests/interop/kill_storm.py"), "import", str(large), str(tmp_path / "ckpt"), "12"]
    done = subprocess.run(program, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    killed = json.loads(done.stdout.strip().splitlines()[-1])
    assert killed["killed"] >= 4
    assert killed["chunks"] == sorted(killed["chunks"])  # what was written stays
    assert max(killed["chunks"]) > 0
    import_hf(large, tmp_path / "whole")
    assert digests(tmp_path / "ckpt") == digests(tmp_path / "whole")
    verify(tmp_path / "ckpt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt", "whole"]


@pytest.fixture
def cut_off(large, tmp_path):
    """The target of an import that was killed."""
    program = [sys.executable, str(ROOT / "tests/interop/kill_storm.py"), "import", str(large), str(tmp_path / "ckpt"), "1"]
    subprocess.run(program, capture_output=True, check=True, env=os.environ | {"PYTHONPATH": str(ROOT), "LEAVE": "1"})
    assert not (tmp_path / "ckpt").exists()
    return tmp_path / "ckpt"


def test_a_line_of_the_journal_may_be_cut_off(large, cut_off):
    """A machine that loses power may leave a broken line: its chunk is written again, and the lines after it count."""
    journal = scratch_of(cut_off) / "done-0.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    assert lines
    journal.write_text("".join(lines)[:-9])
    import_hf(large, cut_off)
    verify(cut_off)


def test_an_import_of_something_else_starts_over(cut_off, tmp_path):
    import_hf(FIXTURES / "v3_tiny", tmp_path / "ckpt")
    reference = np.load(FIXTURES / "v3_tiny" / "reference.npz")
    logits = dsv3.load(tmp_path / "ckpt")(jnp.asarray(reference["input_ids_0"]))
    assert np.abs(np.asarray(logits) - reference["logits_0"]).max() <= 2e-4


@pytest.mark.slow
def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    """60 MB and 480 MB of experts: a process that imports needs about as much for both."""
    peaks = []
    for experts in (8, 64):
        directory = noise_checkpoint(tmp_path / f"hf-{experts}", experts)
        code = (
            "import sys, re; from dsv3_jax.interop.hf_import import import_hf; import_hf(*sys.argv[1:]); "
            "print(int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024)"
        )
        program = [sys.executable, "-c", code, str(directory), str(tmp_path / f"ckpt-{experts}")]
        done = subprocess.run(program, capture_output=True, text=True, check=True, cwd=ROOT)
        peaks.append(float(done.stdout))
    assert peaks[1] < peaks[0] + 60, peaks  # MB


def test_two_processes_import_and_load_only_what_they_need(tmp_path):
    """Each writes half of the tensors, and reads the experts that its devices hold; the checkpoint is that of one process."""
    from dsv3_jax.cluster.processes import free_port
    from tests.cluster.test_processes import start

    port, program = free_port(), ["tests/interop/two_processes.py", str(FIXTURES / "v3_tiny"), str(tmp_path)]
    running = [start(program, process, 2, port) for process in (0, 1)]
    outputs = [process.communicate(timeout=240) for process in running]
    assert [p.returncode for p in running] == [0, 0], outputs[0][1][-2000:] + outputs[1][1][-2000:]
    results = [json.loads((tmp_path / f"read-{i}.json").read_text()) for i in (0, 1)]
    for i, result in enumerate(results):
        assert result["experts"] == list(range(4 * i, 4 * i + 4))
        assert result["difference"] <= 2e-4
    assert sum(r["imported"] for r in results) == results[0]["tensors"]
    assert min(r["imported"] for r in results) > 0.4 * results[0]["tensors"]
    import_hf(FIXTURES / "v3_tiny", tmp_path / "alone")
    assert digests(tmp_path / "ckpt") == digests(tmp_path / "alone")
