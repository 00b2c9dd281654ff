"""Whose a run's folder is: which keys may change when a run goes on."""

from pathlib import Path

import pytest

from dsv3_jax.config import config_to_yaml, load_config
from dsv3_jax.errors import UserError
from dsv3_jax.runs.directory import RunDirectory
from tests.conftest import ROOT

TINY = ROOT / "configs" / "tiny.yaml"


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    (tmp_path / "config.yaml").write_text(config_to_yaml(load_config(TINY)))
    return RunDirectory(tmp_path)


@pytest.mark.parametrize(
    "override",
    ["train.steps=9", "train.eval_every=7", "train.grad_accum_steps=2", "parallel.fsdp=2", "remat.policy=full",
     "checkpoint.every_steps=3", "data.cache_dir=elsewhere"],
)  # fmt: skip
def test_how_long_where_and_how_often_may_change(run, override):
    run.check_belongs_to(load_config(TINY, [override]))


@pytest.mark.parametrize(
    "override",
    ["train.seed=1", "model.hidden_size=256", "data.batch_size=4", "data.seq_len=64", "optim.lr=0.1", "precision.recipe=bf16",
     "parallel.compress=2", "parallel.compress_after=3", "train.mtp_switch_step=1"],
)  # fmt: skip
def test_what_a_step_computes_may_not(run, override):
    with pytest.raises(UserError, match=f"belongs to another config: {override.split('=')[0]} was"):
        run.check_belongs_to(load_config(TINY, [override]))
