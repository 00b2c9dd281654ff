"""What a corpus is: its contents in their order, wherever and whenever they were written."""

import dataclasses
import hashlib
import os
import shutil

import pytest

from dsv3_jax.config import DataConfig
from dsv3_jax.data import identity
from dsv3_jax.data.corpus import absolute_patterns, data_files
from dsv3_jax.data.identity import identify


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "texts").mkdir()
    for name in "abcde":
        (tmp_path / "texts" / f"{name}.txt").write_text(f"the text of {name}")
    return lambda folder="texts": DataConfig(path=f"{tmp_path}/{folder}/*.txt", cache_dir=str(tmp_path / "cache"))


def test_times_and_places_do_not_count(corpus, tmp_path):
    before = identify(corpus())
    contents = [hashlib.sha256(f"the text of {name}".encode()).hexdigest() for name in "abcde"]
    assert before.digest == hashlib.sha256("".join(contents).encode()).hexdigest()
    os.utime(tmp_path / "texts" / "a.txt", (1, 1))
    assert identify(corpus()).digest == before.digest
    shutil.move(tmp_path / "texts", tmp_path / "moved")
    assert identify(corpus("moved")).changes_since(before.record()) == ""
    assert [f.name for f in before.files] == ["a.txt", "b.txt", "c.txt", "d.txt", "e.txt"]


def test_changes_are_named(corpus, tmp_path):
    record = identify(corpus()).record()
    (tmp_path / "texts" / "b.txt").write_text("the text of B")  # as long as before
    (tmp_path / "texts" / "c.txt").write_text("more")
    (tmp_path / "texts" / "d.txt").unlink()
    (tmp_path / "texts" / "new.txt").write_text("new")
    assert identify(corpus()).changes_since(record).split("; ") == [
        "changed: b.txt (13 bytes, now 13), c.txt (13 bytes, now 4)", "new: new.txt", "gone: d.txt",
        "5 files of 65 bytes, now 5 of 46",
    ]  # fmt: skip


def test_order_counts(corpus, tmp_path):
    record = identify(corpus()).record()
    names = ",".join(f"{tmp_path}/texts/{name}.txt" for name in "bacde")
    other = DataConfig(path=names, cache_dir=str(tmp_path / "cache"))
    assert identify(other).changes_since(record).startswith("the files' order;")


def test_very_many_files_are_counted_and_not_named(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "_LISTED", 4)
    record = identify(corpus()).record()
    assert record["listing"] is None
    (tmp_path / "texts" / "b.txt").write_text("the text of B")
    assert identify(corpus()).changes_since(record) == "5 files of 65 bytes, now 5 of 65"


def test_contents_are_read_once(corpus, tmp_path, monkeypatch):
    before = identify(corpus())
    monkeypatch.setattr(identity, "_digest", lambda path: pytest.fail(f"{path} is read again"))
    assert identify(corpus()) == before


def test_paths_hold_in_any_working_directory(tmp_path, monkeypatch):
    """Also below a folder whose name has what a pattern would mean."""
    here = tmp_path / "we[ird]"
    (here / "texts").mkdir(parents=True)
    for name in ("a.txt", "b.txt", "[c].txt", "d,e.txt"):
        (here / "texts" / name).write_text(name)
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(here / "texts"))
    named = {"texts/d,e.txt": f"{here}/texts/d,e.txt", "texts/a.txt, texts/[c].txt": f"{here}/texts/a.txt,{here}/texts/[c].txt",
             "~/b.txt": f"{here}/texts/b.txt"}  # fmt: skip
    assert {path: absolute_patterns(path) for path in named} == named
    found = absolute_patterns("texts/*.txt")
    monkeypatch.chdir("/")
    assert len(data_files(DataConfig(path=found))) == 4
    assert absolute_patterns(found) == found


def test_held_out_files_count_as_such(corpus, tmp_path):
    """Trained on and held out are different things, of the same files too."""
    texts = tmp_path / "texts"
    before = identify(dataclasses.replace(corpus(), path=f"{texts}/a.txt,{texts}/b.txt"))
    after = identify(dataclasses.replace(corpus(), path=f"{texts}/a.txt", validation_path=f"{texts}/b.txt"))
    assert before.files == after.files
    assert before.digest != after.digest
