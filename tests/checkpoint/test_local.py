"""Copies of a checkpoint on the host: read instead of it where they are complete and undamaged, never otherwise."""

import hashlib
import json
import os
import shutil
import stat

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax.checkpoint.local import LocalCopies, index_of, snapshot
from dsv3_jax.checkpoint.manager import CheckpointManager
from dsv3_jax.checkpoint.manifest import write_manifest
from dsv3_jax.cluster.processes import free_port
from dsv3_jax.config import CheckpointConfig
from dsv3_jax.errors import UserError
from tests.checkpoint.cases import ABOUT, assert_is, state_of
from tests.cluster.test_processes import start


def on(state, mesh: Mesh):
    """Each array cut along its first axis where that goes."""
    return jax.tree.map(
        lambda a: jax.device_put(a, NamedSharding(mesh, P("x") if a.ndim and a.shape[0] % mesh.shape["x"] == 0 else P())), state
    )


def template_of(state):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)


def mesh_of(devices: int) -> Mesh:
    return Mesh(jax.devices()[:devices], "x")


@pytest.fixture
def saved(tmp_path):
    """(the configuration, the run's checkpoints with step 1, which 8 devices saved, the directory of the copies)."""
    config = CheckpointConfig(local_dir=str(tmp_path / "local"))
    manager = CheckpointManager(tmp_path / "run", config)
    manager.save(on(state_of(1), mesh_of(8)), ABOUT)
    manager.wait()
    return config, tmp_path / "run", tmp_path / "local"


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


@pytest.mark.parametrize("devices", [8, 4, 1])
def test_a_host_that_has_all_reads_nothing_else(saved, devices):
    """The mesh may be the same or a smaller one; a damaged file of the shared checkpoint does not matter."""
    config, run, _ = saved
    flip(max((run / "1").rglob("d/*"), key=lambda p: p.stat().st_size))
    manager = CheckpointManager(run, config)
    state, _ = manager.restore(template_of(on(state_of(0), mesh_of(devices))), pytest.fail)
    assert_is(state, 1)
    assert manager.read_locally == 1
    assert len(state.params["a"].sharding.device_set) == devices


def test_what_else_a_checkpoint_holds_is_verified_all_the_same(saved):
    """The data's position among it. A damaged file sets the checkpoint aside, though all arrays are here."""
    config, run, _ = saved
    others = [p for p in (run / "1").rglob("*") if p.is_file() and p.parent.name != "d" and p.stat().st_size]
    assert len(others) > 5
    for path in others:
        content = path.read_bytes()
        flip(path)
        with pytest.raises(UserError, match=r"no checkpoint in .* is undamaged"):
            CheckpointManager(run, config).restore(template_of(on(state_of(0), mesh_of(8))))
        path.write_bytes(content)


def test_what_is_damaged_is_read_from_the_checkpoint(saved):
    """A flipped bit, then a file cut off, then no file."""
    config, run, local = saved
    (blocks,) = local.rglob("*.blocks")
    shares = []
    for spoil in (flip, lambda p: p.write_bytes(p.read_bytes()[:4004]), lambda p: p.unlink()):
        spoil(blocks)
        manager = CheckpointManager(run, config)
        assert_is(manager.restore(template_of(on(state_of(0), mesh_of(8))))[0], 1)
        shares.append(manager.read_locally)
    assert 1 > shares[0] > shares[1] > shares[2] == 0  # params/a, of 4000 bytes, comes first


def test_copies_of_another_checkpoint_do_not_count(saved):
    """A run of the same name that was begun anew: its step 1 is another one."""
    config, run, _ = saved
    shutil.rmtree(run)
    manager = CheckpointManager(run, CheckpointConfig())
    state = state_of(7)
    state.step = jnp.int32(1)
    manager.save(on(state, mesh_of(8)), ABOUT)
    manager.wait()
    manager = CheckpointManager(run, config)
    restored, _ = manager.restore(template_of(on(state_of(0), mesh_of(8))))
    np.testing.assert_array_equal(restored.params["a"], state_of(7).params["a"])
    assert manager.read_locally == 0


def test_only_the_latest_is_kept_and_a_full_place_is_no_failure(saved, capfd):
    config, run, local = saved
    manager = CheckpointManager(run, config)
    manager.save(on(state_of(2), mesh_of(8)), ABOUT)
    manager.wait()
    assert [p.name for p in local.glob("*/*")] == ["2"]
    shutil.rmtree(local)
    local.write_text("a file, where a directory should be")
    manager.save(on(state_of(3), mesh_of(8)), ABOUT)
    manager.wait()
    assert manager.latest() == 3
    assert f"no copy of step 3 in checkpoint.local_dir={local}" in capfd.readouterr().err


def test_two_hosts_of_which_one_has_lost_its_copy(tmp_path):
    """Each reads what it has; the other one all of its own from the checkpoint."""
    port = free_port()
    program = ["-m", "tests.checkpoint.local_together", str(tmp_path)]
    processes = [start(program, process, 2, port) for process in (0, 1)]
    errors = [process.communicate(timeout=300)[1][-3000:] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    (both, first), (also, second) = (json.loads((tmp_path / f"shares-{i}").read_text()) for i in (0, 1))
    assert both == also == 1
    assert 0.99 < first < 1  # but the step's number
    assert second == 0


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 2)), new=st.sampled_from(["x", "y", "xy", ""]), seed=st.integers(0, 99),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16, jnp.int8]),
)  # fmt: skip
def test_blocks_are_put_together_anew(tmp_path_factory, shape, new, seed, dtype):
    """Arrays of any size cut into 4 x 2 blocks, for devices that want other parts of them."""
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    x = (100 * jax.random.normal(jax.random.key(seed), (4 * shape[0], 8 * shape[1]))).astype(dtype)
    there = jax.device_put(x, NamedSharding(mesh, P("x", "y")))
    directory = tmp_path_factory.mktemp("copies")
    copies, taken, checkpoint = LocalCopies(directory / "local", directory), snapshot({"a": there}, {}), directory / "3"
    checkpoint.mkdir()
    write_manifest(checkpoint, local={"0": hashlib.sha256(index_of(taken)).hexdigest()})
    copies.write(3, 0, taken, index_of(taken))
    spec = {"x": P(None, "x"), "y": P("y"), "xy": P(("x", "y")), "": P()}[new]
    spec = spec if new != "xy" or x.shape[0] % 8 == 0 else P(None, ("x", "y"))
    template = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
    copy = copies.copy_of(checkpoint)
    assert copy.covered({"a": template, "b": template}) == {"a"}
    found = copy.load("a", template)
    assert found.sharding == template.sharding
    np.testing.assert_array_equal(found, x)
    for rows in (99, x.shape[0] - 1):
        assert not copy.covered({"a": jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=NamedSharding(mesh, P()))})


def restored(run, config):
    """The manager after it has restored step 1, which must be what was saved."""
    manager = CheckpointManager(run, config)
    assert_is(manager.restore(template_of(on(state_of(0), mesh_of(8))), pytest.fail)[0], 1)
    return manager


def test_who_can_write_the_copies_does_not_decide_what_is_restored(saved):
    """Other blocks with an index that agrees with them: not that of the shared checkpoint's manifest."""
    config, run, local = saved
    assert restored(run, config).read_locally == 1
    (blocks,), (index,) = local.rglob("*.blocks"), local.rglob("*.json")
    data, listing = bytearray(blocks.read_bytes()), json.loads(index.read_text())
    data[:4] = b"\0\0\0\0"
    blocks.write_bytes(data)
    end = listing[1][4]  # the offset of the second block
    listing[0][5] = hashlib.sha256(data[:end]).hexdigest()
    index.write_text(json.dumps(listing))
    assert restored(run, config).read_locally == 0


def test_copies_are_their_owners_alone(saved):
    config, run, local = saved
    (root,) = local.iterdir()
    assert stat.S_IMODE(local.stat().st_mode) == stat.S_IMODE(root.stat().st_mode) == 0o700
    root.chmod(0o755)  # as earlier versions made it
    assert restored(run, config).read_locally == 1
    assert stat.S_IMODE(root.stat().st_mode) == 0o700


def somebody_elses(local, root, monkeypatch):
    mine = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: mine + 1)


def a_link(local, root, monkeypatch):
    root.rename(local.parent / "moved")
    root.symlink_to(local.parent / "moved")


def writable_by_all(local, root, monkeypatch):
    local.chmod(0o777)


@pytest.mark.parametrize("spoil", [somebody_elses, a_link, writable_by_all])
def test_a_directory_that_others_could_replace_is_not_used(saved, spoil, monkeypatch, capfd):
    config, run, local = saved
    (root,) = local.iterdir()
    spoil(local, root, monkeypatch)
    manager = restored(run, config)
    assert manager.read_locally == 0
    manager.save(on(state_of(2), mesh_of(8)), ABOUT)
    manager.wait()
    assert manager.latest() == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"no copy of step 2 in checkpoint.local_dir={local}: ")
    assert f" {root}: " in line or f" {local}: " in line


def test_a_temporary_directory_of_the_system_will_do(saved):
    """Everybody can write there, but not replace what others have, by its sticky bit."""
    config, run, local = saved
    local.chmod(0o1777)
    assert restored(run, config).read_locally == 1
