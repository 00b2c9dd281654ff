"""Keeps a run going: starts workers on the hosts that there are, notices when one fails, and starts again on what is left.

A run is a sequence of attempts. Each has as many workers as its configuration has a legal mesh for (cost/feasible.py), goes
on from the latest undamaged checkpoint, and ends as a whole: JAX's processes cannot go on without one of theirs. What engine
the hosts come from makes no difference here.
"""

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum, auto
from pathlib import Path
from typing import Any

from dsv3_jax.config import Config
from dsv3_jax.cost.feasible import feasible_worker_counts, largest_feasible_count
from dsv3_jax.elastic.hosts import Engine, Host, Start
from dsv3_jax.elastic.logs import Follower, says_stuck
from dsv3_jax.errors import EXIT_BAD_INPUT, EXIT_NOT_JOINED, EXIT_STOPPED
from dsv3_jax.runs.directory import RunDirectory
from dsv3_jax.runs.events import EventLog
from dsv3_jax.runs.metrics import last_row

_POLL_S = 0.05
_LOOK_S = 2.0  # between looks for more hosts, and at the deadline of process 0
_LATE_S = 10.0  # how much later than a worker the supervisor loses patience with it
_GRACE_S = 120.0  # for a save after SIGTERM
_WORDS_S = 1.0  # for the others to say what they have to say, once one has ended
_ATTEMPTS_IN_VAIN = 6  # without a new step
_BAD_ERRORS = (EXIT_BAD_INPUT,)  # exit codes that no other attempt would change: bad input, divergence, a full disk


class End(Enum):
    DONE = auto()
    REFUSED = auto()
    STOPPED = auto()  # by the user
    RESIZE = auto()  # saved, to go on with more hosts
    FAILED = auto()


@dataclass(frozen=True)
class Outcome:
    end: End
    cause: str = ""
    host: str = ""


@dataclass(frozen=True)
class Job:
    """What is to be run: `args` of `dsv3` for each worker, and on how many of them with how many devices each."""

    config: Config
    args: list[str]
    run: RunDirectory
    least: int
    most: int
    devices: int
    heartbeat_s: float
    join_s: float
    rehearse: bool = False


class Supervisor:
    """`run` returns the exit code of the whole: 0, 2 for bad input, 130 if stopped and saved, 1 if it was given up."""

    def __init__(self, job: Job, engine: Engine, say: Callable[[str], None] = print):
        self._job, self._engine, self._say = job, engine, say
        job.run.logs.mkdir(parents=True, exist_ok=True)
        self._events = EventLog(job.run.events_file)
        self._signals = 0
        self.attempt = len(list(job.run.logs.glob("attempt-*-process-0.log")))  # of earlier supervisors
        self.launched = 0.0  # this attempt, in seconds since 1970
        self._far = 0  # the step that earlier attempts have reached
        self.workers: list[Host] = []  # of this attempt, by process number

    def run(self) -> int:
        old = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            code = self._attempts()
        finally:
            for host in self.workers:
                host.signal(signal.SIGKILL)
            for number, handler in old.items():
                signal.signal(number, handler)
        self._events.write("done", code=code)
        return code

    def _on_signal(self, _number: int, _frame: Any) -> None:
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
        """The hosts of the next attempt: of those there are, the largest legal number; None if the user wants an end.

        As long as not all have come, others are waited for until `patience_s`; and without end for the least number.
        """
        job, said, deadline = self._job, "", time.monotonic() + patience_s
        while not self._signals:
            hosts = self._engine.hosts()[: job.most]
            count = largest_feasible_count(job.config, job.devices, len(hosts))
            if count >= job.least and (len(hosts) == job.most or time.monotonic() >= deadline):
                return hosts[:count]
            line = f"waiting for hosts: {len(hosts)} of {job.least} to {job.most}"
            if said != line and time.monotonic() >= deadline:
                self._say(said := line)
            time.sleep(_POLL_S)
        return None

    def _start(self, hosts: list[Host], args: list[str], name: str) -> list[Path]:
        """A worker on each; the files for what they print."""
        job = self._job
        address = hosts[0].address()
        logs = [job.run.logs / f"{name}-process-{i}.log" for i in range(len(hosts))]
        for i, (host, log) in enumerate(zip(hosts, logs, strict=True)):
            environ = {
                "DSV3_COORDINATOR": address, "DSV3_PROCESSES": str(len(hosts)), "DSV3_PROCESS_ID": str(i),
                "DSV3_HEARTBEAT_S": f"{job.heartbeat_s:g}", "DSV3_JOIN_TIMEOUT_S": f"{job.join_s:g}", "DSV3_HOST": host.name,
            }  # fmt: skip
            host.start(Start(args, environ, str(log.absolute())))
        self.workers = hosts
        return logs

    def _rehearse(self, hosts: list[Host]) -> None:
        """Compile for every legal number of workers below this one, so that none has to when hosts are lost."""
        job = self._job
        for count in reversed(feasible_worker_counts(job.config, job.devices, range(job.least, len(hosts)))):
            began = time.monotonic()
            self._start(hosts[:count], [*job.args, "--rehearse"], f"rehearsal-{count}")
            while not self._signals and any(host.code is None and not host.lost for host in hosts[:count]):
                time.sleep(_POLL_S)
            well = all(host.code == 0 for host in hosts[:count])
            self._end_all(hosts[:count])
            seconds = time.monotonic() - began
            self._events.write("rehearsed", workers=count, seconds=round(seconds, 1), well=well)
            self._say(f"rehearsal for {count} workers: {'compiled' if well else 'failed'} in {seconds:.0f} s")

    def _try(self, hosts: list[Host]) -> Outcome:
        """One attempt, to its end."""
        job = self._job
        self.attempt += 1
        self.launched, self._far = time.time(), self._reached()
        self._events.write("launch", attempt=self.attempt, workers=len(hosts), hosts=[h.name for h in hosts])
        job.run.deadline_file.unlink(missing_ok=True)
        try:
            logs = self._start(hosts, job.args, f"attempt-{self.attempt}")
        except OSError as error:  # the first host is gone since it was asked
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
        """Until all workers have ended well, or one has not."""
        resizing, look, patience = False, time.monotonic() + _LOOK_S, None
        while True:
            follower.read()
            for i, host in enumerate(hosts):
                if host.lost:
                    return Outcome(End.FAILED, f"{host.name}, of process {i}, is lost", host.name)
            codes = {i: host.code for i, host in enumerate(hosts) if host.code is not None}
            if any(code in _BAD_ERRORS for code in codes.values()):  # also where others die of its end
                _wait_for(hosts, _WORDS_S)
                refusing = next(i for i, host in enumerate(hosts) if host.code in _BAD_ERRORS)
                if refusing != 0:
                    self._say(f"process {refusing} on {hosts[refusing].name} says why in a log of {self._job.run.logs}")
                return Outcome(End.REFUSED)
            bad = {i: code for i, code in codes.items() if code not in (0, EXIT_STOPPED)}
            if bad:
                i, code = next(iter(bad.items()))
                return Outcome(End.FAILED, f"process {i} on {hosts[i].name} {_ending(code)}", hosts[i].name)
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
                    return Outcome(End.FAILED, "process 0 has neither ended its step in time nor itself")
                if not resizing and self._could_grow(len(hosts)):
                    resizing = True
                    for host in hosts:
                        host.signal(signal.SIGTERM)
            time.sleep(_POLL_S)

    def _could_grow(self, workers: int) -> bool:
        """Whether a larger mesh is to be had, and this attempt has made a step, so that it is not interrupted in vain."""
        job = self._job
        if workers == job.most or last_row(job.run.metrics_file).get("time", 0.0) < self.launched:
            return False
        there = min(len(self._engine.hosts()), job.most)
        more = largest_feasible_count(job.config, job.devices, there) if there > workers else workers
        if more > workers:
            self._say(f"{there} hosts are there: saving, to go on with {more} workers instead of {workers}")
        return more > workers

    def _reached(self) -> int:
        """The last step that has ended, in whatever attempt."""
        return max(self._far, int(last_row(self._job.run.metrics_file).get("step", 0)))

    def _is_overdue(self) -> bool:
        try:
            return time.time() > float(self._job.run.deadline_file.read_text()) + _LATE_S
        except (FileNotFoundError, ValueError):  # not yet there, or just being written
            return False

    def _end_all(self, hosts: list[Host]) -> None:
        """Whatever still runs. Workers are killed: an attempt has ended, and none of them could go on."""
        for host in hosts:
            host.signal(signal.SIGKILL)
        _wait_for(hosts, _LATE_S)


_CODES = {End.DONE: 0, End.REFUSED: EXIT_BAD_INPUT, End.STOPPED: EXIT_STOPPED}


def _wait_for(hosts: list[Host], seconds: float) -> None:
    """Until their workers have ended, but no longer."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(not host.lost and host.code is None for host in hosts):
        time.sleep(_POLL_S / 5)


def _ending(code: int) -> str:
    if code == EXIT_NOT_JOINED:
        return "could not join the others"
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def _explained(outcome: Outcome, logs: list[Path]) -> Outcome:
    """With the cause that a worker's log names, if one was stuck. The others get a moment to find the same."""
    if not any(says_stuck(log) for log in logs):
        return outcome
    time.sleep(_WORDS_S)
    stuck = next(log for log in logs if says_stuck(log))
    return replace(outcome, cause=f"no step ended in time; see the stacks in {stuck} and those beside it")
