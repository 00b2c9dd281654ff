"""Directories that are no checkpoint, or a stranger's: one line says what they are; nothing outside of them is read."""

import contextlib
import json
import os

import numpy as np
import pytest

from dsv3_jax.data.companions import read_companion, read_companions
from dsv3_jax.errors import UserError
from dsv3_jax.interop.hf_export import export
from dsv3_jax.interop.hf_files import open_hf
from dsv3_jax.interop.hf_import import import_hf
from dsv3_jax.interop.hf_plan import plan_import, show_plan
from dsv3_jax.interop.safetensors_file import write_safetensors
from dsv3_jax.progress import make_console
from tests.commands import dsv3 as command
from tests.interop.cases import BF16, write
from tests.interop.test_released import bf16_tensors, config_json

INDEX = "model.safetensors.index.json"


def shards(directory, tensors, config) -> None:
    """Three files and their index."""
    names = sorted(tensors)
    write(directory, {}, config)
    (directory / "model.safetensors").unlink()
    files = {}
    for i in range(3):
        part = {name: tensors[name] for name in names[i::3]}
        file = f"model-{i + 1:05d}-of-00003.safetensors"
        write_safetensors(directory / file, {n: (t.dtype, t.shape) for n, t in part.items()}, part.__getitem__)
        files |= dict.fromkeys(part, file)
    (directory / INDEX).write_text(json.dumps({"weight_map": files}))


def with_lfs(directory):
    (directory / "model-00002-of-00003.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def with_other(name, content):
    def change(directory):
        tensors = bf16_tensors() | {name: content}
        shards(directory, tensors, config_json())

    return change


NORM = "model.layers.0.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda d: (d / "model-00002-of-00003.safetensors").unlink(), "has 2 of the 3 files of " + INDEX),
        (with_lfs, "model-00002-of-00003.safetensors is a git-lfs pointer"),
        (lambda d: (d / INDEX).unlink(), "and 3 files such as model-00001-of-00003.safetensors: fetch what belongs to them"),
        (with_other(NORM, np.ones(143, BF16)), f"tensor {NORM} has shape [143]; config.json implies [144]"),
        (with_other(NORM, np.ones(144, np.int8)), f"tensor {NORM} has dtype I8; use one of F32, BF16, F16, F64"),
        (with_other("lm_head.weight", np.ones((40, 144), "float8_e4m3fn")), "lm_head.weight is in 8 bits, and config.json"),
        (with_other("lm_head.weight", np.ones((40, 144), np.float32)), "BF16, and lm_head.weight, which it repeats, F32"),
        (lambda d: (d / "tokenizer_config.json").write_text("{"), "tokenizer_config.json: it is not valid JSON"),
        (lambda d: (d / "tokenizer.json").symlink_to("/dev/null"), "tokenizer.json links to /dev/null, outside"),
        (lambda d: (d / "config.json").write_text("version https://git-lfs.github.com/spec/v1\n"), "config.json is a git-lfs"),
        (lambda d: (d / INDEX).write_text("version https://git-lfs.github.com/spec/v1\n"), INDEX + " is a git-lfs pointer"),
    ],
    ids=["shard", "lfs", "index", "shape", "dtype", "fp8", "copy", "companion", "tokenizer", "lfs config", "lfs index"],
)  # fmt: skip
def test_a_plan_refuses_what_an_import_does(change, expected, tmp_path):
    shards(tmp_path / "hf", bf16_tensors(), config_json())
    change(tmp_path / "hf")
    for options in (["--plan", str(tmp_path / "hf")], [str(tmp_path / "hf"), str(tmp_path / "ckpt")]):
        done = command("import", *options, cwd=tmp_path)
        assert done.returncode == 2
        assert expected in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_a_plan_with_some_files_shows_what_it_can(tmp_path, capsys):
    """The table first: which files are missing does not change it. With none at all, it says what the figures are from."""
    shards(tmp_path, bf16_tensors(), config_json())
    (tmp_path / "model-00001-of-00003.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"has 2 of the 3 files of .*: model-00001-of-00003\.safetensors is missing, with tensor"
    ):
        show_plan(plan_import(tmp_path), make_console())
    assert "arrays:" in capsys.readouterr().out
    for i in (2, 3):
        (tmp_path / f"model-{i:05d}-of-00003.safetensors").unlink()
    show_plan(plan_import(tmp_path), make_console())
    assert "no file with weights is here: shapes and dtypes are those that config.json implies" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            ["adapter_config.json", "adapter_model.safetensors"],
            "holds an adapter (adapter_config.json); merge it into its base",
        ),
        (["config.json", "adapter_model.safetensors"], "holds an adapter (adapter_model.safetensors)"),
        (["refs/main", "snapshots/abc/config.json"], "is a model's folder in the hub's cache; give its snapshot: "),
        (["models--a--b/refs/main"], "is the hub's cache; give a snapshot in it: "),
        (["config.json", "pytorch_model-00001-of-00002.bin"], "and weights as pytorch_model-00001-of-00002.bin, which are not"),
        (["config.json", "model.gguf"], "and weights as model.gguf, which are not read: convert them to safetensors"),
        (["config.json"], "has neither model.safetensors nor " + INDEX),
        (["README.md"], "has no config.json"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_directories_of_other_kinds_are_named(files, expected, tmp_path):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(config_json()) if name == "config.json" else "{}")
    for read in (open_hf, plan_import):
        with pytest.raises(UserError) as error:
            read(tmp_path)
        assert expected in str(error.value)


def test_what_is_no_directory(tmp_path):
    (tmp_path / "file").touch()
    for name, expected in (("none", "does not exist"), ("file", "is a file; give the directory")):
        with pytest.raises(UserError, match=expected):
            open_hf(tmp_path / name)


def fill(directory):
    return write(directory, bf16_tensors(), config_json())


def make_large(path):
    path.touch()
    os.truncate(path, 2**40)


def linked(directory, name, target):
    (directory / name).symlink_to(target)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("name", "make", "expected"),
    [
        ("chat_template.jinja", lambda p: p.symlink_to("../private/key"), "outside of the checkpoint"),
        ("tokenizer_config.json", lambda p: p.symlink_to("/etc/passwd"), "outside of the checkpoint"),
        ("chat_template.jinja", lambda p: p.symlink_to("/dev/zero"), "outside of the checkpoint"),
        ("chat_template.jinja", lambda p: p.symlink_to("chat_template.jinja"), "cannot read"),
        ("chat_template.jinja", os.mkfifo, "no regular file"),
        ("chat_template.jinja", lambda p: p.write_bytes(b"version https://git-lfs.github.com/spec/v1"), "git-lfs pointer"),
        ("generation_config.json", lambda p: p.write_text("{"), "not valid JSON"),
        ("special_tokens_map.json", lambda p: p.write_text('{"a":' * 10**5), "nested too deeply"),
        ("tokenizer_config.json", make_large, "at most 67,108,864 are expected"),
    ],
    ids=["key", "passwd", "zero", "loop", "pipe", "lfs", "json", "deep", "large"],
)
def test_companions_are_small_regular_files_of_the_checkpoint(name, make, expected, tmp_path):
    """An export would republish whatever they lead to. Nothing is written."""
    (tmp_path / "private").mkdir()
    (tmp_path / "private/key").write_text("secret")
    make(fill(tmp_path / "hf") / name)
    with pytest.raises(UserError) as error:
        import_hf(tmp_path / "hf", tmp_path / "ckpt")
    assert expected in str(error.value)
    assert str(tmp_path / "hf" / name) in str(error.value)
    assert not [p for p in tmp_path.iterdir() if p.name not in ("private", "hf")]


def test_links_within_the_checkpoint_and_in_the_hubs_cache_are_followed(tmp_path):
    root = tmp_path / "models--a--b"
    (root / "blobs").mkdir(parents=True)
    (root / "blobs/12ab").write_text("{{ messages }}")
    snapshot = fill(root / "snapshots/abc")
    (snapshot / "model.safetensors").rename(root / "blobs/34cd")
    linked(snapshot, "model.safetensors", "../../blobs/34cd")
    linked(snapshot, "chat_template.jinja", "../../blobs/12ab")
    (snapshot / "real.json").write_text("{}")
    linked(snapshot, "generation_config.json", "real.json")
    (tmp_path / "link").symlink_to(snapshot)
    import_hf(tmp_path / "link", tmp_path / "ckpt")
    export(tmp_path / "ckpt", tmp_path / "out", "hf-bf16")
    assert (tmp_path / "out/chat_template.jinja").read_text() == "{{ messages }}"
    assert not (tmp_path / "out/chat_template.jinja").is_symlink()
    assert read_companion(snapshot, "generation_config.json") == b"{}"
    # elsewhere, a folder `blobs` two levels above is nobody's cache
    (tmp_path / "x/blobs").mkdir(parents=True)
    (tmp_path / "x/blobs/key").write_text("secret")
    fill(tmp_path / "x/y/hf")
    linked(tmp_path / "x/y/hf", "chat_template.jinja", "../../blobs/key")
    with pytest.raises(UserError, match="outside of the checkpoint"):
        read_companions(tmp_path / "x/y/hf")


@pytest.mark.timeout(60)
def test_weights_are_regular_files(tmp_path):
    fill(tmp_path / "hf")
    (tmp_path / "hf/model.safetensors").unlink()
    os.mkfifo(tmp_path / "hf/model.safetensors")
    for read in (open_hf, plan_import):
        with pytest.raises(UserError, match=r"model\.safetensors: it is no regular file"):
            read(tmp_path / "hf")


HUGE = [10**9, 10**18, 10**400]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("size", HUGE, ids=["1e9", "1e18", "1e400"])
def test_hostile_sizes_cost_nothing(size, tmp_path):
    """Every size of config.json, with files and with an index alone: one short line, after a bounded number of steps."""
    sizes = [name for name, value in config_json().items() if type(value) is int and name not in ("ep_size", "moe_layer_freq")]
    assert {"num_hidden_layers", "n_routed_experts", "num_nextn_predict_layers", "vocab_size"} <= set(sizes)
    tensors = bf16_tensors()
    write(tmp_path / "files", tensors, {})
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "a.safetensors")}))
    passed = set()
    for name in {*sizes, "q_lora_rank"}:
        config = config_json(**{name: size}) | ({"num_key_value_heads": size} if name == "num_attention_heads" else {})
        for directory, read in (("files", open_hf), ("index", plan_import)):
            (tmp_path / directory / "config.json").write_text(json.dumps(config))
            with contextlib.suppress(UserError):
                read(tmp_path / directory)
                passed.add((read, name))
    # a plan may still print what is missing, or what an index alone implies
    assert {name for read, name in passed if read is open_hf} <= {"max_position_embeddings"}


def test_hostile_numbers_elsewhere(tmp_path):
    tensors = bf16_tensors()
    for fields in (
        {"rope_theta": 10**400},
        {"rope_scaling": {"type": "yarn", "factor": 10**400}},
        {"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 10**400}},
        {"routed_scaling_factor": 10**400},
        {"rms_norm_eps": 10**400},
        {"rope_scaling": {"type": ["yarn"]}},
        {"rope_scaling": {"type": "x" * 10**6}},
        {"model_type": "x" * 10**6},
        {"x" * 10**6: 1},
        {"hidden_act": "x" * 10**6},
    ):
        with pytest.raises(UserError) as error:
            open_hf(write(tmp_path / "hf", tensors, config_json(**fields)))
        assert len(str(error.value)) < 400 + len(str(tmp_path)), fields.keys()
    (tmp_path / "hf/config.json").write_text('{"a":' * 10**5)
    with pytest.raises(UserError, match="nested too deeply"):
        open_hf(tmp_path / "hf")


def test_names_in_an_index_are_names_of_files_beside_it(tmp_path):
    tensors = bf16_tensors()
    write(tmp_path, tensors, config_json())
    (tmp_path / "model.safetensors").unlink()
    for file, expected in (
        ("../model.safetensors", "must be a plain file name"),
        ("/etc/passwd", "must be a plain file name"),
        ("..", "must be a plain file name"),
        (7, "must be a plain file name"),
        ("x" * 10**5, "is missing"),
        ("\0", "is missing"),
        ("\ud800", "is missing"),
    ):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, file)}))
        with pytest.raises(UserError, match=expected):
            open_hf(tmp_path)
    for content in ("[]", '{"weight_map": []}', "{}"):
        (tmp_path / INDEX).write_text(content)
        for read in (open_hf, plan_import):
            with pytest.raises(UserError, match="object"):
                read(tmp_path)
