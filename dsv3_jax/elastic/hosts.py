"""What a supervisor knows of hosts and engines, and an engine whose hosts are all on this machine."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dsv3_jax.cluster.processes import free_port


@dataclass(frozen=True)
class Start:
    """What a worker is started with."""

    args: list[str]  # of `entry`
    environ: dict[str, str]  # added to the host's
    log: str  # the file for what it prints
    entry: str = "dsv3_jax.cli:main"  # module:function that takes `args`


class Host(Protocol):
    """A machine, or a part of one, that runs one worker at a time. Attributes are updated meanwhile; no call waits."""

    name: str
    ready: bool  # can start a worker
    lost: bool  # for good: a machine that comes back is another host
    pid: int | None  # of the running worker
    code: int | None  # exit code of the last worker (negative: killed by that signal); None while it runs
    reason: str  # why the last worker failed, in one line; '' if it did not say

    def address(self) -> str:
        """host:port, free now, at which the workers of other hosts can reach one of this host."""
        ...

    def start(self, start: Start) -> None:
        """Start a worker."""
        ...

    def signal(self, number: int) -> None:
        """Send the worker a signal; without a worker, do nothing."""
        ...


class Engine(Protocol):
    """Where hosts come from."""

    def hosts(self) -> list[Host]:
        """The hosts that are ready and answer."""
        ...

    def close(self) -> None:
        """End all hosts and their workers."""
        ...


class HostProcess:
    """A `Host` that is a child process of this one (see host.py)."""

    def __init__(self, name: str, environ: dict[str, str], prefix: Sequence[str] = ()):
        self.name, self.ready, self.lost = name, False, False
        self.pid: int | None = None
        self.code: int | None = None
        self.reason = ""
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "dsv3_jax.elastic.host"], env=environ, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            try:
                message = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if not isinstance(message, dict):  # what a library prints there is no word of the host's
                continue
            if "ready" in message:
                self.ready = True
            self.pid, self.reason = message.get("pid"), message.get("reason", "")
            self.code = message.get("exit")  # last: whoever sees it may read the reason
        self.lost, self.ready, self.pid = True, False, None

    def _send(self, command: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write((json.dumps(command) + "\n").encode())
            self.process.stdin.flush()
        except OSError:
            self.lost = True

    def address(self) -> str:
        return f"127.0.0.1:{free_port()}"

    def start(self, start: Start) -> None:
        self.code = None
        self._send({"start": dataclasses.asdict(start)})

    def signal(self, number: int) -> None:
        self._send({"signal": number})

    def close(self) -> None:
        """End the host, and its worker with it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()


def host_environment(devices: int | None) -> dict[str, str]:
    """The environment of a host: this process's, without the variables that make it a process of another run.

    `devices`: virtual CPU devices of the host's workers; None on accelerators.
    """
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("DSV3_COORDINATOR", "DSV3_PROCESS", "DSV3_JOIN_TOKEN"))}
    # `dsv3` sets this for itself by starting again, which a forked worker cannot
    environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    return environ if devices is None else environ | {"JAX_NUM_CPU_DEVICES": str(devices)}


@dataclass
class LocalEngine:
    """`count` hosts on this machine's CPU, for trying out what a cluster will do."""

    count: int
    devices: int  # virtual CPU devices per worker
    back_after_s: float = 5.0  # a lost host is replaced after this time
    slots: dict[str, HostProcess] = field(default_factory=dict)
    _replace_at: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._environ = host_environment(self.devices) | {"JAX_PLATFORMS": "cpu"}
        root = str(Path(__file__).parents[2])
        self._environ["PYTHONPATH"] = os.pathsep.join(filter(None, (root, self._environ.get("PYTHONPATH"))))
        for i in range(self.count):
            self.slots[f"host-{i}"] = self._host(f"host-{i}")

    def _host(self, name: str) -> HostProcess:
        return HostProcess(name, self._environ)

    def hosts(self) -> list[Host]:
        for name, host in self.slots.items():
            if host.lost and time.monotonic() >= self._replace_at.setdefault(name, time.monotonic() + self.back_after_s):
                self.slots[name] = self._host(name)
                del self._replace_at[name]
        return [host for host in self.slots.values() if host.ready]

    def close(self) -> None:
        for host in self.slots.values():
            host.close()
