"""A run's own tokenizer and corpus: what goes on, what is refused, and what is accepted by name."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from dsv3_jax.config import Config, load_config
from dsv3_jax.data.tokenizer import tokenizer_hash
from dsv3_jax.errors import UserError
from dsv3_jax.runs.directory import RunDirectory
from dsv3_jax.training import corpus as run_corpus
from dsv3_jax.training.corpus import RunCorpus, load_run_corpus
from tests.conftest import ROOT


@pytest.fixture
def config(corpus_dir, tmp_path) -> Config:
    shutil.copytree(corpus_dir, tmp_path / "texts")
    return load_config(
        ROOT / "configs" / "tiny.yaml",
        ["model.vocab_size=300", f"data.path={tmp_path}/texts/*.txt", f"data.cache_dir={tmp_path}/cache"],
    )


@pytest.fixture
def run(config, tmp_path) -> tuple[RunDirectory, dict]:
    """A run that has begun, and the metadata of its checkpoint."""
    directory = RunDirectory(tmp_path / "run")
    first = load_run_corpus(config, directory, None, None, {})
    directory.create(config, first.corpus.tokenizer, {})
    metadata = {"config": {"data": {"path": config.data.path}}, "corpus": first.record}
    return directory, json.loads(json.dumps(metadata))  # as it comes out of a checkpoint


def change(config: Config) -> None:
    """Other words, of which a new tokenizer would be another one."""
    for i in range(20):
        (Path(config.data.path or "").parent / f"new{i}.txt").write_text("xylophone zebra quartz " * 50)


def load(config: Config, run, allow_changed: bool = False) -> RunCorpus:
    directory, earlier = run
    return load_run_corpus(config, directory, earlier, None, {}, allow_changed)


def test_a_run_goes_on_with_its_corpus_wherever_that_lies(config, run, tmp_path):
    shutil.move(tmp_path / "texts", tmp_path / "moved")
    found = load(replace(config, data=replace(config.data, path=f"{tmp_path}/moved/*.txt")), run)
    assert (found.changed, found.own_tokenizer) == ("", True)
    assert found.record == run[1]["corpus"]


def test_a_changed_corpus_is_refused_or_accepted_by_name(config, run):
    before = tokenizer_hash(load(config, run).corpus.tokenizer)
    change(config)
    with pytest.raises(UserError, match=r"not the one that .*run was trained on: new: new0\.txt, .* and 17 more; 200 files of"):
        load(config, run)
    found = load(config, run, allow_changed=True)
    assert found.changed.startswith("new: new0.txt")
    assert tokenizer_hash(found.corpus.tokenizer) == before
    assert len(found.corpus.train) + len(found.corpus.validation) == 220
    assert found.record["digest"] != run[1]["corpus"]["digest"]
    assert found.record["tokenizer"] == run[1]["corpus"]["tokenizer"]
    load(config, (run[0], {**run[1], "corpus": found.record}))  # the next start needs no permission


def test_a_fresh_start_takes_a_tokenizer_for_what_is_there_now(config, run):
    change(config)
    found = load_run_corpus(config, run[0], None, None, {})
    assert not found.own_tokenizer
    assert found.record["tokenizer"] != run[1]["corpus"]["tokenizer"]


@pytest.mark.parametrize("how", ["changed", "gone"])
def test_another_tokenizer_is_never_taken(config, run, how):
    """Not even where the corpus may change: the weights know the old tokens."""
    change(config)
    run[0].tokenizer_file.unlink()
    if how == "changed":
        other = load_run_corpus(config, run[0], None, None, {}).corpus.tokenizer
        run[0].tokenizer_file.write_text(other.to_str())
    with pytest.raises(UserError, match=rf"tokenizer\.json is {'not' if how == 'changed' else 'gone'}.*put that one back"):
        load(config, run, allow_changed=True)


def test_a_lost_tokenizer_that_follows_from_the_corpus_is_made_again(config, run):
    run[0].tokenizer_file.unlink()
    found = load(config, run)
    assert not found.own_tokenizer
    assert found.record == run[1]["corpus"]


def test_runs_of_the_version_before_go_on(config, run, tmp_path, monkeypatch):
    """Their checkpoints know the path and no fingerprint; the tokenizer in their directory is theirs."""
    monkeypatch.chdir(tmp_path)
    old = run[0], {"config": {"data": {"path": "texts/*.txt"}}}
    assert load(config, old).record == run[1]["corpus"]
    elsewhere = replace(config, data=replace(config.data, path=f"{tmp_path}/texts/0*.txt"))
    with pytest.raises(UserError, match=r"data\.path was .*texts/\*\.txt, now .*texts/0\*\.txt; .*allow_changed"):
        load(elsewhere, old)
    assert "now" in load(elsewhere, old, allow_changed=True).changed
    with pytest.raises(UserError, match=r"data\.validation_path was None, now .*texts/00\*\.txt;"):
        load(replace(config, data=replace(config.data, validation_path=f"{tmp_path}/texts/00*.txt")), old)
    change(config)
    assert load(config, old).record["tokenizer"] == run[1]["corpus"]["tokenizer"]


@pytest.mark.parametrize("what", ["data.path: the corpus", "data.tokenizer: the tokenizer"])
def test_hosts_with_other_files_are_refused(config, run, monkeypatch, what):
    asked = iter(("data.path: the corpus", "data.tokenizer: the tokenizer"))
    monkeypatch.setattr(run_corpus, "equals_first", lambda _: next(asked) != what)
    with pytest.raises(UserError, match=f"{what} of process 0 on .* is not that of process 0: every host"):
        load(config, run)
