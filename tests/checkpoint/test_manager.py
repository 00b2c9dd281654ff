"""Saving beside training, which checkpoints are kept or set aside, and kills in the middle."""

import json
import os
import random
import shutil
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax.checkpoint import save, storage
from dsv3_jax.checkpoint.load import resolve
from dsv3_jax.checkpoint.manager import CheckpointManager
from dsv3_jax.checkpoint.manifest import verify
from dsv3_jax.checkpoint.retention import complete_steps, newest, remove_failed
from dsv3_jax.cluster.processes import free_port
from dsv3_jax.config import CheckpointConfig
from dsv3_jax.errors import UserError
from tests.checkpoint.cases import ABOUT, KEEP_ALL, assert_is, saved, state_of
from tests.cluster.test_processes import start
from tests.conftest import ROOT


def test_a_state_may_change_once_save_has_returned(tmp_path):
    """A step that takes the state's memory for its result, as training does, while the checkpoint is being written."""
    manager = CheckpointManager(tmp_path, CheckpointConfig(keep=9))
    advance = jax.jit(lambda s: jax.tree.map(lambda a: a * 0 - 1, s), donate_argnums=0)
    for step in (1, 2, 3):
        state = state_of(step, 3_000_000)
        manager.save(state, ABOUT)
        jax.block_until_ready(advance(state))
    manager.wait()
    for step in (1, 2, 3):
        shutil.copytree(tmp_path / str(step), tmp_path / "alone" / str(step))
        restored, _ = CheckpointManager(tmp_path / "alone", CheckpointConfig()).restore(
            jax.eval_shape(lambda: state_of(0, 3_000_000))
        )
        assert_is(restored, step, 3_000_000)


def test_the_home_directory_is_filled_in(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    manager = CheckpointManager(tmp_path / "checkpoints", CheckpointConfig(local_dir="~/local"))
    manager.save(state_of(1), ABOUT)
    manager.wait()
    assert list((tmp_path / "local").iterdir())
    assert resolve("~") == tmp_path / "checkpoints" / "1"


def test_what_is_kept(tmp_path):
    """The last two, every fourth, and the best two by held-out loss; one without a loss is no best one."""
    losses = [3.0, 1.0, 9.0, 5.0, 0.5, 8.0, None, 7.0, 6.0, 6.5]
    saved(tmp_path, range(1, 11), CheckpointConfig(keep=2, keep_every=4, keep_best=2), losses)
    assert complete_steps(tmp_path) == [2, 4, 5, 8, 9, 10]


def test_damaged_checkpoints_are_set_aside(tmp_path):
    saved(tmp_path, [1, 2, 3])
    for step in (2, 3):
        victim = max((p for p in (tmp_path / str(step)).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
        victim.write_bytes(victim.read_bytes()[:-1])
    said = []
    manager = CheckpointManager(tmp_path, CheckpointConfig(keep=9))
    state, _ = manager.restore(jax.eval_shape(lambda: state_of(0)), said.append)
    assert_is(state, 1)
    assert [line.split("; ")[-1] for line in said] == [
        f"set aside as {step}.damaged, going back to step 1" for step in (3, 2)
    ]  # fmt: skip
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2.damaged", "3.damaged"]
    manager.save(state_of(3), ABOUT)  # the step comes again, and is saved again
    manager.wait()
    assert_is(CheckpointManager(tmp_path, CheckpointConfig()).restore(jax.eval_shape(lambda: state_of(0)))[0], 3)


def test_nothing_is_set_aside_where_all_are_damaged(tmp_path):
    saved(tmp_path, [1, 2])
    for step in (1, 2):
        (tmp_path / str(step) / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"no checkpoint in .* is undamaged: .*damaged manifest.json.*damaged manifest.json"):
        CheckpointManager(tmp_path, CheckpointConfig()).restore(jax.eval_shape(lambda: state_of(0)))
    assert complete_steps(tmp_path) == [1, 2]


def test_a_renamed_checkpoint_does_not_hide_later_ones(tmp_path, capsys):
    """It gets the name of its step again, and the run goes on from what is really the last."""
    saved(tmp_path, [10])
    (tmp_path / "10").rename(tmp_path / "30")
    assert complete_steps(tmp_path) == []
    assert newest(tmp_path) == (10, tmp_path / "30")
    saved(tmp_path, [20])
    assert f"{tmp_path}/30 is the checkpoint of step 10, not of 30: renamed to 10\n" in capsys.readouterr().out
    state, _ = CheckpointManager(tmp_path, CheckpointConfig()).restore(jax.eval_shape(lambda: state_of(0)))
    assert_is(state, 20)
    assert complete_steps(tmp_path) == [10, 20]


def test_a_copied_checkpoint_is_set_aside(tmp_path, capsys):
    """Nothing is removed, neither the copy nor what was set aside before; a number may be written in other ways."""
    saved(tmp_path, [1, 2])
    for copy in ("7", "7.misnamed", "003"):
        shutil.copytree(tmp_path / "1", tmp_path / copy)
    manager = CheckpointManager(tmp_path, CheckpointConfig())
    assert manager.latest() == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["003.misnamed", "1", "2", "7.misnamed", "7.misnamed1"]
    said = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[-1] for line in said] == ["set aside as 003.misnamed", "set aside as 7.misnamed1"]


def test_links_lead_to_what_is_never_removed(tmp_path):
    """An archived checkpoint that a run goes on from stays whole when the run no longer keeps it, or its disk is away."""
    run, archive = tmp_path / "run", tmp_path / "archive"
    saved(run, [1])
    (run / "1").rename(archive)
    (run / "1").symlink_to(archive)
    (run / "9").symlink_to(tmp_path / "away")
    saved(run, [2, 3], CheckpointConfig(keep=2))
    verify(archive)
    assert sorted(p.name for p in run.iterdir()) == ["2", "3", "9"]


def test_the_last_checkpoint_is_set_aside_where_all_lost_their_manifests(tmp_path, capsys):
    """A copy of a run without them does not begin again over what was done; where one is left, the others are removed."""
    saved(tmp_path, [1, 2, 3], KEEP_ALL)
    (tmp_path / "0.incomplete").mkdir()
    (tmp_path / "x.manifest-1").mkdir()  # somebody's
    for step in (2, 3):
        (tmp_path / str(step) / "manifest.json").unlink()
    assert CheckpointManager(tmp_path, KEEP_ALL).latest() == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.incomplete", "1"]
    (tmp_path / "1" / "manifest.json").unlink()
    assert CheckpointManager(tmp_path, KEEP_ALL).latest() is None
    assert [p.name for p in tmp_path.iterdir()] == ["1.incomplete"]
    assert (tmp_path / "1.incomplete" / "weights").is_dir()
    ends = [line.split("manifest.json, ")[1] for line in capsys.readouterr().out.splitlines()]
    assert ends[:2] == ["so that its saving was cut off: removed"] * 2
    assert ends[2:] == ["and no checkpoint is complete: set aside as 1.incomplete"]


def test_a_failed_save_leaves_other_names_alone(tmp_path):
    saved(tmp_path, [1])
    for name in ("2", "2.bak", "2.damaged", "2.manifest-0-of-2", "2.orbax-checkpoint-tmp-0", "21"):
        (tmp_path / name).mkdir()
    remove_failed(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2.bak", "2.damaged", "21"]


@pytest.mark.parametrize("step", [True, -5, 10**300, "7", None])
def test_a_step_that_no_run_has_is_no_name(tmp_path, step):
    (tmp_path / "4").mkdir()
    (tmp_path / "4" / "manifest.json").write_text("{}")
    (tmp_path / "4" / "_CHECKPOINT_METADATA").write_text(json.dumps({"custom_metadata": {"step": step, "data": {}}}))
    assert CheckpointManager(tmp_path, CheckpointConfig()).latest() == 4
    assert (tmp_path / "4").is_dir()


def test_a_path_that_cannot_be_saved_to_is_refused_at_once(tmp_path):
    for use in (resolve, lambda path: CheckpointManager(path, CheckpointConfig())):
        with pytest.raises(UserError, match=r"the path has bytes that are no UTF-8"):
            use(tmp_path / "\udcff")


def test_checkpoints_of_the_version_before_say_their_step_by_their_position(tmp_path):
    def about(**more):
        return json.dumps({"custom_metadata": {"config": {}, **more}})

    for name, metadata in {
        "4": about(data={"next_index": 4}),
        "9": about(data={"next_index": 5}),
        "6": about(),
        "8": "{",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}")
        (tmp_path / name / "_CHECKPOINT_METADATA").write_text(metadata)
    assert complete_steps(tmp_path) == [4, 6, 8]  # of what does not say, the name is taken
    assert newest(tmp_path) == (8, tmp_path / "8")


def test_a_save_that_fails_beside_training(tmp_path, monkeypatch):
    """The failure is known before the next save is due, `wait` raises it, and nothing is left of the failed save."""
    manager = saved(tmp_path, [1])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(save, "write_manifest_together", full)
    manager.save(state_of(2), ABOUT)
    manager.close()
    assert manager.failed
    with pytest.raises(UserError, match=r"step 2: no space left on the device; the checkpoint of step 1 is intact"):
        manager.wait()
    assert [p.name for p in tmp_path.iterdir()] == ["1"]
    assert not manager.failed


def test_a_save_that_cannot_begin_leaves_nothing_that_waits(tmp_path):
    """No directory can be made: Orbax would find out in the background, and its threads wait for it for ten minutes."""
    manager = saved(tmp_path / "run", [1])
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "run").write_text("a file, where a directory should be")
    before = set(threading.enumerate())
    with pytest.raises(UserError, match=rf"step 2: {tmp_path}/run/2.orbax-checkpoint-tmp-probe: Not a directory; there is no"):
        manager.save(state_of(2), ABOUT)
    assert not [thread for thread in threading.enumerate() if thread not in before and not thread.daemon]


def test_any_flipped_bit_is_noticed(tmp_path):
    """In arrays, in Orbax's own files, and in the manifest itself."""
    saved(tmp_path, [1])
    files = sorted(p for p in (tmp_path / "1").rglob("*") if p.is_file() and p.stat().st_size)
    rng = random.Random(0)
    for n in range(200):
        victim = files[n % len(files)]
        content = bytearray(victim.read_bytes())
        at, bit = rng.randrange(len(content)), 1 << rng.randrange(8)
        content[at] ^= bit
        victim.write_bytes(content)
        with pytest.raises(UserError, match="damaged"):
            verify(tmp_path / "1")
        content[at] ^= bit
        victim.write_bytes(content)
    verify(tmp_path / "1")


@pytest.mark.slow
def test_killed_saves_cost_no_checkpoint(tmp_path):
    environ = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.checkpoint.save_storm", str(tmp_path / "checkpoints"), "20"],
        cwd=ROOT, env=environ, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] == 20
    assert found["in a save"] >= 10
    assert found["steps"] == sorted(found["steps"])
    assert found["steps"][-1] > 0


def test_chunks_are_layers(tmp_path):
    """Stacked layers are cut into one chunk each, and nothing else, since every chunk is a write and a read of its own."""
    params = {"moe_blocks": {"w": jnp.zeros((3, 40, 5))}, "embed_VD": jnp.zeros((400, 8)), "norm": jnp.zeros(100)}
    state = state_of(1)
    state.params = params  # type: ignore[assignment]
    manager = CheckpointManager(tmp_path, KEEP_ALL)
    manager.save(state, ABOUT)
    manager.wait()
    found = storage.ocp.checkpointables_metadata(str(tmp_path / "1")).metadata["weights"]
    chunks = {name: tuple(a.storage_metadata.chunk_shape) for name, a in found.items()}
    assert chunks == {"params/moe_blocks/w": (1, 40, 5), "params/embed_VD": (400, 8), "params/norm": (100,)}


def test_small_arrays_are_not_cut_up_among_the_devices_that_hold_them(tmp_path):
    """Each piece would be a program to compile in a process's first save."""
    everywhere = NamedSharding(Mesh(jax.devices(), "x"), P())
    manager = CheckpointManager(tmp_path, KEEP_ALL)
    manager.save(jax.tree.map(lambda a: jax.device_put(a, everywhere), state_of(1)), ABOUT)
    manager.wait()
    found = storage.ocp.checkpointables_metadata(str(tmp_path / "1")).metadata["weights"]["params/a"]
    assert tuple(found.storage_metadata.chunk_shape) == (1000,)


def test_two_processes_list_and_verify_together(tmp_path):
    """Each reads its share of the files; damage that only the second one finds is known to both, and so is what differs."""
    port = free_port()
    program = ["-m", "tests.checkpoint.together", str(tmp_path / "checkpoints")]
    first, second = (start(program, process, 2, port) for process in (0, 1))
    output, errors = first.communicate(timeout=300)
    second.wait(timeout=60)
    assert first.returncode == second.returncode == 0, errors[-3000:]
    found = json.loads(output.strip().splitlines()[-1])
    assert found["whole"]
    assert not found["leftovers"]
    assert found["aside"]
    assert found["same"]
    assert found["other"] == "process 1 has another one"
    (line,) = found["said"]
    assert "do not match their sha256; set aside as 2.damaged, going back to step 1" in line
