"""The folder of a run: paths that it keeps, and its config.yaml."""

import pytest

from dsv3_jax.config import load_config
from dsv3_jax.errors import UserError
from dsv3_jax.runs.compatible import check_compatible
from dsv3_jax.runs.directory import RunDirectory, with_absolute_paths
from tests.conftest import ROOT

TINY = ROOT / "configs" / "tiny.yaml"


def test_paths_are_kept_so_that_other_working_directories_find_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = ["data.path=texts/*.txt, more/a.jsonl", "data.tokenizer=t.json", "data.cache_dir=cache", "train.init_from=ckpt"]
    found = with_absolute_paths(load_config(TINY, [*paths, "checkpoint.local_dir=$SCRATCH/x"]))
    assert found.data.path == f"{tmp_path}/texts/*.txt,{tmp_path}/more/a.jsonl"
    assert (found.data.tokenizer, found.data.cache_dir) == (f"{tmp_path}/t.json", f"{tmp_path}/cache")
    assert found.train.init_from == f"{tmp_path}/ckpt"
    assert found.checkpoint.local_dir == "$SCRATCH/x"
    nothing = load_config(TINY)
    assert with_absolute_paths(nothing) == nothing
    run = RunDirectory(tmp_path / "run")
    run.create(load_config(TINY, ["data.tokenizer=t.json"]), None, {})  # as the version before kept it
    check_compatible(run, load_config(TINY, [f"data.tokenizer={tmp_path}/t.json"]))


@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        (lambda text: "", "is empty; put it back from a copy, or remove it"),
        (lambda text: text[: text.index("data:")], "is incomplete: it has no data, optim, train, parallel, precision, remat"),
        (lambda text: text[: text.index("checkpoint:") + 11], "is incomplete: it has no checkpoint; put it back"),
    ],
    ids=["empty", "after the model", "in the last section"],
)
def test_a_configuration_that_was_cut_off_is_refused(tmp_path, cut, expected):
    """Whether the run is named or asked for by its configuration; what is missing has no default."""
    run = RunDirectory(tmp_path / "run")
    run.create(load_config(TINY), None, {})
    assert run.config(["train.steps=7"]) == load_config(TINY, ["train.steps=7"])
    run.config_file.write_text(cut(run.config_file.read_text()))
    for read in (run.config, lambda: check_compatible(run, load_config(TINY))):
        with pytest.raises(UserError) as error:
            read()
        assert f"{run.config_file} {expected}" in str(error.value)
    run.config_file.unlink()
    with pytest.raises(UserError, match="is no run: it has no config"):
        run.config()


@pytest.mark.parametrize("folder", ["checkpoints", "tensorboard", "logs"])
def test_a_file_in_a_folder_s_place_is_named(tmp_path, folder):
    run = RunDirectory(tmp_path / "run")
    run.create(load_config(TINY), None, {})
    (run.path / folder).write_text("mine")
    with pytest.raises(UserError, match=f"{folder} is not a directory, in which the run would write: move it away"):
        check_compatible(run, load_config(TINY))
