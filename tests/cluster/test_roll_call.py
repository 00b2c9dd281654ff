"""The roll call against those who are no processes of the run: silent, resetting, sending nonsense, or without its token."""

import contextlib
import json
import os
import socket
import struct
import threading
import time

import jax
import pytest

from dsv3_jax.cluster import processes, roll_call
from dsv3_jax.cluster.processes import cluster_spec, free_port
from dsv3_jax.cluster.roll_call import ClusterSpec, answer_roll, take_roll
from dsv3_jax.errors import UserError

WITHIN_S = 20.0  # far more than a roll call takes; one that is blocked ends with "missing"


class Roll:
    """Process 0's roll call in a thread; `end` gives what it returned or raised."""

    def __init__(self, count: int = 2, token: str = "", within_s: float = WITHIN_S):
        self.spec = ClusterSpec(f"127.0.0.1:{free_port()}", count, 0, within_s, token=token)
        self._outcome: list[str | UserError] = []
        self._thread = threading.Thread(target=self._take, daemon=True)
        self._thread.start()

    def _take(self) -> None:
        try:
            self._outcome.append(take_roll(self.spec, time.monotonic() + self.spec.timeout_s))
        except UserError as error:
            self._outcome.append(error)

    def end(self) -> str | UserError:
        self._thread.join(WITHIN_S)
        (outcome,) = self._outcome
        return outcome

    def connect(self) -> socket.socket:
        for _ in range(200):
            try:
                return socket.create_connection(self.spec.address, timeout=WITHIN_S)
            except ConnectionRefusedError:  # it is just beginning
                time.sleep(0.01)
        raise AssertionError("nobody listens")

    def send(self, what: bytes | dict) -> socket.socket:
        connection = self.connect()
        connection.sendall(what if isinstance(what, bytes) else json.dumps(what).encode() + b"\n")
        return connection

    def answer(self, process: int = 1, token: str | None = None, count: int | None = None) -> None:
        spec = self.spec
        token = spec.token if token is None else token
        answer_roll(
            ClusterSpec(spec.coordinator, count or spec.processes, process, spec.timeout_s, token=token),
            time.monotonic() + spec.timeout_s,
        )


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def assert_all_join(roll: Roll) -> None:
    """Processes 1 and 2 answer, and the roll call ends with all three."""
    others = [threading.Thread(target=roll.answer, args=(process,)) for process in (1, 2)]
    for thread in others:
        thread.start()
    assert roll.end() == roll.spec.coordinator
    for thread in others:
        thread.join()


def test_all_are_there():
    roll = Roll(3)
    assert_all_join(roll)


NONSENSE = [
    b"\n", b"hello\n", b"\xff\xfe\n", b"[" * 3000 + b"\n", b"{" * 5000, b"9" * 4090 + b"\n", b"null\n", b"[1]\n", b"5\n",
    b'{"process": Infinity, "processes": 2, "host": "x"}\n', b'{"process": NaN, "processes": 2, "host": "x"}\n',
    b'{"process": 1, "processes": Infinity, "host": "x"}\n', b'{"process": 1, "processes": 2}\n',
    {"process": -1, "processes": 2, "host": "x"}, {"process": 2, "processes": 2, "host": "x"},
    {"process": 1.0, "processes": 2, "host": "x"}, {"process": True, "processes": 2, "host": "x"},
    {"process": "1", "processes": 2, "host": "x"}, {"process": 1, "processes": 2, "host": ["x"]},
    {"process": 1, "processes": 2, "host": "x", "token": 7}, {"process": 10**400, "processes": 2, "host": "x"},
]  # fmt: skip


def test_nonsense_is_closed_and_nobody_waits_for_the_silent():
    roll = Roll()
    silent = [roll.connect() for _ in range(roll_call._UNHEARD + 4)]  # and more of them than are heard at a time
    begun = roll.send(b'{"process": 1, ')
    strangers = [roll.send(what) for what in NONSENSE]
    for _ in range(5):
        reset(roll.connect())
        reset(roll.send(b"{"))
    for stranger in strangers:
        with contextlib.suppress(ConnectionResetError):
            assert stranger.recv(100) == b""
    roll.answer()
    assert roll.end() == roll.spec.coordinator
    for connection in [*silent, begun, *strangers]:
        connection.close()


def test_the_silent_are_closed(monkeypatch):
    monkeypatch.setattr(roll_call, "_REPORT_S", 0.05)
    roll = Roll()
    with roll.connect() as silent:
        assert silent.recv(1) == b""
    roll.answer()
    assert roll.end() == roll.spec.coordinator


def test_one_that_went_and_came_again_is_one():
    """Its connection was lost, or it was started anew, before all were there."""
    roll = Roll(3)
    reset(roll.send({"process": 1, "processes": 3, "host": "x"}))
    roll.send({"process": 1, "processes": 3, "host": "x"}).close()
    assert_all_join(roll)


def test_two_of_one_number_hear_of_it():
    roll = Roll(3)
    with roll.send({"process": 1, "processes": 3, "host": "one\x1b[2Jhost"}) as first:
        with pytest.raises(UserError, match=r"two processes have DSV3_PROCESS_ID=1: on one\\x1b\[2Jhost and on "):
            roll.answer(1)
        assert "two processes" in json.loads(first.recv(4096))["verdict"]
    assert isinstance(roll.end(), UserError)


def test_another_number_of_processes_is_said_to_both():
    roll = Roll(2)
    with pytest.raises(UserError, match="process 1 was started as one of 3, this run has 2"):
        roll.answer(1, count=3)
    assert "was started as one of 3" in str(roll.end())


def test_only_who_knows_the_token_is_believed():
    """Neither its place nor its opinion of the run is taken; one that has lost it is told so, and process 0 counts it."""
    roll = Roll(token="secret")
    with pytest.raises(UserError, match="process 1 has not the DSV3_JOIN_TOKEN of process 0's run"):
        roll.answer(token="")
    for lie in (
        {"process": 1, "processes": 2, "host": "x"},
        {"process": 1, "processes": 7, "host": "x", "token": "sécret\ud800"},
    ):
        with roll.send(lie) as stranger:
            answer = stranger.recv(4096)
            assert b"DSV3_JOIN_TOKEN" in answer
            assert b"secret" not in answer
    roll.answer()
    assert roll.end() == roll.spec.coordinator
    assert "secret" not in repr(roll.spec)

    roll = Roll(token="secret", within_s=1)
    with roll.send({"process": 1, "processes": 2, "host": "x", "token": "guess"}):
        pass
    assert "missing 1 (1 came without the run's DSV3_JOIN_TOKEN); joined: 0 on" in str(roll.end())


def test_a_token_comes_from_the_environment():
    environ = {"DSV3_COORDINATOR": "h:1", "DSV3_PROCESSES": "2", "DSV3_PROCESS_ID": "0", "DSV3_JOIN_TOKEN": "t"}
    spec = cluster_spec(environ)
    assert spec is not None
    assert spec.token == "t"
    assert len({roll_call.new_token() for _ in range(3)}) == 3


def test_an_address_that_is_not_ours_is_named():
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        for coordinator in (taken, "192.0.2.1:7", "127.0.0.1:99999"):
            with pytest.raises(UserError, match=rf"DSV3_COORDINATOR={coordinator}: process 0 cannot listen there: "):
                take_roll(ClusterSpec(coordinator, 2, 0), time.monotonic() + 1)


@pytest.mark.parametrize("answer", [b"[" * 4000 + b"\n", b"hello\n", b'{"verdict": 5}\n', b"x" * 9000, b""])
def test_something_else_at_the_coordinators_port_is_not_believed(answer):
    with socket.create_server(("127.0.0.1", 0)) as other:

        def serve() -> None:
            while True:
                try:
                    connection, _ = other.accept()
                    with connection:
                        connection.recv(4096)
                        connection.sendall(answer)
                except OSError:
                    return

        threading.Thread(target=serve, daemon=True).start()
        spec = ClusterSpec(f"127.0.0.1:{other.getsockname()[1]}", 2, 1, 0.5)
        with pytest.raises(UserError, match=r"process 0 at 127.0.0.1:\d+ did not answer within"):
            answer_roll(spec, time.monotonic() + spec.timeout_s)
        other.shutdown(socket.SHUT_RDWR)


def test_jax_listens_where_the_roll_was_called(monkeypatch):
    """And not, as by itself, on all of the host's addresses."""
    port = free_port()
    environ = {
        "DSV3_COORDINATOR": f"localhost:{port}", "DSV3_PROCESSES": "2", "DSV3_PROCESS_ID": "0", "DSV3_JOIN_TIMEOUT_S": "20",
    }  # fmt: skip
    asked: list[dict] = []
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **how: asked.append(how))
    monkeypatch.setattr(processes.faulthandler, "dump_traceback_later", lambda *_, **__: None)
    spec = ClusterSpec(f"127.0.0.1:{port}", 2, 1, 20)
    other = threading.Thread(target=answer_roll, args=(spec, time.monotonic() + 20))
    other.start()
    processes.join(environ)
    other.join()
    assert [how["coordinator_bind_address"] for how in asked] == [f"127.0.0.1:{port}"]
    assert os.environ.get("DSV3_PROCESSES") is None
