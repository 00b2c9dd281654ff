"""What a supervisor does when workers end, as hosts that play their parts; and bad requests."""

import ast
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from dsv3_jax import streams
from dsv3_jax.config import load_config
from dsv3_jax.elastic import command
from dsv3_jax.elastic import supervisor as module
from dsv3_jax.elastic.command import job_for, leave_spares
from dsv3_jax.elastic.hosts import Start
from dsv3_jax.elastic.supervisor import Supervisor
from dsv3_jax.errors import UserError
from dsv3_jax.runs.directory import SUPERVISOR_LOCK, run_directory
from tests.conftest import ROOT
from tests.test_package import imports

TINY = ROOT / "configs" / "tiny.yaml"
OVERRIDES = ["data.batch_size=24", "parallel.fsdp=4", "parallel.expert=2"]


@dataclass
class Actor:
    """A host whose workers end with these codes, one after the other; 'runs' does not end by itself."""

    name: str
    part: list
    ready: bool = True
    lost: bool = False
    pid: int | None = None
    code: int | None = None
    reason: str = ""
    started: list[Start] = field(default_factory=list)

    def address(self) -> str:
        return "127.0.0.1:1"

    def start(self, start: Start) -> None:
        self.started.append(start)
        act = self.part.pop(0)
        self.code = None if act in ("runs", "lost") else act
        self.lost = act == "lost"

    def signal(self, number: int) -> None:
        if self.code is None:
            self.code = 130 if number == signal.SIGTERM else -number


@dataclass
class Stage:
    actors: list[Actor]

    def hosts(self):
        return [a for a in self.actors if a.ready and not a.lost]

    def close(self) -> None: ...


@pytest.fixture
def play(tmp_path, monkeypatch):
    """(parts of hosts by name, what happens meanwhile) -> exit code, what was said, events, hosts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "_LOOK_S", 0.1)
    monkeypatch.setenv("DSV3_JOIN_TIMEOUT_S", "0.3")

    def run(parts, workers="2:4", meanwhile=None, ready=None, say=None):
        job = job_for(load_config(TINY, [*OVERRIDES, "name=play"]), ["train", "x"], workers, 2)
        actors = [Actor(name, list(part), ready=name not in (ready or ())) for name, part in parts.items()]
        said = []
        supervisor = Supervisor(job, Stage(actors), say or said.append)
        if meanwhile is not None:
            threading.Thread(target=meanwhile, args=(actors, supervisor), daemon=True).start()
        code = supervisor.run()
        events = [json.loads(line) for line in job.run.events_file.read_text().splitlines()]
        return code, said, events, actors

    return run


def of(events, name):
    return [e for e in events if e["event"] == name]


def test_a_killed_worker_is_started_again_with_the_others(play):
    code, said, events, hosts = play({"a": [0 - 9, 0], "b": ["runs", 0], "c": ["runs", 0], "d": ["runs", 0]})
    assert code == 0
    assert said == ["attempt 1 failed: process 0 on a was ended by SIGKILL"]
    assert [e["workers"] for e in of(events, "launch")] == [4, 4]
    first, second = hosts[1].started
    assert first.environ["DSV3_PROCESS_ID"] == second.environ["DSV3_PROCESS_ID"] == "1"
    assert first.args == ["train", "x", "--workers", "2:4"]
    assert first.log != second.log


def test_a_lost_host_leaves_the_largest_feasible_number(play):
    code, said, events, hosts = play({"a": ["runs", 0], "b": ["lost"], "c": ["runs", 0], "d": ["runs", 0]})
    assert code == 0
    assert [e["hosts"] for e in of(events, "launch")] == [["a", "b", "c", "d"], ["a", "c", "d"]]
    assert hosts[3].started[1].environ["DSV3_PROCESSES"] == "3"
    assert "b, of process 1, is lost" in said[0]


def test_bad_input_is_not_tried_again(play):
    code, _, events, _ = play({"a": [2], "b": [2]}, "2")
    assert code == 2
    assert len(of(events, "launch")) == 1


def test_a_refusal_counts_for_more_than_those_who_die_of_it(play):
    """And says where to look if it is not process 0's, whose lines are shown anyway."""
    code, said, events, _ = play({"a": [0 - 6], "b": [2]}, "2")
    assert code == 2
    assert said == ["process 1 on b says why in a log of runs/play/logs"]
    assert len(of(events, "launch")) == 1


def refuses(reason: str, log: str = ""):
    """Process 0 or 1 ends with bad input, `reason` given to its host, and `log` in process 0's log."""

    def meanwhile(actors, _):
        while not all(a.started for a in actors):
            time.sleep(0.02)
        if log:
            Path(actors[0].started[0].log).write_text(log)
        actor = actors[0] if log else actors[1]
        actor.reason, actor.code = reason, 2

    return meanwhile


def test_why_a_worker_has_refused_is_said_once(play, monkeypatch):
    """By process 0's log if it could be written there, and by the supervisor otherwise."""
    monkeypatch.setattr(module, "_LAST_MESSAGES_S", 0.05)
    parts = {"a": ["runs"], "b": ["runs"]}
    code, said, _, _ = play(parts, "2", refuses("runs/x: Disk quota exceeded"))
    assert (code, said) == (2, ["process 1 on b: runs/x: Disk quota exceeded"])
    code, said, _, _ = play(parts, "2", refuses("data.path: bad", "step 1\ndsv3: error: data.path: bad\nbye\n"))
    assert (code, said) == (2, ["step 1", "dsv3: error: data.path: bad", "bye"])
    code, said, _, _ = play(parts, "2", refuses("runs/x: no space left on the device", "step 1\n"))
    assert (code, said) == (2, ["step 1", "process 0 on a: runs/x: no space left on the device"])


def test_why_a_worker_has_failed_is_in_the_cause(play):
    def meanwhile(actors, _):
        while not all(a.started for a in actors):
            time.sleep(0.02)
        actors[1].reason, actors[1].code = "missing 0", 75

    code, said, events, _ = play({"a": ["runs", 0], "b": ["runs", 0]}, "2", meanwhile)
    assert code == 0
    assert of(events, "failure")[0]["cause"] == "process 1 on b could not join the others: missing 0"
    assert said == ["attempt 1 failed: process 1 on b could not join the others: missing 0"]


def test_nobody_reads_what_a_supervisor_says(play, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as nobody:
        monkeypatch.setattr(sys, "stdout", nobody)
        code, _, events, _ = play({"a": [0 - 9, 0], "b": ["runs", 0]}, "2", say=streams.say)
    assert code == 0
    assert [e["event"] for e in events] == ["launch", "failure", "launch", "done"]


def test_each_attempt_has_a_token_of_its_own(play):
    """In the environment, which others cannot read, and not among the arguments, which they can."""
    _, _, _, hosts = play({"a": [0 - 9, 0], "b": ["runs", 0]}, "2")
    (first, second), (also_first, also_second) = ([start.environ["DSV3_JOIN_TOKEN"] for start in h.started] for h in hosts)
    assert first == also_first != second == also_second
    assert len(first) >= 32
    assert not any(first in arg or second in arg for h in hosts for start in h.started for arg in start.args)


def test_a_terminal_that_goes_saves_once(play):
    """The kernel and the shell may each send SIGHUP; a second signal of another kind does not wait for a save."""

    def meanwhile(actors, _):
        while not all(a.started for a in actors):
            time.sleep(0.02)
        for actor in actors:
            actor.signal = sent.append
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.1)
        for actor in actors:
            actor.code = 130

    sent = []
    code, _, events, _ = play({"a": ["runs"], "b": ["runs"]}, "2", meanwhile)
    assert code == 130
    assert sent[:2] == [signal.SIGTERM] * 2
    assert signal.SIGTERM not in sent[2:]
    assert [e["event"] for e in events] == ["launch", "done"]


@pytest.mark.parametrize("lock", ["lock", SUPERVISOR_LOCK])
def test_a_second_supervisor_writes_nothing(tmp_path, monkeypatch, lock):
    """Neither beside another supervisor nor beside a training without one: no event, no log, and the deadline stays."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "_LOCK_PATIENCE_S", 0.0)
    monkeypatch.setattr(command, "_engine", lambda *_: pytest.fail("hosts are started"))
    config = load_config(TINY, [*OVERRIDES, "name=play"])
    run = run_directory(config)
    with run.claimed(lock_name=lock):
        before = {p.name: p.read_bytes() for p in run.path.iterdir()}
        with pytest.raises(UserError, match="runs/play is being trained by another process"):
            command.supervise(config, [], "local", "2:4", 2)
        after = {p.name: p.read_bytes() for p in run.path.iterdir()}
    assert after.keys() - before.keys() <= {SUPERVISOR_LOCK}
    assert set(after.values()) == {b""}


def test_a_host_says_why_its_worker_could_not_begin(tmp_path):
    """A real one, which imports nothing first: the log that it should write into is not there."""
    program = "import dsv3_jax.elastic.host as host; host._import_all = lambda: None; host.main()"
    start = {"entry": "a:b", "args": [], "environ": {}, "log": str(tmp_path / "gone" / "log")}
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as host:
        assert host.stdin is not None
        assert host.stdout is not None
        host.stdin.write(json.dumps({"start": start}) + "\n")
        host.stdin.flush()
        said = [json.loads(host.stdout.readline()) for _ in range(3)]
        host.stdin.close()
    assert [*said[0], *said[1]] == ["ready", "pid"]
    reason = f"{tmp_path}/gone/log: No such file or directory; what was saved before is intact"
    assert said[2] == {"exit": 2, "reason": reason}


def test_it_is_given_up_when_nothing_comes_of_it(play):
    code, said, events, _ = play({"a": [1] * 9, "b": ["runs"] * 9}, "2")
    assert code == 1
    assert "given up: 6 attempts without a new step; the last: process 0 on a ended with exit code 1" in said[-1]
    assert len(of(events, "failure")) == 6


def test_attempts_that_make_steps_are_not_in_vain(play, monkeypatch):
    """Seven failures, each a step further; then six without one."""
    steps = iter([0, *(step for step in range(1, 8) for _ in range(2)), *[7] * 99])  # asked before and after each attempt
    monkeypatch.setattr(Supervisor, "_reached", lambda _: next(steps))
    code, _, events, _ = play({"a": [1] * 13, "b": ["runs"] * 13}, "2")
    assert code == 1
    assert len(of(events, "failure")) == 13


def test_hosts_that_come_later_are_taken_in(play):
    def meanwhile(actors, supervisor):
        while not all(a.started for a in actors[:2]):
            time.sleep(0.02)
        time.sleep(0.3)
        assert not any(a.started for a in actors[2:])
        for actor in actors[2:]:
            actor.ready = True
        time.sleep(0.3)  # no step has been made: nothing is interrupted yet
        assert all(a.code is None for a in actors[:2])
        row = {"step": 1, "time": time.time()}
        supervisor._job.run.metrics_file.write_text(json.dumps(row) + "\n")

    code, said, events, _ = play(
        {"a": ["runs", 0], "b": ["runs", 0], "c": [0], "d": [0]}, ready=("c", "d"), meanwhile=meanwhile
    )
    assert code == 0
    assert [e["workers"] for e in of(events, "launch")] == [2, 4]
    assert "4 hosts are available: saving, to go on with 4 workers instead of 2" in said
    assert not of(events, "failure")


def test_too_few_hosts_are_waited_for(play):
    def meanwhile(actors, _):
        time.sleep(0.6)
        actors[1].ready = True

    code, said, _, _ = play({"a": [0], "b": [0]}, ready=("b",), meanwhile=meanwhile)
    assert code == 0
    assert said[0] == "waiting for hosts: 1 of 2 to 4"


def test_a_signal_saves_and_ends(play):
    def meanwhile(actors, _):
        while not all(a.started for a in actors):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    code, _, events, _ = play({"a": ["runs"], "b": ["runs"]}, "2", meanwhile)
    assert code == 130
    assert [e["event"] for e in events] == ["launch", "done"]


def test_process_0_that_cannot_even_end_itself_is_noticed(play, monkeypatch):
    monkeypatch.setattr(module, "_LATE_S", 0.1)

    def meanwhile(actors, supervisor):
        while not all(a.started for a in actors):
            time.sleep(0.02)
        supervisor._job.run.deadline_file.write_text(str(time.time() - 1))

    code, said, _, _ = play({"a": ["runs", 0], "b": ["runs", 0]}, "2", meanwhile)
    assert code == 0
    assert "process 0 has neither finished its step in time nor ended itself" in said[0]


def test_a_stuck_worker_is_named_by_its_stacks(play, monkeypatch):
    monkeypatch.setattr(module, "_LAST_MESSAGES_S", 0.01)

    def meanwhile(actors, supervisor):
        while not all(a.started for a in actors):
            time.sleep(0.02)
        with open(actors[1].started[0].log, "w") as log:
            log.write("Timeout (0:00:08)!\nThread 0x1 (most recent call first):\n")
        actors[0].code = 1

    code, said, _, _ = play({"a": ["runs", 0], "b": ["runs", 0]}, "2", meanwhile)
    assert code == 0
    assert "no step finished in time; see the stacks in " in said[0]
    assert "attempt-1-process-1.log" in said[0]


@pytest.mark.parametrize(
    ("workers", "devices", "named"),
    [
        (None, 2, r"--workers \(missing\)"),
        ("4:2", 2, "--workers 4:2: MIN must be"),
        ("0:2", 2, "--workers 0:2"),
        ("two", 2, "--workers two: use MIN:MAX"),
        ("1:" + "9" * 400, 2, "--workers 1:9+: use MIN:MAX"),
        ("1:100000000", 2, "--workers 1:100000000: MIN must be 1 or more, MAX not less, and at most 65,536"),
        ("2:4", 10**18, "--devices 1000000000000000000: give the number of devices of each worker, 1 to 1,024"),
        ("2:4", -1, "--devices -1"),
        ("2:4", None, r"--devices \(missing\)"),
        ("5:5", 1, "no mesh over 5 to 5 workers of 1 devices .*numbers that do: 1, 2, 3, 4"),
    ],
)
def test_requests_that_cannot_be(workers, devices, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(TINY, ["data.batch_size=12", "model.hidden_size=128", "name=never"])
    with pytest.raises(UserError, match=named):
        job_for(config, [], workers, devices)
    assert not list(tmp_path.iterdir())


def test_workers_beyond_a_feasible_number_leave(monkeypatch, capsys):
    """As under SLURM, which starts one on each node that is up."""
    config = load_config(TINY, OVERRIDES)  # 24 rows: 5 workers of 2 devices have no mesh, 4 have
    named = {"DSV3_COORDINATOR": "h:1", "DSV3_PROCESSES": "5"}
    for name, value in (named | {"DSV3_PROCESS_ID": "4"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        leave_spares(config, 2)
    assert ended.value.code == 0
    assert "process 4 is spare: the largest feasible number of workers is 4 of 5" in capsys.readouterr().out
    monkeypatch.setenv("DSV3_PROCESS_ID", "3")
    leave_spares(config, 2)
    assert os.environ["DSV3_PROCESSES"] == "4"
    with pytest.raises(UserError, match="no mesh over 4 or fewer workers of 7 devices"):
        leave_spares(config, 7)


def test_a_host_imports_what_training_does():
    """Before it forks: a worker that still has to import starts seconds later."""
    tree = ast.parse((ROOT / "dsv3_jax/cli.py").read_text())
    train = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train")
    used = {node.module for node in ast.walk(train) if isinstance(node, ast.ImportFrom)}
    used = {module for module in used if module and module.startswith("dsv3_jax.training.")}
    assert used
    assert used <= imports(ROOT / "dsv3_jax/elastic/host.py")
