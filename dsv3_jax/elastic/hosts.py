"""What a supervisor sees of a host, and an engine whose hosts are all on this machine."""

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
    """What a worker is started with: arguments of `dsv3`, environment, the file for what it prints."""

    args: list[str]
    environ: dict[str, str]
    log: str
    entry: str = "dsv3_jax.cli:main"  # module:function that takes `args`


class Host(Protocol):
    """A place for one worker. Its attributes change as things happen; no call waits for the worker."""

    name: str
    ready: bool  # it can start a worker
    lost: bool  # for good: should the machine come back, then as another host
    pid: int | None  # of the worker that runs
    code: int | None  # exit code of the last worker (negative: killed by that signal); None while it runs

    def address(self) -> str:
        """host:port, free now, at which other hosts reach a worker of this one."""
        ...

    def start(self, start: Start) -> None: ...

    def signal(self, number: int) -> None: ...


class Engine(Protocol):
    def hosts(self) -> list[Host]:
        """Those that are ready, and answer."""
        ...

    def close(self) -> None: ...


class HostProcess:
    """A `Host` that is a child of this process (see host.py)."""

    def __init__(self, name: str, environ: dict[str, str], prefix: Sequence[str] = ()):
        self.name, self.ready, self.lost = name, False, False
        self.pid: int | None = None
        self.code: int | None = None
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "dsv3_jax.elastic.host"], env=environ, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            said = json.loads(line)
            if "ready" in said:
                self.ready = True
            self.pid = said.get("pid")
            self.code = said.get("exit")
        self.lost, self.ready, self.pid = True, False, None

    def _tell(self, command: dict[str, Any]) -> None:
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
        self._tell({"start": dataclasses.asdict(start)})

    def signal(self, number: int) -> None:
        self._tell({"signal": number})

    def close(self) -> None:
        """End the host, and its worker with it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()


def host_environment(devices: int | None) -> dict[str, str]:
    """This process's, for a host: without its place in another run; with `devices` virtual ones if the platform is the CPU."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("DSV3_COORDINATOR", "DSV3_PROCESS"))}
    # what `dsv3` sets for itself by starting again, which a fork cannot
    environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    return environ if devices is None else environ | {"JAX_NUM_CPU_DEVICES": str(devices)}


@dataclass
class LocalEngine:
    """`count` hosts on this machine's CPU, for trying out what a cluster will do. One that is lost is back after a while."""

    count: int
    devices: int
    back_after_s: float = 5.0
    slots: dict[str, HostProcess] = field(default_factory=dict)
    _due: dict[str, float] = field(default_factory=dict)

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
            if host.lost and time.monotonic() >= self._due.setdefault(name, time.monotonic() + self.back_after_s):
                self.slots[name] = self._host(name)
                del self._due[name]
        return [host for host in self.slots.values() if host.ready]

    def close(self) -> None:
        for host in self.slots.values():
            host.close()
