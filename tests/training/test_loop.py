"""Whole runs: exact resume, signals, divergence, foreign directories, damaged checkpoints, full disks, reports."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import chex
import jax
import numpy as np
import pytest

import dsv3_jax as dsv3
from dsv3_jax.checkpoint import storage
from dsv3_jax.checkpoint.load import open_checkpoint
from dsv3_jax.checkpoint.retention import complete_steps
from dsv3_jax.cli import main
from dsv3_jax.config import DataConfig, config_to_yaml, load_config
from dsv3_jax.errors import UserError
from dsv3_jax.interop.hf_export import export
from dsv3_jax.runs.directory import RunDirectory
from dsv3_jax.runs.events import EventLog
from dsv3_jax.runs.goodput import RunningAccount, read_events
from dsv3_jax.runs.metrics import MetricsWriter, read_rows
from dsv3_jax.training import evaluate, start, watchdog
from dsv3_jax.training.finish import finish
from dsv3_jax.training.loop import train
from tests.commands import dsv3 as dsv3_command

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"
COMMAND = str(Path(sys.executable).with_name("dsv3"))
REQUIRED = {"step", "loss", "grad_norm", "lr", "tokens", "tokens_per_s", "step_time_s", "goodput"}


def rows_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def without_clock(rows: list[dict]) -> list[dict]:
    timed = ("tokens_per_s", "step_time_s", "time", "goodput")
    return [{k: v for k, v in row.items() if k not in timed and not k.startswith("lost_")} for row in rows]


def assert_same_state(a, b):
    chex.assert_trees_all_equal(jax.device_get(a), jax.device_get(b))


@pytest.fixture
def config_with(micro_overrides):
    return lambda *extra: load_config(TINY, [*micro_overrides, *extra])


@pytest.fixture(scope="module")
def trained_once(micro_overrides_in, tmp_path_factory) -> tuple[Path, list[str]]:
    """A run of two steps with a checkpoint of each, and its overrides; not to be changed."""
    root = tmp_path_factory.mktemp("finished")
    overrides = [*micro_overrides_in(root), "name=a", "train.steps=2", "checkpoint.every_steps=1"]
    train(load_config(TINY, overrides), root)
    return root / "a", overrides


@pytest.fixture
def finished_run(trained_once, tmp_path) -> Path:
    """A copy of it."""
    return shutil.copytree(trained_once[0], tmp_path / "a")


def test_a_run_and_its_bit_for_bit_resume(config_with, tmp_path, capsys):
    options = ("optim.ema_decay=0.9", "train.grad_accum_steps=2", "model.num_nextn_predict_layers=1")
    whole = train(config_with("name=whole", *options), tmp_path)
    rows = rows_of(tmp_path / "whole")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert set(rows[0]) >= REQUIRED
    assert [row["tokens"] for row in rows[:2]] == [128, 256]
    assert "eval_loss" in rows[2]
    assert "eval_loss_ema" in rows[5]

    train(config_with("name=parts", *options, "train.steps=3"), tmp_path)
    parts = train(config_with("name=parts", *options), tmp_path)
    assert "resuming" in capsys.readouterr().out
    assert_same_state(whole.state, parts.state)
    assert without_clock(rows_of(tmp_path / "parts")) == without_clock(rows)

    finish(whole)
    report = json.loads((tmp_path / "whole" / "report.json").read_text())
    assert 0 < report["gzip_9_bits_per_byte"] < 8
    assert report["bits_per_byte"] > 0
    assert (tmp_path / "whole" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "whole" / "sample.txt").read_text()
    assert list((tmp_path / "whole" / "tensorboard").iterdir())

    model = dsv3.load(tmp_path / "whole")
    ids = np.arange(10)[None]
    np.testing.assert_array_equal(model(ids), dsv3.load(tmp_path / "whole" / "checkpoints" / "6")(ids))


@pytest.mark.slow
def test_a_precision_schedule_loses_no_state_and_resumes(config_with, tmp_path):
    """The first steps are those of a run in the first recipe alone; a run cut off at the switch goes on bit for bit."""
    small = ["model.num_hidden_layers=2", "train.eval_every=6"]
    small.append("optim.moment_dtype=float32")  # else a run stores moments as its last recipe says, and `alone` has another
    schedule = [*small, "precision.first_recipe=bf16", "precision.first_steps=3", "precision.recipe=deepseek"]
    train(config_with("name=whole", *schedule), tmp_path)
    train(config_with("name=parts", *schedule, "train.steps=3"), tmp_path)
    train(config_with("name=parts", *schedule), tmp_path)
    train(config_with("name=alone", *small, "precision.recipe=bf16"), tmp_path)
    whole, parts, alone = (
        [row["loss"] for row in rows_of(tmp_path / name) if "loss" in row] for name in ("whole", "parts", "alone")
    )
    assert whole == parts
    assert whole[:3] == alone[:3]
    assert whole[3:] != alone[3:]


def test_a_checkpoint_s_event_says_what_its_steps_took(finished_run):
    """So that a start need not read all rows; this one reads what follows the checkpoint alone, to the same end."""
    run = RunDirectory(finished_run)
    rows = read_rows(run.metrics_file)
    saved = {e["step"]: e["steps_s"] for e in read_events(run) if e["event"] == "saved"}
    seconds = [row["step_time_s"] for row in rows]
    assert saved == {1: pytest.approx(seconds[0], abs=1e-3), 2: pytest.approx(sum(seconds), abs=1e-3)}
    assert RunningAccount(run, 2).steps_s == saved[2]


def test_another_config_or_a_foreign_directory_is_refused(config_with, trained_once, finished_run, tmp_path):
    before = sorted(p for p in (tmp_path / "a").rglob("*"))
    with pytest.raises(UserError, match=r"belongs to another config: optim\.lr was 0\.003, now 0\.5"):
        train(load_config(TINY, [*trained_once[1], "optim.lr=0.5"]), tmp_path)
    assert sorted(p for p in (tmp_path / "a").rglob("*")) == before
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="is no run"):
        train(config_with("name=b"), tmp_path)
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["thesis.tex"]


def test_a_changed_corpus_is_accepted_once_and_by_name(trained_once, finished_run, corpus_dir, tmp_path, capsys):
    """Nothing is left to train, so that only the start is made; a refused one changes nothing."""
    files = {p: p.read_bytes() for p in finished_run.rglob("*") if p.is_file()}
    shutil.copytree(corpus_dir, tmp_path / "texts")
    moved = [*trained_once[1], f"data.path={tmp_path}/texts/*.txt"]
    for i in range(9):
        (tmp_path / "texts" / f"new{i}.txt").write_text("xylophone zebra " * 99)
    with pytest.raises(UserError, match=r"not the one that .*a was trained on: new: new0\.txt, .*data\.allow_changed=true"):
        train(load_config(TINY, moved), tmp_path)
    assert {p: p.read_bytes() for p in finished_run.rglob("*") if p.is_file()} == files
    result = train(load_config(TINY, [*moved, "data.allow_changed=true"]), tmp_path)
    assert len(result.corpus.train) + len(result.corpus.validation) == 209
    assert "the corpus has changed, as data.allow_changed allows: new: new0.txt" in capsys.readouterr().out
    (event,) = [e for e in read_events(RunDirectory(finished_run)) if e["event"] == "corpus_changed"]
    assert event["what"].startswith("new: new0.txt, new1.txt, new2.txt and 6 more;")
    assert (finished_run / "tokenizer.json").read_bytes() == files[finished_run / "tokenizer.json"]
    assert not load_config(finished_run / "config.yaml").data.allow_changed
    for step in (1, 2):  # every checkpoint knows, so that the tokenizer is that of each
        known = storage.read_metadata(finished_run / "checkpoints" / str(step))["corpus"]
        assert known["tokenizer"] == hashlib.sha256(files[finished_run / "tokenizer.json"]).hexdigest()


def test_an_evaluation_reads_the_runs_tokenizer(finished_run, tmp_path, monkeypatch, capsys):
    """Also where the corpus, of which one would be trained, has changed; and never another one."""
    loading = mock.Mock(side_effect=lambda data, *_, **__: (_ for _ in ()).throw(LookupError(data.tokenizer)))
    monkeypatch.setattr("dsv3_jax.checkpoint.load.load_corpus", loading)
    with pytest.raises(LookupError, match=f"^{finished_run}/tokenizer.json$"):
        dsv3.evaluate(finished_run)
    checkpoint = open_checkpoint(finished_run)
    (tmp_path / "b.txt").write_text("another corpus")
    other = DataConfig(path=f"{tmp_path}/b.txt", cache_dir=str(tmp_path))
    evaluate._note_changes(replace(checkpoint, config=replace(checkpoint.config, data=other)))
    assert "a corpus that has changed since it was trained on" in capsys.readouterr().err
    (finished_run / "tokenizer.json").write_text("{}")
    readers = (
        checkpoint.tokenizer,
        lambda: dsv3.evaluate(finished_run),
        lambda: export(finished_run, tmp_path / "x", "hf-f32"),
    )
    for read in readers:
        with pytest.raises(UserError, match=r"tokenizer\.json is not the tokenizer that .*checkpoints/2 was trained with"):
            read()


def test_what_was_edited_or_removed_is_refused_in_one_line(finished_run, tmp_path):
    """By `resume` as by `train`; nothing is changed. A checkpoint that is read by itself has its own configuration."""
    file = finished_run / "config.yaml"
    text = file.read_text()
    for content, expected in (
        ("", "config.yaml is empty"),
        (text.replace("lr: 0.003", "lr: 0.5"), "optim.lr is 0.5 in the file"),
    ):
        file.write_text(content)
        done = dsv3_command("resume", str(finished_run), cwd=tmp_path)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
        assert expected in done.stderr
        with pytest.raises(UserError, match=expected):
            train(load_config(TINY, ["name=a"]), tmp_path)
        assert file.read_text() == content
    assert open_checkpoint(finished_run).config.optim.lr == 0.003
    dsv3.load(finished_run)
    file.write_text(text)
    rows = (finished_run / "metrics.jsonl").read_bytes()
    shutil.rmtree(finished_run / "checkpoints")
    done = dsv3_command("resume", str(finished_run), cwd=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "metrics.jsonl has 2 steps but there is no checkpoint" in done.stderr
    assert (finished_run / "metrics.jsonl").read_bytes() == rows


def test_a_run_without_its_first_checkpoint_says_that_it_begins_anew(trained_once, finished_run, tmp_path, capsys):
    """As one that was killed before it: what was done again had rows."""
    shutil.rmtree(finished_run / "checkpoints")
    (finished_run / "events.jsonl").unlink()
    rows = (finished_run / "metrics.jsonl").read_bytes()
    assert int(train(load_config(TINY, trained_once[1]), tmp_path).state.step) == 2
    out = capsys.readouterr().out
    assert "metrics.jsonl has 2 steps but there is no checkpoint: the run ended before" in out
    assert "those rows are in metrics.jsonl.before-1 now" in out
    assert (finished_run / "metrics.jsonl.before-1").read_bytes() == rows
    assert [row["step"] for row in rows_of(finished_run)] == [1, 2]


def test_a_run_that_asked_for_auto_goes_on_as_it_began(finished_run, tmp_path, capsys):
    config = load_config(finished_run / "config.yaml", ["parallel.compress=auto", "precision.recipe=auto"])
    (finished_run / "config.yaml").write_text(config_to_yaml(config))
    result = train(load_config(finished_run / "config.yaml"), tmp_path)
    assert (result.config.precision.recipe, result.config.parallel.compress) == ("float32", 0)
    assert "precision.recipe=auto: float32, as the run began; a new run would take bf16 here" in capsys.readouterr().out
    assert load_config(finished_run / "config.yaml") == config


def test_only_a_fresh_start_reads_the_weights_to_begin_with(finished_run, tmp_path, monkeypatch):
    """They may be gone once the run has a checkpoint; the run keeps its tokenizer."""
    train(load_config(finished_run / "config.yaml", [f"train.init_from={tmp_path}/gone"]), tmp_path)
    with pytest.raises(UserError, match="gone does not exist"):
        train(load_config(finished_run / "config.yaml", [f"train.init_from={tmp_path}/gone", "name=b"]), tmp_path)
    assert not (tmp_path / "b").exists()


def test_fewer_steps_than_are_done_change_nothing(finished_run, tmp_path):
    files = {p: p.stat().st_mtime_ns for p in finished_run.rglob("*")}
    with pytest.raises(UserError, match=r"train\.steps=1: .*a has done 2 already; nothing is changed"):
        train(load_config(finished_run / "config.yaml", ["train.steps=1"]), tmp_path)
    assert {p: p.stat().st_mtime_ns for p in finished_run.rglob("*")} == files


@pytest.mark.parametrize("name", ["link", ".", "7", "a copy", "dir/"])
def test_a_run_goes_on_by_whatever_path_or_name(finished_run, tmp_path, monkeypatch, name):
    """By a link, from inside, under a number, copied to where no run could begin: from its checkpoint, in its own directory."""
    monkeypatch.setattr("dsv3_jax.training.finish.finish", lambda _: None)
    where = tmp_path / "other"
    where.mkdir()
    if name == "link":
        (where / name).symlink_to(finished_run)
    else:
        shutil.move(finished_run, finished_run := where / name.replace(".", "inside"))
    before = sorted(where.iterdir())
    done = dsv3_command("resume", name, cwd=finished_run if name == "." else where)
    assert done.returncode == 0, done.stderr
    assert f"resuming {finished_run} at step 2" in done.stdout
    assert sorted(where.iterdir()) == before
    kept = load_config(finished_run / "config.yaml").name
    assert kept == {"link": "a", ".": "inside", "7": "7", "a copy": "a", "dir/": "dir"}[name]


def test_no_watchdog_runs_while_a_corpus_is_read(config_with, tmp_path, monkeypatch):
    clock = []
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback_later", lambda seconds, **_: clock.append(seconds))
    monkeypatch.setattr(watchdog.faulthandler, "cancel_dump_traceback_later", lambda: clock.append("off"))
    monkeypatch.setattr(start, "load_run_corpus", lambda *_: (_ for _ in ()).throw(LookupError(*clock)))
    with pytest.raises(LookupError) as reading:
        train(config_with("name=a", "data.batch_size=8"), tmp_path, elastic=True)
    assert reading.value.args[-1] == "off"


def test_copies_on_the_host_stay_as_long_as_they_may_be_of_use(config_with, tmp_path, monkeypatch):
    """The copy serves a run that was stopped, which then reads all from there; a finished run keeps none."""
    options = ("name=a", "train.steps=4", f"checkpoint.local_dir={tmp_path}/$PLACE")
    monkeypatch.setenv("PLACE", "local")
    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, "write", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert train(config_with(*options), tmp_path).interrupted
    assert list((tmp_path / "local").glob("*/*/0.json"))
    assert int(train(config_with(*options), tmp_path).state.step) == 4
    restored = [e for e in read_events(RunDirectory(tmp_path / "a")) if e["event"] == "restored"]
    assert [e.get("local") for e in restored] == [0, 1]
    assert not list((tmp_path / "local").iterdir())


def test_a_run_that_is_being_trained_is_left_alone(config_with, tmp_path):
    config = config_with("name=a", "train.steps=1")
    with RunDirectory(tmp_path / "a").claimed(), pytest.raises(UserError, match="a is being trained by another process"):
        train(config, tmp_path)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["lock"]
    train(config, tmp_path)
    with pytest.raises(UserError, match="cannot write"), RunDirectory(tmp_path / "a" / "config.yaml" / "b").claimed():
        pass


def test_a_run_whose_start_was_cut_off_begins_anew(config_with, tmp_path, monkeypatch):
    """By a full disk: before its configuration was whole, a directory holds none; afterwards the old one stays."""
    config, write = config_with("name=a", "train.steps=1"), Path.write_bytes

    def full(path, data):
        if "config.yaml" not in path.name:
            return write(path, data)
        write(path, data[:10])
        raise OSError(28, "No space left on device")

    for before in ([], ["lock", "tokenizer.json"]):
        assert sorted(p.name for p in tmp_path.glob("a/*")) == before
        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_bytes", full)
            with pytest.raises(UserError, match=r"cannot write .*a: No space left on device"):
                train(config, tmp_path)
    train(config, tmp_path)
    whole = (tmp_path / "a" / "config.yaml").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(UserError, match="cannot write"):
            train(config_with("name=a", "train.steps=2"), tmp_path)
    assert (tmp_path / "a" / "config.yaml").read_text() == whole


def test_divergence_names_step_documents_and_checkpoint(config_with, tmp_path):
    with pytest.raises(UserError) as error:
        train(config_with("name=a", "optim.lr=300", "optim.warmup_steps=0", "checkpoint.every_steps=1"), tmp_path)
    text = str(error.value)
    assert "diverged at step" in text
    assert ".txt" in text
    assert "last good checkpoint: step" in text or "no checkpoint yet" in text
    for step in complete_steps(tmp_path / "a" / "checkpoints"):
        assert all(
            np.isfinite(leaf).all() for leaf in jax.tree.leaves(dsv3.load(tmp_path / "a/checkpoints" / str(step)).embed_VD)
        )


def test_checkpoints_by_step_are_kept_and_dropped(config_with, tmp_path):
    train(config_with("name=a", "checkpoint.every_steps=2", "checkpoint.keep=2"), tmp_path)
    assert complete_steps(tmp_path / "a" / "checkpoints") == [4, 6]


def largest_file(directory: Path) -> Path:
    return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_damaged_checkpoints_are_refused(finished_run):
    checkpoint = finished_run / "checkpoints" / "2"
    victim = largest_file(checkpoint)
    content = victim.read_bytes()

    victim.write_bytes(content[:-100])
    with pytest.raises(UserError, match="damaged"):
        dsv3.load(finished_run)
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    victim.write_bytes(bytes(flipped))
    with pytest.raises(UserError, match="sha256"):
        dsv3.load(finished_run)
    victim.unlink()
    with pytest.raises(UserError, match="found nothing"):
        dsv3.load(checkpoint)
    (checkpoint / "manifest.json").unlink()
    with pytest.raises(UserError, match="cut off"):
        dsv3.load(checkpoint)
    dsv3.load(finished_run)  # a run's latest whole checkpoint is the one before


def test_foreign_checkpoints_are_refused(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="not a checkpoint of dsv3_jax"):
        dsv3.load(tmp_path / "other")
    with pytest.raises(UserError, match="does not exist"):
        dsv3.load(tmp_path / "nothing")


def test_a_full_disk_leaves_the_previous_checkpoint(config_with, tmp_path, monkeypatch):
    """With a real small filesystem where the system lets us mount one, else with the error that it would give."""
    config = config_with("name=a", "train.steps=4", "checkpoint.every_steps=2", "model.hidden_size=64")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = (
        os.geteuid() == 0
        and shutil.which("mount") is not None
        and (subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2000k", "tmpfs", str(disk)], check=False).returncode == 0)
    )
    if not mounted:
        real, saved = storage.ocp.save_checkpointables_async, []

        def save(path, *args, **kwargs):
            if saved:
                raise OSError(28, "No space left on device")
            saved.append(path)
            return real(path, *args, **kwargs)

        monkeypatch.setattr(storage.ocp, "save_checkpointables_async", save)
    try:
        with pytest.raises(UserError, match=r"step 4: no space left on the device; the checkpoint of step 2 is intact"):
            train(config, disk)
        assert complete_steps(disk / "a" / "checkpoints") == [2]
        assert [p.name for p in (disk / "a" / "checkpoints").iterdir()] == ["2"]
        dsv3.load(disk / "a")
    finally:
        if mounted:
            subprocess.run(["umount", str(disk)], check=True)


def test_a_run_goes_on_without_a_reader_and_ends_in_one_line_with_its_disk(finished_run, monkeypatch):
    """Standard output is a pipe that nobody reads; then the quota is used up, and the checkpoints before are as they were."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as nobody, contextlib.redirect_stdout(nobody), mock.patch.dict(os.environ, GLIBC_TUNABLES=""):
        main(["resume", str(finished_run), "train.steps=3"])
    assert [row["step"] for row in rows_of(finished_run)] == [1, 2, 3]
    assert (finished_run / "report.json").exists()

    def full(*_, **__) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded", str(finished_run / "events.jsonl"))

    monkeypatch.setattr(EventLog, "write", full)
    done = dsv3_command("resume", str(finished_run), "train.steps=4", cwd=finished_run)
    assert done.returncode == 2
    assert done.stderr == f"dsv3: error: {finished_run}/events.jsonl: Disk quota exceeded; what was saved before is intact\n"
    assert complete_steps(finished_run / "checkpoints") == [1, 2, 3]
    dsv3.load(finished_run)


def test_ctrl_c_saves_and_the_same_command_goes_on(micro_overrides, tmp_path):
    command = [COMMAND, "train", str(TINY), *micro_overrides, "name=a", "train.steps=100000", "train.eval_every=100000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    metrics = tmp_path / "runs" / "a" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and (not metrics.exists() or metrics.read_text().count("\n") < 3):
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "stopped by SIGINT; saved step" in out
    (step,) = complete_steps(tmp_path / "runs" / "a" / "checkpoints")
    assert step == rows_of(tmp_path / "runs" / "a")[-1]["step"]

    done = subprocess.run(
        [COMMAND, "resume", "runs/a", f"train.steps={step + 2}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"resuming runs/a at step {step}" in done.stdout.replace(str(tmp_path) + "/", "")
    assert "\x1b" not in done.stdout  # plain lines in a pipe
    assert [row["step"] for row in rows_of(tmp_path / "runs" / "a")] == list(range(1, step + 3))

    evaluated = dsv3_command("eval", "runs/a", cwd=tmp_path)
    assert evaluated.returncode == 0, evaluated.stderr
    assert {"loss", "perplexity", "accuracy", "tokens"} <= set(json.loads(evaluated.stdout))
    generated = dsv3_command("generate", "runs/a", "--prompt", "the quick", "--max-new-tokens", "5", cwd=tmp_path)
    assert generated.returncode == 0, generated.stderr
    assert generated.stdout.startswith("the quick")
