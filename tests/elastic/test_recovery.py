"""Real processes that are killed, stopped, stuck and lost: the run is as if nothing had been. Minutes each."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from dsv3_jax.config import load_config
from dsv3_jax.data.batch import Batch
from dsv3_jax.data.batches import PackedWindows, batch_windows
from dsv3_jax.data.store import load_corpus
from dsv3_jax.runs.directory import RunDirectory
from dsv3_jax.runs.metrics import last_row, read_rows
from tests.conftest import ROOT

pytestmark = pytest.mark.slow
TINY = ROOT / "configs" / "tiny.yaml"
MICRO = [
    "model.vocab_size=300", "model.hidden_size=32", "model.intermediate_size=48", "model.moe_intermediate_size=16",
    "model.num_hidden_layers=2", "model.num_nextn_predict_layers=0", "model.num_attention_heads=2", "model.q_lora_rank=16",
    "model.kv_lora_rank=16", "model.qk_nope_head_dim=8", "model.qk_rope_head_dim=8", "model.v_head_dim=8",
    "model.n_routed_experts=8", "data.seq_len=32", "data.batch_size=8", "train.eval_every=1000", "train.eval_batches=1",
    "train.steps=1000000", "checkpoint.every_steps=5", "parallel.fsdp=2", "parallel.expert=2", "train.stuck_after_s=20",
]  # fmt: skip


def environ(directory: Path) -> dict[str, str]:
    """Settings of all processes. The first attempt waits DSV3_JOIN_TIMEOUT_S for the last host, which may start late."""
    return os.environ | {
        "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "DSV3_COMPILED_DIR": str(directory / "programs"),
        "DSV3_HEARTBEAT_S": "10", "DSV3_JOIN_TIMEOUT_S": "300",
    }  # fmt: skip


def start(directory: Path, *args: str, **more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "dsv3_jax.cli", *args]
    return subprocess.Popen(
        command, cwd=directory, env=environ(directory) | more, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def until(condition, process: subprocess.Popen, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.05)


@pytest.fixture
def cluster_utils(monkeypatch) -> ModuleType:
    """Ray's, with workers of the priority of tests: Ray lowers it by 15, and whatever else the machine runs goes first."""
    monkeypatch.setenv("RAY_worker_niceness", "0")
    return pytest.importorskip("ray.cluster_utils")


def checksum_of(windows: list[Batch]) -> int:
    """What the devices make of a batch, in Python's integers."""
    total = 0
    for r, window in enumerate(windows):
        for c, (token, segment) in enumerate(zip(window.tokens.tolist(), window.segments.tolist(), strict=True)):
            total += (token + segment * 3266489917) * (r * 2654435761 + 1) * (c * 2246822519 + 1)
    return total % 2**32


@pytest.mark.slow(minutes=3)
def test_a_storm_leaves_no_trace(tmp_path):
    """A kill, a stuck worker, a lost host that comes back: scripts/studies/chaos.py holds it to an undisturbed run."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "studies" / "chaos.py"), "--failures", "3", "--kinds", "kill", "spin", "lost",
         "--seed", "4", "--steps", "25", "--workers", "2:3", "--out", str(tmp_path / "runs")],
        env=environ(tmp_path), text=True, capture_output=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout[-6000:], done.stderr[-3000:])
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["failures injected"]
    assert found["every step once, in order"]
    assert found["the same batches"]
    # and by the windows that the data is defined as: which documents each step saw
    run = RunDirectory(tmp_path / "runs" / "runs" / "stormy")
    config = load_config(run.config_file)
    source = PackedWindows(load_corpus(config.data, config.model.vocab_size).train, 32, 1, config.train.seed, shuffle=True)
    rows, seen = read_rows(run.metrics_file), set()
    assert len(rows) >= 25
    for row in rows:
        windows = batch_windows(config.data.batch_size, row["step"] - 1)
        assert row["batch_checksum"] == checksum_of([source[w] for w in windows])
        seen |= {name for w in windows for name in source.document_ids(w)}
    assert len(seen) > 20


def test_a_lost_driver_costs_one_command(tmp_path, corpus_dir):
    """SIGKILL of the supervisor ends its workers; the same command goes on."""
    command = [
        "train", str(TINY), *MICRO, f"data.path={corpus_dir}/*.txt", f"data.cache_dir={tmp_path}/cache", "name=driver",
        "--engine", "local", "--workers", "1:2", "--devices", "2",
    ]  # fmt: skip
    run = RunDirectory(tmp_path / "runs" / "driver")
    first = start(tmp_path, *command)
    until(lambda: last_row(run.metrics_file).get("step", 0) >= 8, first)
    first.kill()
    first.communicate()
    time.sleep(3)  # hosts see that their supervisor has gone, and take their workers with them
    size = run.metrics_file.stat().st_size
    time.sleep(2)
    assert run.metrics_file.stat().st_size == size
    second = start(tmp_path, *command)
    until(lambda: last_row(run.metrics_file).get("step", 0) >= 15 and len(list(run.logs.glob("attempt-2-*"))) == 2, second)
    second.send_signal(signal.SIGTERM)
    output, _ = second.communicate(timeout=60)
    assert second.returncode == 130, output
    assert "resuming runs/driver at step 5" in output
    rows = read_rows(run.metrics_file)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert all(0 < row["goodput"] < 1 for row in rows)
    assert rows[5]["lost_recompute_s"] > 0  # the first one done again
    report = subprocess.run(
        [sys.executable, "-m", "dsv3_jax.cli", "report", "runs/driver"], cwd=tmp_path, env=environ(tmp_path), text=True,
        capture_output=True, timeout=60,
    )  # fmt: skip
    assert "ended without a word" in report.stdout


@pytest.mark.slow(minutes=3)
def test_ray_goes_on_without_a_node_and_takes_it_back(cluster_utils, tmp_path, corpus_dir):
    """Nodes of a Ray cluster on this machine; one is killed, and another comes. The driver is killed too in the end."""
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    command = [
        "train", str(TINY), *MICRO, f"data.path={corpus_dir}/*.txt", f"data.cache_dir={tmp_path}/cache", "name=ray",
        "--engine", "ray", "--workers", "1:2", "--devices", "2",
    ]  # fmt: skip
    run = RunDirectory(tmp_path / "runs" / "ray")

    def meshes() -> list[dict]:
        events = [json.loads(line) for line in run.events_file.read_text().splitlines()] if run.events_file.exists() else []
        return [e["mesh"] for e in events if e["event"] == "started"]

    def step() -> int:
        return last_row(run.metrics_file).get("step", 0)

    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        process = start(tmp_path, *command, RAY_ADDRESS=cluster.address)
        until(lambda: step() >= 7, process)
        assert meshes() == [{"fsdp": 2, "expert": 2}]
        cluster.remove_node(nodes[1], allow_graceful=False)
        until(lambda: len(meshes()) == 2, process)
        reached = step()
        until(lambda: step() > reached, process)
        assert meshes()[-1] == {"expert": 2}
        cluster.add_node(num_cpus=1)
        until(lambda: len(meshes()) == 3, process)
        assert meshes()[-1] == {"fsdp": 2, "expert": 2}
        reached = step()
        until(lambda: step() > reached, process)
        process.kill()
        process.communicate()
        process = start(tmp_path, *command, RAY_ADDRESS=cluster.address)
        until(lambda: len(meshes()) == 4 and step() > reached + 5, process)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 130, output[-3000:]
    finally:
        cluster.shutdown()
    rows = read_rows(run.metrics_file)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))


def test_a_lost_head_node_costs_one_command_on_a_new_cluster(cluster_utils, tmp_path, corpus_dir):
    """Without its head node a Ray cluster ends, the supervisor and all workers with it, after a time that Ray bounds."""
    bound = {"gcs_rpc_server_reconnect_timeout_s": 10}
    command = [
        "train", str(TINY), *MICRO, f"data.path={corpus_dir}/*.txt", f"data.cache_dir={tmp_path}/cache", "name=head",
        "--engine", "ray", "--workers", "1:2", "--devices", "2",
    ]  # fmt: skip
    run, outputs = RunDirectory(tmp_path / "runs" / "head"), []
    for _ in range(2):
        head = {"num_cpus": 0, "include_dashboard": False, "_system_config": bound}
        cluster = cluster_utils.Cluster(initialize_head=True, head_node_args=head)
        try:
            for _ in range(2):
                cluster.add_node(num_cpus=1)
            began = time.time()
            process = start(tmp_path, *command, RAY_ADDRESS=cluster.address)
            until(lambda began=began: (row := last_row(run.metrics_file)).get("time", 0) > began and row["step"] >= 8, process)
            if not outputs:
                cluster.remove_node(cluster.head_node, allow_graceful=False)
            else:
                process.send_signal(signal.SIGTERM)
            outputs.append(process.communicate(timeout=120)[0])
            assert process.returncode == (130 if len(outputs) > 1 else 1), outputs[-1][-3000:]
        finally:
            cluster.shutdown()
    assert "Failed to connect to GCS" in outputs[0]
    assert "resuming runs/head at step" in outputs[1]
    rows = read_rows(run.metrics_file)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
