"""Whose a run's folder is: which keys may change when a run goes on."""

from pathlib import Path

import pytest

from dsv3_jax.config import config_to_yaml, load_config
from dsv3_jax.errors import UserError
from dsv3_jax.runs.directory import RunDirectory, with_absolute_paths
from tests.conftest import ROOT

TINY = ROOT / "configs" / "tiny.yaml"


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    (tmp_path / "config.yaml").write_text(config_to_yaml(load_config(TINY)))
    return RunDirectory(tmp_path)


@pytest.mark.parametrize(
    "override",
    ["train.steps=9", "train.eval_every=7", "train.grad_accum_steps=2", "parallel.fsdp=2", "remat.policy=full",
     "checkpoint.every_steps=3", "data.cache_dir=elsewhere", "name=copied", "data.path=elsewhere/*.txt",
     "precision.recipe=auto"],
)  # fmt: skip
def test_how_long_where_and_how_often_may_change(run, override):
    run.check_belongs_to(load_config(TINY, [override]))


@pytest.mark.parametrize(
    "override",
    ["train.seed=1", "model.hidden_size=256", "data.batch_size=4", "data.seq_len=64", "optim.lr=0.1", "precision.recipe=bf16",
     "parallel.compress=2", "parallel.compress=auto", "data.tokenizer=other.json",
     "parallel.compress_after=3", "train.mtp_switch_step=1"],
)  # fmt: skip
def test_what_a_step_computes_may_not(run, override):
    with pytest.raises(UserError, match=f"belongs to another config: {override.split('=')[0]} was"):
        run.check_belongs_to(load_config(TINY, [override]))


def test_what_auto_means_is_not_compared(tmp_path):
    """A run that asked for it goes on by asking for it, whatever it is on other devices."""
    asked = load_config(TINY, ["parallel.compress=auto", "precision.recipe=auto"])
    run = RunDirectory(tmp_path / "run")
    run.create(asked, None, {})
    run.check_belongs_to(asked)
    with pytest.raises(UserError, match=r"parallel\.compress was 'auto', now 0"):
        run.check_belongs_to(load_config(TINY, ["precision.recipe=auto"]))


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
    run.check_belongs_to(load_config(TINY, [f"data.tokenizer={tmp_path}/t.json"]))
