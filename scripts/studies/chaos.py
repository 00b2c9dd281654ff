"""A training run under seeded failures against an undisturbed one: nothing may differ, and what the failures cost.

    python scripts/studies/chaos.py                            # 25 failures, 4 workers x 2 devices, 10 to 15 minutes on 2 cores
    python scripts/studies/chaos.py --failures 5 --kinds kill spin --seed 7
    python scripts/studies/chaos.py --failures 8 --engine ray --kinds kill stop spin lost

Kinds: `kill` (SIGKILL of a worker), `stop` (SIGSTOP), `spin` (a worker stuck in a loop while its heartbeat goes on), `lost` (a
host with its worker and its copies of the state; it is back after some seconds), `cut` (a host's network, by namespaces; needs
root), `flip` (one bit of the latest checkpoint, and a kill), `full` (the run's disk is filled, which ends the run; then it is
emptied, and the same command is given; needs root, to mount a small one). Each comes in a step, a save, a restore or a start,
at any process. Checked at the end: every batch once and in order, by the checksum that the devices made of it; the losses;
nothing done again but what followed the newest checkpoint. Then the run's own report. Exits 1 if a check fails. Linux only.
"""

import argparse
import atexit
import contextlib
import errno
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from _namespaces import NamespaceEngine
from rich.console import Console
from rich.table import Table

from dsv3_jax.checkpoint.manifest import verify
from dsv3_jax.checkpoint.retention import complete_steps
from dsv3_jax.config import load_config
from dsv3_jax.elastic.command import job_for
from dsv3_jax.elastic.hosts import Engine, Host, HostProcess, LocalEngine
from dsv3_jax.elastic.supervisor import Job, Supervisor
from dsv3_jax.errors import UserError
from dsv3_jax.runs.directory import RunDirectory
from dsv3_jax.runs.goodput import account, read_events
from dsv3_jax.runs.metrics import last_row, read_rows
from dsv3_jax.runs.report import show

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"
KINDS, AS_ROOT = ("kill", "stop", "spin", "lost", "flip"), ("cut", "full")
DISK = "256m"  # size of the disk that is filled
MOMENTS = ("step", "step", "save", "restore", "start")
STUCK_S, HEARTBEAT_S, JOIN_S, BACK_S = 8, 10, 15, 20
EVERY_STEPS = 5
# on SIGUSR1 a worker's main thread hangs while its other threads go on; Python runs this at the start of a host
_SPIN = "import signal\nsignal.signal(signal.SIGUSR1, lambda *_: exec('while True: pass'))\n"


def _corpus(directory: Path) -> None:
    directory.mkdir()
    words, rng = [f"{a}{b}" for a in ("ba", "do", "ri", "mu") for b in ("n", "st", "lla", "ke", "")], random.Random(0)
    for i in range(60):
        (directory / f"{i}.txt").write_text(f"document {i} " + " ".join(rng.choice(words) for _ in range(rng.randint(20, 400))))


def _overrides(directory: Path, name: str) -> list[str]:
    """A micro model whose tokens go to every expert: on another mesh sums differ in their last bits, which a router would turn,
    sooner or later, into another expert for some token."""
    return [
        "model.vocab_size=300", "model.hidden_size=48", "model.intermediate_size=48", "model.moe_intermediate_size=24",
        "model.num_hidden_layers=2", "model.num_nextn_predict_layers=0", "model.num_attention_heads=2", "model.q_lora_rank=16",
        "model.kv_lora_rank=16", "model.qk_nope_head_dim=8", "model.qk_rope_head_dim=8", "model.v_head_dim=8",
        "model.n_routed_experts=8", "model.n_group=1", "model.topk_group=1", "model.num_experts_per_tok=8", "optim.lr=3e-4",
        "optim.lr_final=3e-4", "optim.warmup_steps=2", "data.seq_len=32", "data.batch_size=24",
        f"data.path={directory}/docs/*.txt", f"data.cache_dir={directory}/cache", "data.validation_fraction=0.2",
        "train.steps=1000000", "train.eval_every=1000000",
        "train.eval_batches=1", f"checkpoint.every_steps={EVERY_STEPS}", "parallel.fsdp=4", "parallel.expert=2",
        f"train.stuck_after_s={STUCK_S}", "train.slow_after_s=60", f"checkpoint.local_dir={directory}/$DSV3_HOST",
        f"name={name}",
    ]  # fmt: skip


@dataclass
class Injected:
    """A failure, and when it came."""

    kind: str
    moment: str
    process: int
    attempt: int
    at: float  # seconds since 1970
    newest: int  # step of the newest undamaged checkpoint at that time


class Chaos(threading.Thread):
    """Injects failures into a supervised run, each into a later attempt than the one before."""

    def __init__(self, supervisor: Supervisor, engine: Engine, run: RunDirectory, kinds: list[str], seed: int, steps: int):
        super().__init__(daemon=True)
        self.supervisor = supervisor  # replaced when a full disk has ended it
        self._engine, self._run, self._kinds = engine, run, kinds
        self._rng, self._steps = random.Random(seed), steps
        self.injected: list[Injected] = []
        self.filler = run.path.parent / "filler"

    def run(self) -> None:
        attempt = 0
        for kind in self._kinds:
            self._until(lambda attempt=attempt: self.supervisor.attempt > attempt)
            # there must be a checkpoint to damage, and another one
            moment = self._rng.choice(MOMENTS) if kind != "flip" else "step"
            self._await(moment)
            if kind == "flip":
                self._until(lambda: len(self._undamaged_checkpoints()) > 1)
            attempt = self.supervisor.attempt
            self._inject(kind, moment)
        self._until(lambda: last_row(self._run.metrics_file).get("step", 0) >= self._steps)
        os.kill(os.getpid(), signal.SIGTERM)  # rather than end by itself, whose report takes longer than the run

    def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            time.sleep(0.02)

    def _happened(self, event: str) -> bool:
        """Whether the event has happened since this attempt was launched."""
        return any(e["event"] == event and e["time"] >= self.supervisor.launched for e in read_events(self._run))

    def _await(self, moment: str) -> None:
        """Wait until a random time within such a moment of the attempt."""
        self._until(lambda: len(self.supervisor.workers) > 0 and all(h.pid for h in self.supervisor.workers))
        if moment in ("step", "save"):
            self._until(lambda: last_row(self._run.metrics_file).get("time", 0) > self.supervisor.launched)
        if moment in ("save", "restore"):
            self._until(lambda: self._happened("saved" if moment == "save" else "started"))
        time.sleep(self._rng.uniform(0, {"step": 3.0, "save": 0.2, "restore": 1.0, "start": 1.0}[moment]))

    def _inject(self, kind: str, moment: str) -> None:
        workers = self.supervisor.workers
        if not workers:  # the attempt has just ended
            return
        process = self._rng.randrange(len(workers))
        host = workers[process]
        steps = self._undamaged_checkpoints()
        if kind == "flip":
            self._flip(self._run.checkpoints / str(steps.pop()))
        self.injected.append(Injected(kind, moment, process, self.supervisor.attempt, time.time(), steps[-1] if steps else 0))
        if kind == "full":
            _fill(self.filler)
        elif kind == "lost":
            _lose(self._engine, host)
            shutil.rmtree(self._run.path.parents[1] / host.name, ignore_errors=True)
        elif kind == "cut":
            assert isinstance(self._engine, NamespaceEngine)
            self._engine.cut(host.name)
        else:
            host.signal({"stop": signal.SIGSTOP, "spin": signal.SIGUSR1}.get(kind, signal.SIGKILL))

    def _undamaged_checkpoints(self) -> list[int]:
        """Steps of the undamaged checkpoints. One may be deleted while it is read."""
        undamaged = []
        for step in complete_steps(self._run.checkpoints):
            with contextlib.suppress(UserError, OSError):
                verify(self._run.checkpoints / str(step))
                undamaged.append(step)
        return undamaged

    def _flip(self, checkpoint: Path) -> None:
        file = self._rng.choice(sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.stat().st_size))
        data = bytearray(file.read_bytes())
        data[self._rng.randrange(len(data))] ^= 1 << self._rng.randrange(8)
        file.write_bytes(data)


def _supervised(
    directory: Path, name: str, steps: int, engine_name: str, workers: str, devices: int, kinds: list[str], seed: int
) -> list[Injected]:
    """Train `runs/NAME` for at least `steps` steps, with failures of these kinds. Raises SystemExit if the run gives up."""
    overrides = _overrides(directory, name)
    job = job_for(load_config(TINY, overrides), ["train", str(TINY), *overrides], workers, devices, rehearse=bool(kinds))
    engine = _engine(engine_name, kinds, job)
    chaos = Chaos(Supervisor(job, engine, _print_indented), engine, job.run, kinds, seed, steps)
    try:
        chaos.start()
        while (code := _code(chaos.supervisor)) == 2 and chaos.filler.exists():
            chaos.filler.unlink()
            print("  the disk is emptied; the same command again:", flush=True)
            chaos.supervisor = Supervisor(job, engine, _print_indented)
    finally:
        engine.close()
    if code != 130:
        raise SystemExit(f"the run {name} ended with exit code {code}")
    return chaos.injected


def _print_indented(line: str) -> None:
    print(f"  {line}", flush=True)


def _code(supervisor: Supervisor) -> int:
    """The supervisor's exit code; 2 if the disk is too full for its own events."""
    try:
        return supervisor.run()
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(f"  {error}", flush=True)
        return 2


def _lose(engine: Engine, host: Host) -> None:
    if isinstance(host, HostProcess):
        host.process.kill()
    else:
        engine.lose(host)  # type: ignore[attr-defined]


def _engine(name: str, kinds: list[str], job: Job) -> Engine:
    if name == "ray":
        from _ray_cluster import RayClusterEngine

        return RayClusterEngine(job.most, job.devices, BACK_S)
    return (NamespaceEngine if "cut" in kinds else LocalEngine)(job.most, job.devices, BACK_S)


def _fill(filler: Path) -> None:
    """Make a file that fills the disk."""
    size = 2**30
    with open(filler, "wb") as file:
        while size:
            try:
                os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, size)
            except OSError:
                size //= 2


def _compare(calm: RunDirectory, stormy: RunDirectory, injected: list[Injected], wanted: int) -> dict[str, object]:
    """Checks by name, with whether they hold, and figures."""
    expected, found = read_rows(calm.metrics_file), read_rows(stormy.metrics_file)
    expected, found = expected[: len(found)], found[: len(expected)]  # how far each came after the last required step is chance
    events = read_events(stormy)
    meshes = {json.dumps(e["mesh"]) for e in events if e["event"] == "started"}
    restored = [e for e in events if e["event"] == "restored"]
    lost = [
        (i.kind, i.newest, r["step"])
        for i in injected
        if (r := next((r for r in restored if r["time"] > i.at), None)) is not None and r["step"] < i.newest
    ]
    differs = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(found, expected, strict=False))
    for step in complete_steps(stormy.checkpoints):
        verify(stormy.checkpoints / str(step))
    return {
        "failures injected": len(injected) == wanted,
        "every step once, in order": [r["step"] for r in found] == [r["step"] for r in expected],
        "the same batches": [r["batch_checksum"] for r in found] == [r["batch_checksum"] for r in expected],
        "no undamaged checkpoint was passed over": not lost,
        "same losses" if len(meshes) == 1 else "losses within 1e-5": differs == 0 if len(meshes) == 1 else differs <= 1e-5,
        "largest relative difference of a step's loss": differs,
        "meshes": sorted(meshes),
        "processes hit": sorted({i.process for i in injected}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--failures", type=int, default=25)
    parser.add_argument("--kinds", nargs="+", choices=(*KINDS, *AS_ROOT), default=list(KINDS))
    parser.add_argument(
        "--engine", choices=("local", "ray"), default="local", help="ray: a cluster on this machine, with a node for each host"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", default="2:4")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--steps", type=int, help="of the run; ten for each failure if not given")
    parser.add_argument("--out", type=Path, help="directory that keeps the runs; a temporary one if not given")
    options = parser.parse_args()
    if options.engine == "ray" and "cut" in options.kinds:
        parser.error("--kinds cut: networks are cut between hosts of --engine local only")
    steps = options.steps or 10 * options.failures + 20
    directory = (options.out or Path(tempfile.mkdtemp(prefix="chaos-"))).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    _corpus(directory / "docs")
    (directory / "sitecustomize.py").write_text(_SPIN)
    os.environ |= {
        "PYTHONPATH": os.pathsep.join([str(directory), os.environ.get("PYTHONPATH", "")]),
        "DSV3_HEARTBEAT_S": str(HEARTBEAT_S), "DSV3_JOIN_TIMEOUT_S": str(JOIN_S),
    }  # fmt: skip
    os.chdir(directory)
    if "full" in options.kinds:
        Path("runs").mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", "runs"], check=True)
        atexit.register(subprocess.run, ["umount", "--lazy", str(directory / "runs")])
    rng = random.Random(options.seed)
    kinds = [options.kinds[i % len(options.kinds)] for i in range(options.failures)]
    rng.shuffle(kinds)
    print(f"undisturbed, {steps} steps:")
    most = options.workers.rpartition(":")[2]
    _supervised(directory, "calm", steps, "local", most, options.devices, [], 0)
    print(f"with {len(kinds)} failures, seed {options.seed}:")
    injected = _supervised(directory, "stormy", steps, options.engine, options.workers, options.devices, kinds, options.seed)
    stormy = RunDirectory(directory / "runs" / "stormy")
    table = Table("attempt", "what", "when", "process", "newest checkpoint", title="injected")
    for i in injected:
        table.add_row(str(i.attempt), i.kind, i.moment, str(i.process), str(i.newest))
    console = Console(highlight=False, width=150)
    console.print(table)
    show(stormy, console)
    outcome = _compare(RunDirectory(directory / "runs" / "calm"), stormy, injected, len(kinds))
    outcome |= {"median gap s": statistics.median(f.gap for f in account(stormy).failures)} if injected else {}
    print(json.dumps(outcome))
    if options.out is None:
        shutil.rmtree(directory)
    sys.exit(any(held is False for held in outcome.values()))


if __name__ == "__main__":
    main()
