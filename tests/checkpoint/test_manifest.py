"""The manifest: formats of checkpoints, and what no version has written."""

import json

import jax
import pytest

from dsv3_jax.checkpoint.load import open_checkpoint
from dsv3_jax.checkpoint.manager import CheckpointManager
from dsv3_jax.checkpoint.manifest import verify, write_manifest
from dsv3_jax.checkpoint.retention import check_latest_format, complete_steps
from dsv3_jax.errors import UserError
from tests.checkpoint.cases import KEEP_ALL, assert_is, saved, state_of


def renumber(directory, number):
    """Write another format, or none, into a checkpoint's manifest."""
    manifest = json.loads((directory / "manifest.json").read_text())
    files = manifest["files"]
    manifest = files if number is None else {"format": number, "files": files}
    (directory / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("number", [None, 1])
def test_formats_of_this_version_and_the_one_before_are_read(tmp_path, number):
    """Manifests without a number are of format 0, which listed the files alone."""
    saved(tmp_path, [1])
    renumber(tmp_path / "1", number)
    verify(tmp_path / "1")
    assert_is(CheckpointManager(tmp_path, KEEP_ALL).restore(jax.eval_shape(lambda: state_of(0)))[0], 1)


def test_a_newer_format_is_refused(tmp_path):
    """It is not damaged: it is not set aside, and no earlier checkpoint is taken in its place."""
    saved(tmp_path, [1, 2])
    renumber(tmp_path / "2", 2)
    message = r"checkpoint /.*/2 has format 2, and this version of dsv3_jax reads formats up to 1; load it with the version"
    for directory in (tmp_path, tmp_path / "2"):
        with pytest.raises(UserError, match=message):
            open_checkpoint(directory)
    (tmp_path / "2" / "manifest.json").write_text('{"format": 3, "tables": 5}')  # whatever else it holds
    for _ in range(2):
        with pytest.raises(UserError, match="has format 3"):
            CheckpointManager(tmp_path, KEEP_ALL).restore(jax.eval_shape(lambda: state_of(0)), pytest.fail)
    assert complete_steps(tmp_path) == [1, 2]


@pytest.mark.parametrize("number", [0, -1, 1.0, True, "1", [1], {}, float("nan")])
def test_a_format_that_no_version_has_written_is_damage(tmp_path, number):
    saved(tmp_path, [1, 2])
    renumber(tmp_path / "2", number)
    with pytest.raises(
        UserError, match=r"damaged manifest\.json: (format .* must be a whole number from 1 on|.*NaN is no JSON)"
    ):
        verify(tmp_path / "2")
    said = []
    assert_is(CheckpointManager(tmp_path, KEEP_ALL).restore(jax.eval_shape(lambda: state_of(0)), said.append)[0], 1)
    assert len(said) == 1


@pytest.mark.parametrize("text", ["", "[]", "null", "5", '{"format": 1}', '{"format": 1, "files": [1]}', "[" * 100_000])
def test_a_manifest_that_is_none_is_damage(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"damaged manifest\.json"):
        verify(tmp_path)


def test_sizes_contents_and_who_reads_what_by_hand(tmp_path):
    """A file that is too short, one of the right size with other bytes, and one that somebody reads elsewhere."""
    for name, content in (("a", b"12345"), ("weights/d/b", b"6789")):
        (tmp_path / "7" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "7" / name).write_bytes(content)
    assert complete_steps(tmp_path) == []
    write_manifest(tmp_path / "7")
    assert complete_steps(tmp_path) == [7]
    verify(tmp_path / "7")

    (tmp_path / "7" / "a").write_bytes(b"1234")
    with pytest.raises(UserError, match="a should have 5 bytes, found 4 bytes"):
        verify(tmp_path / "7")
    (tmp_path / "7" / "a").write_bytes(b"1234X")
    with pytest.raises(UserError, match="the contents of a do not match their sha256"):
        verify(tmp_path / "7")
    (tmp_path / "7" / "a").write_bytes(b"12345")
    (tmp_path / "7" / "weights" / "d" / "b").unlink()
    with pytest.raises(UserError, match="weights/d/b should have 4 bytes, found nothing"):
        verify(tmp_path / "7")
    verify(tmp_path / "7", arrays=False)


def test_the_latest_checkpoint_says_whether_a_run_can_go_on(tmp_path):
    """Before anything of the run is written."""
    check_latest_format(tmp_path)
    saved(tmp_path, [1, 2])
    check_latest_format(tmp_path)
    renumber(tmp_path / "2", 7)
    with pytest.raises(UserError, match="has format 7"):
        check_latest_format(tmp_path)


@pytest.mark.parametrize("text", ["{}", '{"format": 1, "files": {}}'])
def test_a_manifest_that_lists_nothing_is_damage(tmp_path, text):
    saved(tmp_path, [1])
    (tmp_path / "1" / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"damaged: manifest.json lists no files"):
        verify(tmp_path / "1")


def test_a_manifest_names_all_that_loading_reads(tmp_path):
    """Else a file could be damaged, or another one, without anybody noticing."""
    saved(tmp_path, [1])
    path = tmp_path / "1" / "manifest.json"
    manifest = json.loads(path.read_text())
    sets = [name for name in manifest["files"] if name.startswith(("weights/", "optimizer/"))]
    assert any("/d/" in name for name in sets)
    for name in [*sets, "_CHECKPOINT_METADATA", "orbax.checkpoint"]:
        fewer = {other: entry for other, entry in manifest["files"].items() if other != name}
        path.write_text(json.dumps(manifest | {"files": fewer}))
        with pytest.raises(UserError, match=rf"damaged: manifest.json does not list {name}$"):
            verify(tmp_path / "1")
    path.write_text(json.dumps(manifest))
    (tmp_path / "1" / "README.md").write_text("what its owner says of it")
    (tmp_path / "1" / "weights" / ".nfs0001").write_text("a file system's own")
    verify(tmp_path / "1")


def test_a_manifest_without_weights_is_damage(tmp_path):
    (tmp_path / "note").write_text("12345")
    write_manifest(tmp_path)
    with pytest.raises(UserError, match=r"damaged: manifest\.json lists no file of weights/"):
        verify(tmp_path)
