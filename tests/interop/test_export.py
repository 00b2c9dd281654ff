"""Exports: what they contain, complete or not at all, from any mesh. Another program reads them in test_clients.py."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import chex
import jax
import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer

import dsv3_jax as dsv3
from dsv3_jax.checkpoint.load import open_checkpoint
from dsv3_jax.config import load_config
from dsv3_jax.data.special_tokens import SpecialTokens
from dsv3_jax.errors import UserError
from dsv3_jax.interop.hf_export import export
from dsv3_jax.interop.hf_files import open_hf
from dsv3_jax.interop.hf_import import import_hf
from dsv3_jax.interop.hf_text import TextFiles
from dsv3_jax.interop.hf_writer import write_hf
from dsv3_jax.training.loop import train
from tests.commands import dsv3 as command
from tests.commands import dsv3_process
from tests.conftest import FIXTURES, ROOT
from tests.interop.cases import BF16, F8, FP8_CONFIG, RAGGED, dequantized, is_fp8, random_model, read_all


@pytest.fixture(scope="module")
def ragged(tmp_path_factory):
    """A model and its weights, float32."""
    directory = dsv3.save_hf(random_model(RAGGED), tmp_path_factory.mktemp("ragged") / "f32", "hf-f32")
    return directory, {name: np.array(w) for name, w in read_all(directory).items()}


def test_fp8_is_the_releases_layout(ragged, tmp_path):
    """The right tensors are in 8 bits, their scales have the right shapes (blocks end early too), values are near."""
    directory, weights = ragged
    tensors = read_all(dsv3.save_hf(dsv3.load_hf(directory), tmp_path / "fp8", "hf-fp8"))
    assert json.loads((tmp_path / "fp8/config.json").read_text())["quantization_config"] == FP8_CONFIG
    assert set(tensors) == set(weights) | {name + "_scale_inv" for name in weights if is_fp8(name)}
    for name, w in weights.items():
        found = tensors[name]
        if not is_fp8(name):
            wanted = np.float32 if name.endswith("e_score_correction_bias") else BF16
            np.testing.assert_array_equal(found, w.astype(wanted), err_msg=name)
            continue
        scales = tensors[name + "_scale_inv"]
        assert (found.dtype, scales.dtype) == (F8, np.float32)
        assert scales.shape == tuple(math.ceil(n / 128) for n in w.shape), name
        assert np.isfinite(found.astype(np.float32)).all()
        for i, j in np.ndindex(scales.shape):
            block = np.s_[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
            assert np.abs(found[block].astype(np.float32)).max() == 448, name  # the whole range is used
            assert scales[i, j] == pytest.approx(np.abs(w[block]).max() / 448, rel=1e-6)
        error = np.linalg.norm(dequantized(found, scales) - w) / np.linalg.norm(w)
        assert error < 0.03, name  # 3 bits of mantissa: 2.6% of a normal distribution
    loaded = read_all(dsv3.save_hf(dsv3.load_hf(tmp_path / "fp8"), tmp_path / "again", "hf-f32"))
    for name in weights:
        if is_fp8(name):
            np.testing.assert_array_equal(loaded[name], dequantized(tensors[name], tensors[name + "_scale_inv"]), err_msg=name)


def test_zeros_and_outliers_in_8_bits(tmp_path):
    """A block of zeros has a scale that is not zero; a large number leaves other blocks as they were."""
    from dsv3_jax.interop import fp8

    w = np.zeros((200, 300), np.float32)
    w[130:, 130:] = np.random.default_rng(0).normal(0, 1, (70, 170))
    w[140, 140] = 1e6
    values, scales = fp8.quantize(w)
    assert (scales > 0).all()
    back = fp8.dequantize(values, scales)
    np.testing.assert_array_equal(back, dequantized(values, scales))
    np.testing.assert_array_equal(back[:128], 0)
    assert back[140, 140] == pytest.approx(1e6)
    assert np.abs(back - w)[130:, 256:].max() <= np.abs(w[130:, 256:]).max() / 16  # half a step of 3 bits' mantissa


@pytest.mark.parametrize("shard_bytes", [1, 300_000, math.inf])
def test_shards_and_their_index(ragged, shard_bytes, tmp_path):
    directory, weights = ragged
    out = dsv3.save_hf(dsv3.load_hf(directory), tmp_path / "out", "hf-bf16", shard_bytes=shard_bytes)
    files = sorted(out.glob("*.safetensors"))
    tensors = read_all(out)
    assert set(tensors) == set(weights)
    if shard_bytes == math.inf:
        assert [f.name for f in files] == ["model.safetensors"]
        assert not (out / "model.safetensors.index.json").exists()
        return
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert set(index["weight_map"].values()) == {f.name for f in files}
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    largest = max(t.nbytes for t in tensors.values())
    assert all(f.stat().st_size <= max(shard_bytes, largest) + 20_000 for f in files)
    assert open_hf(out).config == RAGGED


@pytest.fixture(scope="module")
def run_on_a_mesh(tmp_path_factory, corpus_dir):
    """A run of two steps on eight devices, with every axis but `data` in use."""
    root = tmp_path_factory.mktemp("runs")
    overrides = [
        "model.vocab_size=304", "model.hidden_size=32", "model.intermediate_size=48", "model.moe_intermediate_size=16",
        "model.num_hidden_layers=3", "model.num_attention_heads=2", "model.q_lora_rank=16", "model.kv_lora_rank=16",
        "model.qk_nope_head_dim=8", "model.qk_rope_head_dim=8", "model.v_head_dim=8", "model.n_routed_experts=8",
        "data.seq_len=32", "data.batch_size=8", f"data.path={corpus_dir}/*.txt", f"data.cache_dir={root}/cache",
        "train.steps=2", "train.eval_every=2", "train.eval_batches=1", "optim.warmup_steps=1", "name=meshed",
        "parallel.fsdp=2", "parallel.expert=2", "parallel.tensor=2",
    ]  # fmt: skip
    return train(load_config(ROOT / "configs" / "tiny.yaml", overrides), root).run.path


def test_a_run_of_a_mesh_is_exported_without_one(run_on_a_mesh, tmp_path):
    """The command, in a process with one device, writes the weights of the run's model, and all that a client wants."""
    done = dsv3_process(
        "export", str(run_on_a_mesh), str(tmp_path / "out"), "--format", "hf-f32", "--shard-gb", "0.0001", cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    model = dsv3.load(run_on_a_mesh)
    mine = read_all(dsv3.save_hf(model, tmp_path / "saved", "hf-f32"))
    theirs = read_all(tmp_path / "out")
    assert set(mine) == set(theirs)
    for name, tensor in mine.items():
        np.testing.assert_array_equal(theirs[name], tensor, err_msg=name)
    assert {p.name for p in (tmp_path / "out").iterdir() if p.suffix != ".safetensors"} == {
        "config.json", "generation_config.json", "model.safetensors.index.json", "README.md", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    tokenizer = Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    ids = {
        key: json.loads((tmp_path / "out/generation_config.json").read_text())[key] for key in ("bos_token_id", "eos_token_id")
    }
    settings = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert {tokenizer.token_to_id(settings[f"{which}_token"]) for which in ("bos", "eos")} == set(ids.values())
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["bos_token_id"] == ids["bos_token_id"]
    assert (config["scoring_func"], config["topk_method"], config["dtype"]) == ("sigmoid", "noaux_tc", "float32")
    card = (tmp_path / "out/README.md").read_text()
    for fact in ("meshed", "step 2", "hf-f32", "library_name: transformers", "sha256"):
        assert fact in card, fact


def test_an_imported_checkpoint_keeps_what_came_with_it(tmp_path):
    source = tmp_path / "hf"
    dsv3.save_hf(dsv3.load_hf(FIXTURES / "options_c"), source, "hf-f32")
    extra = {"bos_token_id": 3, "eos_token_id": [4, 5], "pretraining_tp": 1, "aux_loss_alpha": 0.001}
    (source / "config.json").write_text(json.dumps(json.loads((source / "config.json").read_text()) | extra))
    (source / "generation_config.json").write_text('{"temperature": 0.3}')
    (source / "chat_template.jinja").write_text("{{ messages }}")
    import_hf(source, tmp_path / "ckpt")
    export(tmp_path / "ckpt", tmp_path / "back", "hf-bf16")
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert extra.items() <= config.items()
    assert (tmp_path / "back/generation_config.json").read_text() == '{"temperature": 0.3}'
    assert (tmp_path / "back/chat_template.jinja").read_text() == "{{ messages }}"
    assert open_hf(tmp_path / "back").config == open_hf(FIXTURES / "options_c").config  # YaRN in its older form


def test_what_cannot_be_written_is_refused(ragged, tmp_path):
    model = dsv3.load_hf(ragged[0])
    with pytest.raises(UserError, match="format 'hf-int3' is unknown; use one of hf-f32, hf-bf16, hf-fp8"):
        dsv3.save_hf(model, tmp_path / "out", "hf-int3")
    for size in (0, math.nan, -math.inf):
        with pytest.raises(UserError, match=f"shard size {size} must be positive"):
            dsv3.save_hf(model, tmp_path / "out", "hf-f32", shard_bytes=size)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    with pytest.raises(UserError, match="exists already"):
        dsv3.save_hf(model, tmp_path / "full", "hf-f32")
    with pytest.raises(UserError, match="cannot read"):
        dsv3.save_hf(model, tmp_path / "out", "hf-f32", tokenizer=tmp_path / "no.json")
    assert [p.name for p in tmp_path.iterdir()] == ["full"]
    for bad in (
        ["export", "no_such_run", "x"],
        ["export", str(ROOT / "configs"), "x"],
        ["export", "x", "y", "--format", "gguf"],
    ):
        assert command(*bad, cwd=ROOT).returncode == 2


def test_an_export_that_fails_leaves_nothing(ragged, tmp_path, monkeypatch):
    from dsv3_jax.interop import hf_writer

    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf_writer, "model_card", fails)
    with pytest.raises(OSError, match="No space"):
        dsv3.save_hf(dsv3.load_hf(ragged[0]), tmp_path / "out", "hf-f32")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_export_reads_no_further_tensor(tmp_path):
    """Its threads went on to the ends of their shards, 5 GB each, while the program had said that it is stopped."""
    of_main, read = threading.main_thread().ident, []

    def waits_for_threads() -> bool:
        frame = sys._current_frames()[of_main]
        while frame is not None and frame.f_code is not ThreadPoolExecutor.shutdown.__code__:
            frame = frame.f_back
        return frame is not None

    def interrupt(source):
        read.append(source.tensor)
        if len(read) == 1:
            os.kill(os.getpid(), signal.SIGINT)
            while not waits_for_threads():
                time.sleep(0.01)
        return np.zeros(source.shape, np.float32)

    with pytest.raises(KeyboardInterrupt):
        write_hf(tmp_path / "out", RAGGED, "hf-f32", interrupt, origin={}, text=TextFiles())
    assert len(read) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_twenty_killed_exports_leave_nothing_that_loads_wrongly(tmp_path):
    """SIGKILL at random points: the directory is not there, or it is complete. The next export clears up and finishes."""
    from tests.interop.cases import noise_checkpoint

    source = noise_checkpoint(tmp_path / "hf", 16)
    import_hf(source, tmp_path / "ckpt")
    program = [
        sys.executable,
        str(ROOT / "tests/interop/kill_storm.py"),
        "export",
        str(tmp_path / "ckpt"),
        str(tmp_path / "out"),
    ]
    done = subprocess.run(
        [*program, "20", "hf-bf16"], capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["killed"] + found["finished"] == 20
    assert found["killed"] >= 12
    wanted, out = read_all(source), read_all(tmp_path / "out")
    assert set(out) == set(wanted)
    for name, tensor in wanted.items():
        expected = tensor if name.endswith("e_score_correction_bias") else tensor.astype(BF16)
        np.testing.assert_array_equal(out[name].view(np.uint8), expected.view(np.uint8), err_msg=name)


# what a released model may have beside its weights, and a client or a lawyer wants
SOURCE_FILES = {
    "generation_config.json": '{"eos_token_id": [1, 5], "temperature": 0.6, "top_p": 0.95}',
    "tokenizer_config.json": '{"bos_token": "<|begin_of_text|>", "pad_token": "<|end_of_text|>", "chat_template": "{{ x }}"}',
    "special_tokens_map.json": '{"eos_token": "<|end_of_text|>"}',
    "chat_template.jinja": "{{ bos_token }}{{ messages }}",
    "tokenizer.model": "a sentencepiece model",
    "tiktoken.model": "a tiktoken model",
    "tokenization_moon.py": "class Tokenizer: ...",
    "LICENSE-MODEL": "may be used",
    "additional_chat_templates/tool_use.jinja": "{{ tools }}",
}
SOURCE_FIELDS = {"pad_token_id": 1, "pretraining_tp": 1, "aux_loss_alpha": 0.001, "eos_token_id": [1, 5], "bos_token_id": 0}


@pytest.fixture(scope="module")
def tuned(run_on_a_mesh, tmp_path_factory):
    """A run exported, given what a released model has, imported, and trained for a step: (import, run, overrides)."""
    root = tmp_path_factory.mktemp("tuned")
    export(run_on_a_mesh, root / "hf", "hf-f32")
    (root / "hf/additional_chat_templates").mkdir()
    for name, content in SOURCE_FILES.items():
        (root / "hf" / name).write_text(content)
    for name in ("modeling_moon.py", "notes.txt", "weights.bin"):  # the model's code is ours, and the rest is nobody's
        (root / "hf" / name).write_text("private")
    for name, its in (("config.json", SOURCE_FIELDS), ("tokenizer.json", {"post_processor": None})):
        (root / "hf" / name).write_text(json.dumps(json.loads((root / "hf" / name).read_text()) | its))
    ckpt = import_hf(root / "hf", root / "ckpt", ("data.seq_len=32",))
    data = load_config(run_on_a_mesh / "config.yaml").data
    overrides = [
        f"train.init_from={ckpt}", "name=goes_on", "train.steps=1", "optim.lr=1e-9", "optim.lr_final=0", "optim.weight_decay=0",
        "train.eval_every=1", "train.eval_batches=1", "data.batch_size=8", f"data.path={data.path}", "parallel.expert=2",
        f"data.cache_dir={data.cache_dir}",
    ]  # fmt: skip
    return ckpt, train(load_config(ckpt / "config.yaml", overrides), root), overrides


def test_fine_tuning_keeps_what_serving_needs(tuned, tmp_path):
    """Chat template, special tokens, settings of generation, tokenizers of other kinds, licence, fields that we do not use."""
    ckpt, result, _ = tuned
    for source in (ckpt, result.run.path):
        out = export(source, tmp_path / source.name, "hf-bf16")
        for name, content in SOURCE_FILES.items():
            assert (out / name).read_text() == content, name
        assert {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()} == {
            *SOURCE_FILES, "config.json", "model.safetensors", "README.md", "tokenizer.json",
        }  # fmt: skip
        config = json.loads((out / "config.json").read_text())
        assert SOURCE_FIELDS.items() <= config.items()
    assert result.corpus.special == SpecialTokens(0, (1, 5))
    assert open_checkpoint(result.run.path).special_tokens() == SpecialTokens(0, (1, 5))
    saved = dsv3.save_hf(dsv3.load(ckpt), tmp_path / "saved", "hf-f32", tokenizer=result.run.path / "tokenizer.json")
    assert (saved / "chat_template.jinja").read_text() == SOURCE_FILES["chat_template.jinja"]
    # an import's tokenizer stays as it was; documents of the run, and of its exports, had a begin token
    unchanged, tuned_one, by_model = (
        Tokenizer.from_file(str(tmp_path / n / "tokenizer.json")) for n in ("ckpt", "goes_on", "saved")
    )
    assert (tmp_path / "ckpt/tokenizer.json").read_bytes() == (ckpt.parent / "hf/tokenizer.json").read_bytes()
    plain = unchanged.encode("the lazy dog", add_special_tokens=False).ids
    assert tuned_one.encode("the lazy dog").ids == by_model.encode("the lazy dog").ids == [0, *plain]
    document = result.corpus.train.tokens[: result.corpus.train.offsets[1]].tolist()
    assert tuned_one.encode(tuned_one.decode(document)).ids == document[:-1]


def test_training_goes_on_from_an_imported_checkpoint(run_on_a_mesh, tuned, tmp_path):
    """Exported, imported, and trained on, by its tokenizer: the first step starts at the weights that the run ended with."""
    ckpt, result, overrides = tuned
    data = load_config(run_on_a_mesh / "config.yaml").data
    done = command("eval", str(ckpt), "--data", data.path, cwd=ROOT)  # by the tokenizer that came along
    assert done.returncode == 0, done.stderr
    expected = dsv3_process("eval", str(run_on_a_mesh), "--data", data.path, cwd=ROOT)
    assert json.loads(done.stdout)["loss"] == pytest.approx(json.loads(expected.stdout)["loss"], rel=1e-6)
    assert result.corpus.tokenizer.get_vocab() == Tokenizer.from_file(str(run_on_a_mesh / "tokenizer.json")).get_vocab()
    before, after = dsv3.load(run_on_a_mesh), dsv3.load(result.run.path)
    before, after = (jax.device_get(nnx.to_pure_dict(nnx.state(model, nnx.Param))) for model in (before, after))
    chex.assert_trees_all_close(before, after, rtol=1e-7, atol=1e-6)
    for bad, text in (
        (["model.hidden_size=64"], r"model.hidden_size=64, and train.init_from=.* has 32"),
        ([f"train.init_from={tmp_path}/nothing"], "does not exist"),
    ):
        with pytest.raises(UserError, match=text):
            train(load_config(ckpt / "config.yaml", [*overrides, "name=other", *bad]), tmp_path)
    (ckpt / "tokenizer.json").rename(tmp_path / "away.json")
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        train(load_config(ckpt / "config.yaml", [*overrides, "name=other"]), tmp_path)
    (tmp_path / "away.json").rename(ckpt / "tokenizer.json")
    assert not (tmp_path / "other").exists()
