"""Whether a run may go on by a configuration: which keys may change, and what a folder that somebody has edited says."""

import json
from pathlib import Path

import pytest

from dsv3_jax.checkpoint.manifest import write_manifest
from dsv3_jax.config import Config, config_to_dict, config_to_yaml, load_config
from dsv3_jax.errors import UserError
from dsv3_jax.runs.compatible import check_compatible
from dsv3_jax.runs.directory import RunDirectory
from dsv3_jax.runs.events import EventLog
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
    check_compatible(run, load_config(TINY, [override]))


@pytest.mark.parametrize(
    "override",
    ["train.seed=1", "model.hidden_size=256", "data.batch_size=4", "data.seq_len=64", "optim.lr=0.1", "precision.recipe=bf16",
     "parallel.compress=2", "parallel.compress=auto", "data.tokenizer=other.json",
     "parallel.compress_after=3", "train.mtp_switch_step=1"],
)  # fmt: skip
def test_what_a_step_computes_may_not(run, override):
    with pytest.raises(UserError, match=f"belongs to another config: {override.split('=')[0]} was"):
        check_compatible(run, load_config(TINY, [override]))


def test_what_auto_means_is_not_compared(tmp_path):
    """A run that asked for it goes on by asking for it, whatever it is on other devices."""
    asked = load_config(TINY, ["parallel.compress=auto", "precision.recipe=auto"])
    run = RunDirectory(tmp_path / "run")
    run.create(asked, None, {})
    check_compatible(run, asked)
    with pytest.raises(UserError, match=r"parallel\.compress was 'auto', now 0"):
        check_compatible(run, load_config(TINY, ["precision.recipe=auto"]))


def save(run: RunDirectory, step: int, config: Config) -> Path:
    """A checkpoint without arrays, as far as a comparison reads it."""
    directory = run.checkpoints / str(step)
    directory.mkdir(parents=True)
    metadata = {"custom_metadata": {"config": config_to_dict(config), "step": step}}
    (directory / "_CHECKPOINT_METADATA").write_text(json.dumps(metadata))
    write_manifest(directory)
    return directory


def edit(run: RunDirectory, *overrides: str) -> None:
    run.config_file.write_text(config_to_yaml(load_config(run.config_file, overrides)))


def test_a_config_that_was_edited_is_refused_by_its_keys(run):
    config = load_config(TINY)
    saved = save(run, 4, config)
    assert check_compatible(run, config) == 4
    edit(run, "optim.beta2=0.5", "model.hidden_size=64")
    for asked in (config, run.config()):  # `dsv3 train` again, and `dsv3 resume`
        with pytest.raises(UserError) as error:
            check_compatible(run, asked)
        assert str(error.value) == (
            f"{run.config_file} is not what {saved} was trained with: model.hidden_size is 64 in the file, 128 in the "
            "checkpoint, optim.beta2 is 0.5 in the file, 0.95 in the checkpoint; put back what the checkpoint has, or begin a "
            f"run of another name: dsv3 train {run.config_file} name=..."
        )


@pytest.mark.parametrize(
    "override",
    ["train.steps=700", "name=other", "precision.recipe=auto", "parallel.fsdp=2", "parallel.compress=auto",
     "remat.policy=sqrt"],
)  # fmt: skip
def test_what_may_change_may_be_edited(run, override):
    """And `auto` is not compared with what a checkpoint says it was."""
    save(run, 4, load_config(TINY))
    edit(run, override)
    assert check_compatible(run, run.config()) == 4


def test_what_auto_was_is_kept_where_somebody_writes_it_out(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.create(load_config(TINY, ["precision.recipe=auto"]), None, {})
    save(run, 4, load_config(TINY, ["precision.recipe=bf16"]))
    edit(run, "precision.recipe=bf16")
    assert check_compatible(run, run.config()) == 4
    edit(run, "precision.recipe=float32")
    with pytest.raises(UserError, match=r"precision\.recipe is 'float32' in the file, 'bf16' in the checkpoint"):
        check_compatible(run, run.config())


def test_a_key_that_is_missing_has_no_default(run):
    save(run, 4, load_config(TINY))
    run.config_file.write_text(run.config_file.read_text().replace("  keep: 3\n", ""))
    with pytest.raises(UserError, match=r"config\.yaml is incomplete: it has no checkpoint\.keep; put it back from a copy"):
        check_compatible(run, run.config())


def test_an_earlier_version_s_checkpoint_lacks_keys_that_are_new(run):
    stored = config_to_dict(load_config(TINY))
    del stored["precision"]["controller"]
    saved = save(run, 4, load_config(TINY))
    (saved / "_CHECKPOINT_METADATA").write_text(json.dumps({"custom_metadata": {"config": stored, "step": 4}}))
    write_manifest(saved)
    assert check_compatible(run, run.config()) == 4


def test_a_damaged_checkpoint_s_configuration_is_not_believed(run):
    config = load_config(TINY)
    save(run, 2, config)
    metadata = save(run, 4, config) / "_CHECKPOINT_METADATA"
    metadata.write_text(metadata.read_text().replace('"beta2": 0.95', '"beta2": 0.85'))
    assert check_compatible(run, config) == 4


def test_a_run_whose_config_was_removed_is_known_by_its_checkpoint(run):
    save(run, 4, load_config(TINY))
    run.config_file.unlink()
    assert check_compatible(run, load_config(TINY)) == 4
    with pytest.raises(UserError, match=r"another config: optim\.beta1 was 0\.9, now 0\.5, optim\.beta2 was 0\.95, now"):
        check_compatible(run, load_config(TINY, ["optim.beta1=0.5", "optim.beta2=0.5"]))


STARTED, SAVED, ENDED = {"event": "started"}, {"event": "saved", "step": 2}, {"event": "ended", "step": 3}


@pytest.mark.parametrize(
    "events",
    [[STARTED, SAVED, ENDED], [STARTED, SAVED, SAVED], [{"event": "restored", "step": 2}], [STARTED, SAVED, "no folder"]],
    ids=["ended", "saved again", "restored", "no folder"],
)
def test_checkpoints_that_are_gone_are_missed(run, events):
    """A save was complete if the run waited for it: before the next one, and at its end."""
    log = EventLog(run.events_file)
    run.checkpoints.mkdir()
    for event in events:
        run.checkpoints.rmdir() if event == "no folder" else log.write(**event)
    assert check_compatible(run, run.config()) == 0  # and nothing is lost
    run.metrics_file.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)))
    with pytest.raises(UserError, match=r"metrics\.jsonl has 3 steps but there is no checkpoint in .*, where there was one"):
        check_compatible(run, run.config())


@pytest.mark.parametrize("events", [[], [STARTED], [STARTED, SAVED], [STARTED, SAVED, STARTED, SAVED], [STARTED, ENDED]])
def test_a_run_that_ended_before_its_first_checkpoint_begins_anew(run, events):
    """Also one that was ended, or had no room, while it wrote it."""
    run.checkpoints.mkdir()
    for event in events:
        EventLog(run.events_file).write(**event)
    run.metrics_file.write_text('{"step": 1}\n')
    assert check_compatible(run, run.config()) == 0
