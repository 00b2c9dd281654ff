"""Give damaged and hostile inputs to every reader of files, command lines and connections.

Each must be read or refused in one line (`UserError`), within seconds and 500 MB: a traceback, a hang, or a process that dies
is a failure, and is printed with the command that repeats it. Seeds decide the inputs, so that a run is the same everywhere.

    python scripts/tools/fuzz.py                           # 5,000 inputs over all readers
    python scripts/tools/fuzz.py --only trace plan --count 2000
    python scripts/tools/fuzz.py --only trace --seed 17    # this input alone, with the traceback
"""

import argparse
import contextlib
import faulthandler
import io
import json
import os
import random
import resource
import select
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _sound
from _damage import damaged

from dsv3_jax.checkpoint.manifest import verify
from dsv3_jax.cluster.processes import free_port
from dsv3_jax.cluster.roll_call import ClusterSpec, take_roll
from dsv3_jax.config import load_config
from dsv3_jax.cost.feasible import feasible_worker_counts
from dsv3_jax.data.companions import read_companions
from dsv3_jax.data.special_tokens import special_tokens
from dsv3_jax.data.tokenizer import load_tokenizer, text_encoder
from dsv3_jax.describe import describe
from dsv3_jax.errors import UserError
from dsv3_jax.interop.hf_config import read_hf_config
from dsv3_jax.interop.hf_files import read_index
from dsv3_jax.interop.safetensors_file import read_header
from dsv3_jax.plan.command import show_overlap
from dsv3_jax.plan.imbalance import read_imbalance
from dsv3_jax.progress import make_console
from dsv3_jax.runs.directory import RunDirectory
from dsv3_jax.runs.goodput import RunningAccount
from dsv3_jax.runs.loss_curve import plot_loss
from dsv3_jax.runs.metrics import MetricsWriter, last_row
from dsv3_jax.runs.report import show

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "configs" / "tiny.yaml"
MOST_BYTES = 500 * 2**20
_SECONDS = 20.0  # for one input; most take milliseconds


def _console() -> Any:
    return make_console(io.StringIO())


# What is done with damaged ones; `rare` inputs, every 25th, go through what takes longer, too.


def _read_config(file: Path, rare: bool) -> None:
    config = load_config(file, ["name=a"])
    feasible_worker_counts(config, 8, range(1, 65))
    if rare:
        describe(config, _console())


def _read_override(file: Path, _rare: bool) -> None:
    load_config(TINY, [file.read_bytes().decode(errors="surrogateescape")])


def _read_tokenizer(file: Path, _rare: bool) -> None:
    tokenizer = load_tokenizer(file, 4096)
    text_encoder(tokenizer, special_tokens(tokenizer), special_tokens=False).encode("the quick", add_special_tokens=False)


def _read_companions(file: Path, _rare: bool) -> None:
    """What stands beside a tokenizer and says which tokens begin and end a text."""
    tokenizer = file.with_name("sound.json")
    tokenizer.write_bytes(sample("tokenizer.json"))
    special_tokens(load_tokenizer(tokenizer, 4096), read_companions(file.parent))


def _run(file: Path, name: str) -> RunDirectory:
    """A run's directory, in which the record `name` is the damaged one."""
    run = RunDirectory(file.parent / "run")
    run.path.mkdir()
    run.events_file.write_bytes(_sound.EVENTS)
    run.metrics_file.write_bytes(_sound.METRICS)
    file.rename(run.path / name)
    return run


def _read_metrics(file: Path, rare: bool) -> None:
    run = _run(file, "metrics.jsonl")
    show(run, _console())
    last_row(run.metrics_file)
    if rare:
        plot_loss(run.metrics_file, run.path / "loss.png", "damaged")
        MetricsWriter(run, 6).close()
    RunningAccount(run, 6).row(0.5)


def _read_events(file: Path, _rare: bool) -> None:
    run = _run(file, "events.jsonl")
    show(run, _console())
    RunningAccount(run, 6).row(0.5)


def _read_manifest(file: Path, _rare: bool) -> None:
    _sound.checkpoint_files(file.parent / "checkpoint")
    verify(file.rename(file.parent / "checkpoint" / "manifest.json").parent)


def _read_plan(file: Path, _rare: bool) -> None:
    trace = file.with_name("sound.xplane.pb")
    trace.write_bytes(sample("trace"))
    show_overlap(trace, file, _console())


def _read_routing(file: Path, _rare: bool) -> None:
    read_imbalance(str(file)).among(2, 4)


def _read_roll_call(file: Path, _rare: bool) -> None:
    """A stranger's connection with the damaged line, then process 1's."""
    spec = ClusterSpec(f"127.0.0.1:{free_port()}", 2, 0, timeout_s=_SECONDS / 2)
    raised: list[BaseException] = []

    def process_0() -> None:
        try:
            take_roll(spec, time.monotonic() + spec.timeout_s)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=process_0, daemon=True)
    thread.start()
    for line in (file.read_bytes(), _sound.ROLL_CALL):
        deadline = time.monotonic() + 5
        while thread.is_alive() and time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(spec.address, timeout=1) as connection:
                connection.sendall(line + b"\n")
                if line is _sound.ROLL_CALL:
                    connection.settimeout(spec.timeout_s)
                    connection.recv(4096)
                break
            time.sleep(0.005)
    thread.join(_SECONDS)
    if thread.is_alive():
        raise TimeoutError("process 0 has not ended its roll call")
    if raised:
        raise raised[0]


@dataclass(frozen=True)
class Reader:
    """Something that takes input from outside."""

    kind: str  # see `_damage.damaged`
    make: Callable[[], bytes]  # a sound input
    read: Callable[[Path, bool], Any]


READERS = {
    "config": Reader("yaml", TINY.read_bytes, _read_config),
    "overrides": Reader("text", lambda: b"", _read_override),
    "config.json": Reader(
        "json", (ROOT / "tests/fixtures/v3_tiny_yarn/config.json").read_bytes, lambda f, _: read_hf_config(f.parent)
    ),
    "index": Reader("json", _sound.index, lambda f, _: read_index(f)),
    "safetensors": Reader("safetensors", _sound.safetensors, lambda f, _: read_header(f)),
    "tokenizer.json": Reader("json", _sound.tokenizer, _read_tokenizer),
    "generation_config.json": Reader("json", lambda: _sound.GENERATION, _read_companions),
    "metrics": Reader("lines", lambda: _sound.METRICS, _read_metrics),
    "events": Reader("lines", lambda: _sound.EVENTS, _read_events),
    "manifest": Reader("json", _sound.manifest, _read_manifest),
    "plan": Reader("json", lambda: _sound.PLAN, _read_plan),
    "trace": Reader("bytes", lambda: _sound.trace(), lambda f, _: show_overlap(f, None, _console())),
    "routing": Reader("lines", lambda: _sound.ROUTING, _read_routing),
    "roll call": Reader("json", lambda: _sound.ROLL_CALL, _read_roll_call),
}
_FILES = {"config.json": "config.json", "generation_config.json": "generation_config.json"}  # others may have any name
_samples: dict[str, bytes] = {}


def sample(name: str) -> bytes:
    """A reader's sound input."""
    if name not in _samples:
        _samples[name] = READERS[name].make()
    return _samples[name]


def make_input(name: str, seed: int) -> bytes:
    """The damaged input of a reader and a seed."""
    rng = random.Random(f"{name} {seed}")
    if name == "trace" and rng.random() < 0.4:
        return _sound.odd_trace(rng)
    sound = rng.choice(_sound.OVERRIDES).encode() if name == "overrides" else sample(name)
    return damaged(sound, READERS[name].kind, rng)


class Hang(BaseException):
    """An input has taken longer than it may."""


@contextlib.contextmanager
def _within(seconds: float) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise Hang(f"longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_case(name: str, seed: int, directory: Path) -> str:
    """Read one input. Returns "read", or "refused"; raises what a reader should not have raised."""
    file = directory / _FILES.get(name, "input")
    file.write_bytes(make_input(name, seed))
    try:
        READERS[name].read(file, seed % 25 == 0)
    except UserError:
        return "refused"
    return "read"


def _case(name: str, seed: int) -> tuple[str, str]:
    """("read", "refused" or "failed", and how)."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            with _within(_SECONDS):
                return run_case(name, seed, Path(scratch)), ""
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a panic of a library in Rust is no Exception
            last = traceback.extract_tb(error.__traceback__)[-1]
            return "failed", f"{type(error).__name__}: {str(error)[:200]} ({Path(last.filename).name}:{last.lineno})"


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass
class Tally:
    """What became of a reader's inputs."""

    count: dict[str, int] = field(default_factory=lambda: {"read": 0, "refused": 0, "failed": 0})
    failures: list[tuple[int, str]] = field(default_factory=list)
    peak: int = 0

    def add(self, seed: int, outcome: str, why: str) -> None:
        self.count[outcome] += 1
        if outcome == "failed":
            self.failures.append((seed, why))


def _child(name: str, seeds: range, out: int) -> None:
    """In a process of its own, because a library may abort: a line for each input before it is read, and one after."""
    faulthandler.disable()
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)  # what libraries say of damaged files
    for seed in seeds:
        os.write(out, f"{json.dumps([seed])}\n".encode())
        outcome, why = _case(name, seed)
        if outcome != "failed" and _peak() > MOST_BYTES:
            outcome, why = "failed", f"{_peak() / 2**20:.0f} MB of memory"
        os.write(out, f"{json.dumps([seed, outcome, why, _peak()])}\n".encode())
        if _peak() > MOST_BYTES:
            return


def fuzz(name: str, seeds: range) -> Tally:
    """Read the inputs of `seeds`, in processes that are started again where they die."""
    tally, left = Tally(), seeds
    sample(name)
    while left:
        reading, writing = os.pipe()
        with warnings.catch_warnings():  # the threads that imports leave are made for forks
            warnings.simplefilter("ignore")
            child = os.fork()
        if child == 0:
            os.close(reading)
            _child(name, left, writing)
            os._exit(0)
        os.close(writing)
        done, begun, death = _follow(reading, tally, child)
        if begun is not None:  # it died, or was killed, in the middle of this one
            tally.add(begun, "failed", death)
            done = begun
        left = range(done + 1, seeds.stop)
    return tally


def _follow(reading: int, tally: Tally, child: int) -> tuple[int, int | None, str]:
    """Take a child's lines. Returns the last input that was done, the one that was not, and how the child ended."""
    done, begun = -1, None
    with os.fdopen(reading) as lines:
        while True:
            ready, _, _ = select.select([lines], [], [], 2 * _SECONDS)
            if not ready:
                os.kill(child, signal.SIGKILL)
            line = lines.readline()
            if not line:
                break
            seed, *outcome = json.loads(line)
            begun = seed
            if outcome:
                done, begun = seed, None
                tally.add(seed, outcome[0], outcome[1])
                tally.peak = max(tally.peak, outcome[2])
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return done, begun, f"the process was ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=READERS, default=list(READERS), metavar="READER", help=", ".join(READERS))
    parser.add_argument("--count", type=int, default=5000, help="inputs in all")
    parser.add_argument("--begin", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, help="read this input of --only alone, and show its traceback")
    parser.add_argument("--keep", type=Path, help="with --seed: write the input here")
    options = parser.parse_args(args)
    if options.seed is not None:
        return _one(options.only[0], options.seed, options.keep)
    began, each, failed, peak = time.monotonic(), -(-options.count // len(options.only)), 0, 0
    for name in options.only:
        tally = fuzz(name, range(options.begin, options.begin + each))
        failed, peak = failed + tally.count["failed"], max(peak, tally.peak)
        counts = ", ".join(f"{count} {outcome}" for outcome, count in tally.count.items())
        print(f"{name}: {counts}; at most {tally.peak / 2**20:.0f} MB", flush=True)
        for seed, why in tally.failures[:10]:
            print(f"  {why}\n    python scripts/tools/fuzz.py --only {json.dumps(name)} --seed {seed}", flush=True)
    seconds = time.monotonic() - began
    print(f"{each * len(options.only):,} inputs in {seconds:.0f} s, {failed} failures, at most {peak / 2**20:.0f} MB")
    return int(failed > 0)


def _one(name: str, seed: int, keep: Path | None) -> int:
    if keep is not None:
        keep.write_bytes(make_input(name, seed))
    with tempfile.TemporaryDirectory() as scratch, _within(_SECONDS):
        try:
            print(run_case(name, seed, Path(scratch)))
        except BaseException:
            traceback.print_exc()
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
