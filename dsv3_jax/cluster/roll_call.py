"""The roll call at the start of a run in several processes: it names the missing ones, whatever else comes to its port.

Each process sends process 0 a line of JSON (its number, how many there are, its host, the run's token), and gets a line back
once the outcome is known. Process 0 hears all connections at once. One that says nothing, or no such line, is closed. With a
token (DSV3_JOIN_TOKEN, which supervisors and `dsv3 launch` make for each start) only those who know it are believed.
"""

import contextlib
import hmac
import json
import secrets
import selectors
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from dsv3_jax.errors import UserError
from dsv3_jax.progress import one_line

_REPORT_S = 5.0  # a connection's first line has to come within
_SEND_S = 1.0
_LINE_BYTES = 4096
_NAME_LENGTH = 128  # of a host
_UNHEARD = 64  # connections that have not reported yet, more than there are processes: beyond, the oldest is closed
_POLL_S = 0.2


@dataclass(frozen=True)
class ClusterSpec:
    """A run's processes, as one of them sees it."""

    coordinator: str  # host:port
    processes: int  # in the run
    process: int  # this one's number
    timeout_s: float = 300.0  # a large job's containers may start minutes apart
    heartbeat_s: float = 30.0  # a process that is silent for so long counts as dead; JAX's default is 100
    token: str = field(default="", repr=False)  # that all processes of the run have

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of process 0."""
        host, port = self.coordinator.rsplit(":", 1)
        return host, int(port)


def new_token() -> str:
    """A token for DSV3_JOIN_TOKEN."""
    return secrets.token_hex(16)


def _parsed(line: bytes) -> dict[str, Any]:
    """A line's JSON object; {} for anything else."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _encoded(what: Mapping[str, Any]) -> bytes:
    return (json.dumps(what) + "\n").encode()


@dataclass(frozen=True)
class _Report:
    """What a process says of itself."""

    process: int
    processes: int
    host: str
    token: str

    @classmethod
    def of(cls, line: bytes) -> Self | None:
        """The report in a line; None if it is none that a process of any run sends."""
        found = _parsed(line)
        process, processes = found.get("process"), found.get("processes")
        host, token = found.get("host"), found.get("token", "")
        if type(process) is not int or type(processes) is not int or not 0 <= process < processes:
            return None
        if not isinstance(host, str) or not isinstance(token, str):
            return None
        return cls(process, processes, one_line(host)[:_NAME_LENGTH], token)


class _Roll:
    """Process 0's side: the connections that come, and who has reported on them."""

    def __init__(self, spec: ClusterSpec, server: socket.socket):
        self._spec, self._server = spec, server
        self._selector = selectors.DefaultSelector()
        server.setblocking(False)
        self._selector.register(server, selectors.EVENT_READ)
        self._unheard: dict[socket.socket, tuple[float, bytearray]] = {}  # until when, and what has come of the line
        self._heard: dict[socket.socket, int | None] = {}  # their processes; None of the one that ends the roll call
        self._hosts = {0: socket.gethostname()}  # of the processes that are present
        self._refused = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        for connection in [*self._unheard, *self._heard]:
            connection.close()
        self._selector.close()

    def call(self, deadline: float) -> str:
        """Wait for all processes. Returns what is wrong, or ''."""
        while len(self._hosts) < self._spec.processes:
            now = time.monotonic()
            if now >= deadline:
                return self._missing()
            for key, _ in self._selector.select(min(deadline - now, _POLL_S)):
                if key.fileobj is self._server:
                    self._accept()
                elif wrong := self._hear(key.fileobj):  # type: ignore[arg-type]
                    return wrong
            for connection in [c for c, (until, _) in self._unheard.items() if time.monotonic() > until]:
                self._close(connection)
        return ""

    def tell(self, verdict: str) -> None:
        """Send all that have reported the outcome."""
        for connection in self._heard:
            with contextlib.suppress(OSError):  # it has just gone, which the run will notice
                connection.settimeout(_SEND_S)
                connection.sendall(_encoded({"verdict": verdict}))

    def _accept(self) -> None:
        if len(self._unheard) >= self._spec.processes + _UNHEARD:
            self._close(next(iter(self._unheard)))
        try:
            connection, _ = self._server.accept()
        except OSError:  # it has gone already
            return
        connection.setblocking(False)
        self._unheard[connection] = time.monotonic() + _REPORT_S, bytearray()
        self._selector.register(connection, selectors.EVENT_READ)

    def _close(self, connection: socket.socket) -> None:
        """Also ends the presence of the process that has reported on it."""
        self._selector.unregister(connection)
        self._unheard.pop(connection, None)
        if (process := self._heard.pop(connection, None)) is not None:
            del self._hosts[process]
        connection.close()

    def _hear(self, connection: socket.socket) -> str:
        """Take what has come on a connection. Returns what is wrong with the run, or ''."""
        try:
            data = connection.recv(_LINE_BYTES)
        except BlockingIOError:
            return ""
        except OSError:
            data = b""
        if not data:
            self._close(connection)
        if connection not in self._unheard:
            return ""
        line = self._unheard[connection][1]
        line += data
        if b"\n" not in line:
            if len(line) > _LINE_BYTES:
                self._close(connection)
            return ""
        report = _Report.of(bytes(line.partition(b"\n")[0]))
        if report is None:
            self._close(connection)
            return ""
        return self._take(connection, report)

    def _take(self, connection: socket.socket, report: _Report) -> str:
        spec, process = self._spec, report.process
        if not hmac.compare_digest(report.token.encode(errors="replace"), spec.token.encode(errors="replace")):
            self._refused += 1
            with contextlib.suppress(OSError):
                connection.send(_encoded({"verdict": f"process {process} has not the DSV3_JOIN_TOKEN of process 0's run"}))
            self._close(connection)
            return ""
        del self._unheard[connection]
        self._heard[connection] = None
        if report.processes != spec.processes:
            return f"process {process} was started as one of {report.processes}, this run has {spec.processes}"
        if process in self._hosts:
            return f"two processes have DSV3_PROCESS_ID={process}: on {self._hosts[process]} and on {report.host}"
        self._heard[connection], self._hosts[process] = process, report.host
        return ""

    def _missing(self) -> str:
        spec, present = self._spec, self._hosts
        absent = [str(p) for p in range(spec.processes) if p not in present]
        shown = ", ".join(absent[:16]) + (f" and {len(absent) - 16} more" if len(absent) > 16 else "")
        here = ", ".join(f"{p} on {present[p]}" for p in sorted(present)[:4])
        refused = f" ({self._refused} came without the run's DSV3_JOIN_TOKEN)" if self._refused else ""
        return (
            f"{len(absent)} of {spec.processes} processes did not join within {spec.timeout_s:.0f} s: missing {shown}"
            f"{refused}; joined: {here}{', ...' if len(present) > 4 else ''}; look at their logs, or set DSV3_JOIN_TIMEOUT_S"
        )


def take_roll(spec: ClusterSpec, deadline: float) -> str:
    """On process 0: wait until every process has reported, then send all of them the outcome.

    Returns the address, host:port, at which the others have reached it. Raises `UserError` naming who is missing or is one too
    many.
    """
    try:
        server = socket.create_server(spec.address, backlog=spec.processes + _UNHEARD)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"DSV3_COORDINATOR={spec.coordinator}: process 0 cannot listen there: {getattr(error, 'strerror', None) or error}; "
            "use an address of its own host, and a port that is free"
        ) from None
    with server, _Roll(spec, server) as roll:
        host, port = server.getsockname()[:2]
        verdict = roll.call(deadline)
        roll.tell(verdict)
    if verdict:
        raise UserError(verdict)
    return f"{host}:{port}"


def _receive_line(connection: socket.socket, deadline: float) -> bytes:
    """Read a line; b'' if none of a sensible length comes. Raises `OSError`, a timeout among others."""
    data = b""
    while not data.endswith(b"\n"):
        connection.settimeout(max(deadline - time.monotonic(), 0.01))
        piece = connection.recv(_LINE_BYTES)
        data += piece
        if not piece or len(data) > _LINE_BYTES:
            return b""
    return data


def answer_roll(spec: ClusterSpec, deadline: float) -> None:
    """On the others: report to process 0, and wait for the outcome. Raises `UserError` if it is bad, or none comes."""
    report = {"process": spec.process, "processes": spec.processes, "host": socket.gethostname(), "token": spec.token}
    reason = "no answer"
    while time.monotonic() < deadline:
        try:
            with socket.create_connection(spec.address, timeout=5) as connection:
                connection.sendall(_encoded(report))
                # process 0 gives up at its own deadline, which may lie after ours
                verdict = _parsed(_receive_line(connection, deadline + spec.timeout_s)).get("verdict")
            if verdict == "":
                return
            if isinstance(verdict, str):
                raise UserError(one_line(verdict))
            reason = "it closed the connection, or is no process of a run"
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
        time.sleep(_POLL_S)
    raise UserError(
        f"process {spec.process} of {spec.processes}: process 0 at {spec.coordinator} did not answer "
        f"within {spec.timeout_s:.0f} s ({reason}): it is missing, or DSV3_COORDINATOR is wrong"
    )
