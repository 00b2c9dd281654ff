"""Several processes: who takes part, what happens when somebody is missing, and two that train as one."""

import json
import os
import subprocess
import sys
import time

import pytest

from dsv3_jax.cluster.processes import ClusterSpec, cluster_spec, free_port
from dsv3_jax.errors import UserError
from tests.commands import dsv3, dsv3_process
from tests.conftest import ROOT


def start(program: list[str], process: int, processes: int, port: int, **more: str) -> subprocess.Popen:
    environ = os.environ | {
        "DSV3_COORDINATOR": f"127.0.0.1:{port}", "DSV3_PROCESSES": str(processes), "DSV3_PROCESS_ID": str(process),
        "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4", "PYTHONPATH": str(ROOT),
    } | more  # fmt: skip
    # only the first one's output is read: another's pipe could fill up and stop it
    stdout = subprocess.DEVNULL if process else subprocess.PIPE
    return subprocess.Popen([sys.executable, *program], env=environ, text=True, stdout=stdout, stderr=subprocess.PIPE, cwd=ROOT)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"DSV3_COORDINATOR": "h:1", "DSV3_PROCESSES": "1", "DSV3_PROCESS_ID": "0"}, None),
        ({"DSV3_COORDINATOR": "h:1", "DSV3_PROCESSES": "3", "DSV3_PROCESS_ID": "2"}, ClusterSpec("h:1", 3, 2)),
        ({"DSV3_COORDINATOR": "h:1", "DSV3_PROCESSES": "3", "JOB_COMPLETION_INDEX": "1"}, ClusterSpec("h:1", 3, 1)),
        (
            {"SLURM_STEP_NODELIST": "gpu[003-007,011],x1", "SLURM_NTASKS": "48", "SLURM_PROCID": "9", "SLURM_JOB_ID": "4100"},
            ClusterSpec("gpu003:60004", 48, 9),
        ),
        ({"SLURM_STEP_NODELIST": "node7", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_JOB_ID": "1"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b,c", "TPU_WORKER_ID": "2"}, ClusterSpec("a:8476", 3, 2)),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
    ],
)  # fmt: skip
def test_environments(environ, expected):
    assert cluster_spec(environ) == expected


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"DSV3_COORDINATOR": "h", "DSV3_PROCESSES": "2", "DSV3_PROCESS_ID": "0"}, "DSV3_COORDINATOR='h'"),
        ({"DSV3_COORDINATOR": "h:1", "DSV3_PROCESSES": "two", "DSV3_PROCESS_ID": "0"}, "DSV3_PROCESSES='two'"),
        ({"DSV3_COORDINATOR": "h:1", "DSV3_PROCESSES": "2"}, "DSV3_PROCESS_ID=None"),
        ({"DSV3_COORDINATOR": "h:1", "DSV3_PROCESSES": "2", "DSV3_PROCESS_ID": "2"}, "process 2 of 2"),
        (
            {"DSV3_COORDINATOR": "h:1", "DSV3_PROCESSES": "2", "DSV3_PROCESS_ID": "0", "DSV3_JOIN_TIMEOUT_S": "soon"},
            "DSV3_JOIN_TIMEOUT_S='soon'",
        ),
        *(
            ({"DSV3_COORDINATOR": "h:1", "DSV3_PROCESSES": "2", "DSV3_PROCESS_ID": "0"} | {name: value}, f"{name}=")
            for name, value in [
                ("DSV3_PROCESSES", "²"), ("DSV3_PROCESSES", "9" * 5000), ("DSV3_PROCESSES", "1000000000"),
                ("DSV3_PROCESSES", "0"),
                ("DSV3_PROCESS_ID", "²"), ("DSV3_COORDINATOR", "h:" + "9" * 5000), ("DSV3_COORDINATOR", "h:65536"),
                ("DSV3_COORDINATOR", "h:0"), ("DSV3_JOIN_TIMEOUT_S", "1e300"), ("DSV3_HEARTBEAT_S", "1e300"),
            ]
        ),
    ],
)  # fmt: skip
def test_contradictions_are_named(environ, named):
    with pytest.raises(UserError, match=named.replace("(", r"\(")) as error:
        cluster_spec(environ)
    assert len(str(error.value)) < 200


@pytest.mark.skipif(sys.platform != "linux", reason="names of threads are read from /proc")
def test_virtual_devices_have_threads_to_wait_in():
    program = """if 1:
        from pathlib import Path
        import jax
        from dsv3_jax.cluster.processes import join
        join()
        jax.block_until_ready(jax.jit(lambda a: a + 1)(1))
        print(sum("XLAEigen" in name.read_text() for name in Path("/proc/self/task").glob("*/comm")))"""
    environ = {k: v for k, v in os.environ.items() if k != "NPROC"} | {"JAX_NUM_CPU_DEVICES": "3", "PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, "-c", program], env=environ, text=True, capture_output=True, check=True)
    assert int(found.stdout) >= 3 * 8


def test_a_missing_process_is_named_in_time():
    """Two of three come: both end within the timeout (and a start) and say that it is process 1 that is missing."""
    port, began = free_port(), time.monotonic()
    program = ["-m", "dsv3_jax.cli", "train", "configs/tiny.yaml", "name=never"]
    running = [start(program, process, 3, port, DSV3_JOIN_TIMEOUT_S="15") for process in (0, 2)]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 2
        assert "1 of 3 processes did not join within 15 s: missing 1; joined: 0 on" in errors
        assert len(errors.strip().splitlines()) == 1
    assert time.monotonic() - began < 90
    assert not (ROOT / "runs" / "never").exists()


def test_a_missing_coordinator_is_named_in_time():
    process = start(
        ["-m", "dsv3_jax.cli", "train", "configs/tiny.yaml", "name=never"], 1, 2, free_port(), DSV3_JOIN_TIMEOUT_S="2"
    )
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "process 0 at 127.0.0.1:" in errors
    assert "did not answer within 2 s" in errors


def test_two_with_one_number_are_refused():
    port = free_port()
    program = ["-m", "dsv3_jax.cli", "train", "configs/tiny.yaml", "name=never"]
    running = [start(program, process, 3, port, DSV3_JOIN_TIMEOUT_S="40") for process in (0, 1, 1)]
    outcomes = [process.communicate(timeout=120)[1] for process in running]
    assert all("two processes have DSV3_PROCESS_ID=1" in errors for errors in outcomes[:1])
    assert all(process.returncode == 2 for process in running)


@pytest.mark.slow(minutes=2)
def test_two_processes_equal_one_device():
    meshes = ["fsdp=8", "expert=8", "data=2 pipe=2 expert=2"]
    port = free_port()
    program = ["-m", "tests.cluster.two_processes", *meshes]
    first, second = (start(program, process, 2, port) for process in (0, 1))
    output, errors = first.communicate(timeout=900)
    second.wait(timeout=60)
    assert first.returncode == 0, errors[-3000:]
    results = json.loads(output.strip().splitlines()[-1])
    assert set(results) == set(meshes)
    for mesh, found in results.items():
        assert found["devices"] == 8
        assert found["loss"] <= 2e-6, mesh
        assert found["gradient"] <= 1e-4, mesh
    assert results["fsdp=8"]["rows"] == 8  # of 16: each process loads its own half


@pytest.mark.slow(minutes=3)
def test_launch_trains_evaluates_and_resumes(micro_overrides, tmp_path):
    """`dsv3 launch` writes one run, with the metrics of one process's training, and a checkpoint that one device reads."""

    def launch(*args: str) -> subprocess.CompletedProcess:
        two = ["launch", "--processes", "2", "--devices", "2"]
        return dsv3_process(*two, *args, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})

    def alone(*args: str) -> subprocess.CompletedProcess:
        return dsv3(*args, cwd=tmp_path)

    micro = [*micro_overrides, "model.num_hidden_layers=2", "data.batch_size=8", "train.eval_every=9"]
    config = str(ROOT / "configs" / "tiny.yaml")
    done = launch("train", config, *micro, "parallel.fsdp=2", "parallel.expert=2", "name=two", "train.steps=4")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 4/4") >= 1
    assert "4 devices in 2 process(es): fsdp 2 x expert 2" in done.stdout
    # on with one device, and on with two processes again on another mesh
    done = alone("resume", "runs/two", "train.steps=5", "parallel.fsdp=1", "parallel.expert=1")
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stdout
    done = launch("resume", "runs/two", "train.steps=6", "parallel.fsdp=4")
    assert done.returncode == 0, done.stderr
    assert "4 devices in 2 process(es): fsdp 4" in done.stdout
    done = alone("train", config, *micro, "name=one")
    assert done.returncode == 0, done.stderr
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("two", "one")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    evaluations = [json.loads(run("eval", "runs/two").stdout.splitlines()[-1]) for run in (alone, launch)]
    assert evaluations[0]["loss"] == pytest.approx(evaluations[1]["loss"], rel=1e-5)
    texts = [run("generate", "runs/two", "--prompt", "the quick", "--max-new-tokens", "5") for run in (alone, launch)]
    assert all(done.returncode == 0 for done in texts), texts[1].stderr
    assert texts[0].stdout.splitlines()[-1] == texts[1].stdout.splitlines()[-1]
    assert (tmp_path / "runs" / "two" / "sample.txt").read_text().startswith("document")


def test_launch_ends_all_when_one_fails(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "dsv3_jax.cli", "launch", "--processes", "2", "--devices", "2", "train", "nowhere.yaml"],
        cwd=tmp_path, text=True, capture_output=True, timeout=120, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2
    assert "cannot read config nowhere.yaml" in done.stderr
