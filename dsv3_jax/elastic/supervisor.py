"""Keeps a run going: starts workers on the available hosts, notices when one fails, and starts again on what is left.

A run is a sequence of attempts. Each has the largest number of workers for which its configuration has a feasible mesh
(cost/feasible.py) and goes on from the latest undamaged checkpoint. When one worker ends, the attempt does: JAX's processes
cannot go on without one of theirs. Nothing here depends on the engine that the hosts come from.
"""

import contextlib
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum, auto
from pathlib import Path
from typing import Any

from dsv3_jax.cluster.roll_call import new_token
from dsv3_jax.cluster.stop import stop_signals
from dsv3_jax.config import Config
from dsv3_jax.cost.feasible import feasible_worker_counts, largest_feasible_count
from dsv3_jax.elastic.hosts import Engine, Host, Start
from dsv3_jax.elastic.logs import Follower, ended_by_watchdog
from dsv3_jax.errors import EXIT_BAD_INPUT, EXIT_NOT_JOINED, EXIT_STOPPED
from dsv3_jax.records import number
from dsv3_jax.runs.directory import RunDirectory
from dsv3_jax.runs.events import EventLog
from dsv3_jax.runs.metrics import last_row
from dsv3_jax.streams import say

_POLL_S = 0.05
_LOOK_S = 2.0  # between looks for more hosts, and at the deadline of process 0
_LATE_S = 10.0  # how long after a worker's own deadline the supervisor gives it up
_GRACE_S = 120.0  # for a save after SIGTERM
_LAST_MESSAGES_S = 1.0  # for the others to write their errors, once one has ended
_ATTEMPTS_IN_VAIN = 6  # in a row, without a new step
_BAD_ERRORS = (EXIT_BAD_INPUT,)  # exit codes after which another attempt would fail too: bad input, divergence, a full disk


class End(Enum):
    """How an attempt ended."""

    DONE = auto()
    REFUSED = auto()  # bad input
    STOPPED = auto()  # by the user, and saved
    RESIZE = auto()  # saved, to go on with more hosts
    FAILED = auto()


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended, and if it failed, why and on which host."""

    end: End
    cause: str = ""
    host: str = ""


@dataclass(frozen=True)
class Job:
    """What a supervisor runs."""

    config: Config
    args: list[str]  # of `dsv3`, for each worker
    run: RunDirectory
    least: int  # workers
    most: int  # workers
    devices: int  # per worker
    heartbeat_s: float  # DSV3_HEARTBEAT_S of the workers
    join_s: float  # their DSV3_JOIN_TIMEOUT_S, and how long the first attempt waits for all hosts
    rehearse: bool = False  # compile for all smaller feasible numbers of workers first


class Supervisor:
    """Runs a job on an engine's hosts; `say` gets the lines that process 0 and the supervisor print."""

    def __init__(self, job: Job, engine: Engine, say: Callable[[str], None] = say):
        self._job, self._engine, self._say = job, engine, say
        job.run.logs.mkdir(parents=True, exist_ok=True)
        self._events = EventLog(job.run.events_file)
        self._signals = 0
        self.attempt = len(list(job.run.logs.glob("attempt-*-process-0.log")))  # goes on from earlier supervisors'
        self.launched = 0.0  # start of this attempt, in seconds since 1970
        self._reached_before = 0  # the last step of earlier attempts
        self.workers: list[Host] = []  # of this attempt, by process number

    def run(self) -> int:
        """Returns the run's exit code: 0, 2 for bad input, 130 if it was stopped and saved, 1 if it was given up."""
        old = {number: signal.signal(number, self._on_signal) for number in stop_signals()}
        try:
            code = self._attempts()
        finally:
            for host in self.workers:
                host.signal(signal.SIGKILL)
            for number, handler in old.items():
                signal.signal(number, handler)
        with contextlib.suppress(OSError):  # a full disk does not change how the run has ended
            self._events.write("done", code=code)
        return code

    def _on_signal(self, number: int, _frame: Any) -> None:
        if number == signal.SIGHUP and self._signals:  # of which a terminal that goes may send several
            return
        self._signals += 1
        for host in self.workers:  # the second time they are not asked to save
            host.signal(signal.SIGTERM if self._signals == 1 else signal.SIGKILL)

    def _attempts(self) -> int:
        in_vain, best = 0, self._reached()
        patience_s = self._job.join_s  # at first, for all to come; later, nobody is waited for
        while True:
            hosts = self._gather(patience_s)
            if hosts is None:
                return EXIT_STOPPED
            if self._job.rehearse and patience_s:
                self._rehearse(hosts)
            patience_s = 0.0
            outcome = self._try(hosts)
            if outcome.end in _CODES:
                return _CODES[outcome.end]
            if outcome.end is End.RESIZE:
                continue
            reached = self._reached()
            in_vain, best = (0, reached) if reached > best else (in_vain + 1, best)
            if in_vain >= _ATTEMPTS_IN_VAIN:
                self._say(
                    f"given up: {in_vain} attempts without a new step; the last: {outcome.cause}; see {self._job.run.logs}"
                )
                return 1

    def _gather(self, patience_s: float) -> list[Host] | None:
        """The hosts of the next attempt, the largest feasible number; None once the user has sent a signal.

        Waits up to `patience_s` for all hosts, and without limit for the least number.
        """
        job, printed, deadline = self._job, "", time.monotonic() + patience_s
        while not self._signals:
            hosts = self._engine.hosts()[: job.most]
            count = largest_feasible_count(job.config, job.devices, len(hosts))
            if count >= job.least and (len(hosts) == job.most or time.monotonic() >= deadline):
                return hosts[:count]
            line = f"waiting for hosts: {len(hosts)} of {job.least} to {job.most}"
            if printed != line and time.monotonic() >= deadline:
                self._say(printed := line)
            time.sleep(_POLL_S)
        return None

    def _start(self, hosts: list[Host], args: list[str], name: str) -> list[Path]:
        """Start a worker on each host. Returns their log files."""
        job = self._job
        address, token = hosts[0].address(), new_token()
        logs = [job.run.logs / f"{name}-process-{i}.log" for i in range(len(hosts))]
        for i, (host, log) in enumerate(zip(hosts, logs, strict=True)):
            environ = {
                "DSV3_COORDINATOR": address, "DSV3_PROCESSES": str(len(hosts)), "DSV3_PROCESS_ID": str(i),
                "DSV3_HEARTBEAT_S": f"{job.heartbeat_s:g}", "DSV3_JOIN_TIMEOUT_S": f"{job.join_s:g}", "DSV3_HOST": host.name,
                "DSV3_JOIN_TOKEN": token,
            }  # fmt: skip
            host.start(Start(args, environ, str(log.absolute())))
        self.workers = hosts
        return logs

    def _rehearse(self, hosts: list[Host]) -> None:
        """Compile for every smaller feasible number of workers, so that nothing is compiled when hosts are lost."""
        job = self._job
        for count in reversed(feasible_worker_counts(job.config, job.devices, range(job.least, len(hosts)))):
            began = time.monotonic()
            self._start(hosts[:count], [*job.args, "--rehearse"], f"rehearsal-{count}")
            while not self._signals and any(host.code is None and not host.lost for host in hosts[:count]):
                time.sleep(_POLL_S)
            succeeded = all(host.code == 0 for host in hosts[:count])
            self._end_all(hosts[:count])
            seconds = time.monotonic() - began
            self._events.write("rehearsed", workers=count, seconds=round(seconds, 1), well=succeeded)
            self._say(f"rehearsal for {count} workers: {'compiled' if succeeded else 'failed'} in {seconds:.0f} s")

    def _try(self, hosts: list[Host]) -> Outcome:
        """Run one attempt to its end."""
        job = self._job
        self.attempt += 1
        self.launched, self._reached_before = time.time(), self._reached()
        self._events.write("launch", attempt=self.attempt, workers=len(hosts), hosts=[h.name for h in hosts])
        job.run.deadline_file.unlink(missing_ok=True)
        try:
            logs = self._start(hosts, job.args, f"attempt-{self.attempt}")
        except OSError as error:  # the first host has been lost since it answered
            outcome, logs = Outcome(End.FAILED, f"{hosts[0].name} does not answer: {error}", hosts[0].name), []
        else:
            with Follower(logs[0], self._say) as follower:
                outcome = self._watch(hosts, follower)
        if outcome.end is End.FAILED:
            outcome = _explained(outcome, logs)
            self._events.write("failure", attempt=self.attempt, cause=outcome.cause, host=outcome.host)
            self._say(f"attempt {self.attempt} failed: {outcome.cause}")
        self._end_all(hosts)
        self.workers = []
        return outcome

    def _watch(self, hosts: list[Host], follower: Follower) -> Outcome:
        """Wait until all workers have ended well, or one has failed."""
        resizing, look, patience = False, time.monotonic() + _LOOK_S, None
        while True:
            follower.read()
            for i, host in enumerate(hosts):
                if host.lost:
                    return Outcome(End.FAILED, f"{host.name}, of process {i}, is lost", host.name)
            codes = {i: host.code for i, host in enumerate(hosts) if host.code is not None}
            if any(code in _BAD_ERRORS for code in codes.values()):  # even if others have failed because of it
                _wait_for(hosts, _LAST_MESSAGES_S)
                follower.read()
                self._say_why_refused(hosts, follower)
                return Outcome(End.REFUSED)
            bad = {i: code for i, code in codes.items() if code not in (0, EXIT_STOPPED)}
            if bad:
                i, code = next(iter(bad.items()))
                reason = f": {hosts[i].reason}" if hosts[i].reason else ""
                return Outcome(End.FAILED, f"process {i} on {hosts[i].name} {_ending(code)}{reason}", hosts[i].name)
            if len(codes) == len(hosts):
                if EXIT_STOPPED in codes.values():
                    return Outcome(End.RESIZE if resizing and not self._signals else End.STOPPED)
                return Outcome(End.DONE)
            if codes and patience is None:
                patience = time.monotonic() + _GRACE_S
            if patience is not None and time.monotonic() > patience:
                return Outcome(End.FAILED, f"{len(hosts) - len(codes)} processes did not end when the others did")
            if time.monotonic() >= look and not codes:
                look = time.monotonic() + _LOOK_S
                if self._is_overdue():
                    return Outcome(End.FAILED, "process 0 has neither finished its step in time nor ended itself")
                if not resizing and self._could_grow(len(hosts)):
                    resizing = True
                    for host in hosts:
                        host.signal(signal.SIGTERM)
            time.sleep(_POLL_S)

    def _say_why_refused(self, hosts: list[Host], follower: Follower) -> None:
        """Say why a worker has ended for good, if it has not done so in process 0's log, which is shown (or on a full disk)."""
        refusing = next(i for i, host in enumerate(hosts) if host.code in _BAD_ERRORS)
        host = hosts[refusing]
        if host.reason and not any(line.endswith(host.reason) for line in follower.recent):
            self._say(f"process {refusing} on {host.name}: {host.reason}")
        elif refusing != 0 and not host.reason:
            self._say(f"process {refusing} on {host.name} says why in a log of {self._job.run.logs}")

    def _could_grow(self, workers: int) -> bool:
        """Whether more workers could run, and this attempt has made a step, so that interrupting it loses nothing."""
        job = self._job
        if workers == job.most or number(self._last_row(), "time") < self.launched:
            return False
        available = min(len(self._engine.hosts()), job.most)
        more = largest_feasible_count(job.config, job.devices, available) if available > workers else workers
        if more > workers:
            self._say(f"{available} hosts are available: saving, to go on with {more} workers instead of {workers}")
        return more > workers

    def _reached(self) -> int:
        """The last finished step of any attempt."""
        return max(self._reached_before, self._last_row().get("step", 0))

    def _last_row(self) -> dict[str, Any]:
        """The last row of metrics.jsonl; {} where it cannot be read, which must not end an attempt."""
        try:
            return last_row(self._job.run.metrics_file)
        except OSError:
            return {}

    def _is_overdue(self) -> bool:
        try:
            return time.time() > float(self._job.run.deadline_file.read_text()) + _LATE_S
        except (OSError, ValueError):  # not yet there, or just being written
            return False

    def _end_all(self, hosts: list[Host]) -> None:
        """Kill the workers that still run: the attempt has ended, and none of them could go on."""
        for host in hosts:
            host.signal(signal.SIGKILL)
        _wait_for(hosts, _LATE_S)


_CODES = {End.DONE: 0, End.REFUSED: EXIT_BAD_INPUT, End.STOPPED: EXIT_STOPPED}


def _wait_for(hosts: list[Host], seconds: float) -> None:
    """Wait until their workers have ended, at most this long."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(not host.lost and host.code is None for host in hosts):
        time.sleep(_POLL_S / 5)


def _ending(code: int) -> str:
    """How a worker ended, by its exit code."""
    if code == EXIT_NOT_JOINED:
        return "could not join the others"
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def _explained(outcome: Outcome, logs: list[Path]) -> Outcome:
    """The outcome with the cause from the workers' logs if one was stuck; the others get a moment to notice it, too."""
    if not any(ended_by_watchdog(log) for log in logs):
        return outcome
    time.sleep(_LAST_MESSAGES_S)
    stuck = next(log for log in logs if ended_by_watchdog(log))
    return replace(outcome, cause=f"no step finished in time; see the stacks in {stuck} and those beside it")
