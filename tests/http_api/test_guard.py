"""Keys, hosts, and how connections are held to their manners."""

import base64
import contextlib
import json
import socket
import threading
import time

import pytest

from dsv3_jax.errors import UserError
from dsv3_jax.http_api import api
from dsv3_jax.http_api.connections import Limits
from dsv3_jax.http_api.keys import is_loopback, read_keys
from tests.http_api.fake import serving

KEYS = ["first-key-0123456789", "second-key-0123456789"]
PATHS = [
    ("GET", "/"), ("GET", "/metrics"), ("GET", "/openapi.json"), ("GET", "/v1/models"), ("GET", "/nothing"),
    ("POST", "/v1/completions"),
]  # fmt: skip


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def connected(client) -> socket.socket:
    return socket.create_connection(client.address, timeout=10)


def request(body: dict) -> bytes:
    content = json.dumps(body).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return head + b"Content-Length: %d\r\n\r\n%s" % (len(content), content)


def ended(connection: socket.socket) -> bytes:
    """What still comes until the server closes."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            found += part
    return found


def test_keys():
    with serving(KEYS) as client:
        for method, path in PATHS:
            for wrong in (
                {},
                bearer("first-key-012345678"),
                bearer(""),
                {"Authorization": "Basic !"},
                {"Authorization": KEYS[0]},
            ):
                status, headers, answer = client.ask(method, path, {} if method == "POST" else None, **wrong)
                assert status == 401, (path, wrong)
                assert answer["error"]["code"] == "invalid_api_key"
                schemes = [line.split()[0] for line in headers.get_all("WWW-Authenticate", [])]
                assert schemes == ["Bearer", "Basic"], "a browser asks for a password by a line of its own"
        assert client.ask("GET", "/health")[0] == 200
        assert client.ask("POST", "/health", {})[0] == 405
        for key in KEYS:
            assert client.ask("POST", "/v1/completions", {"prompt": "x"}, **bearer(key))[0] == 200
        basic = base64.b64encode(f"me:{KEYS[0]}".encode()).decode()
        assert client.ask("GET", "/", Authorization=f"Basic {basic}")[0] == 200
        first, second = client.engine.salts
        assert first != second, "two callers share prefixes"
        assert not any(key in first + second for key in KEYS)
        assert client.ask("GET", "/v1/models", Host="evil.example", **bearer(KEYS[0]))[0] == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200), ("127.0.0.1:99", 200), ("[::1]:80", 200), ("::1", 200), ("evil.example", 403),
        ("evil.example:80", 403), ("localhost.evil.example", 403), ("127.0.0.1.evil.example", 403), ("[::2]", 403),
    ],
)  # fmt: skip
def test_without_keys_only_this_machines_names_are_answered(client, host, status):
    """Or a web site whose name leads here could read what its visitor's browser can."""
    assert client.ask("GET", "/v1/models", Host=host)[0] == status


def test_key_files(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"\n{KEYS[0]}  \n\n{KEYS[1]}\n")
    assert read_keys(path) == KEYS
    wrong = ((b"", "holds no key"), (b"short\n", "key 1 must have at least 16"), (b"\xff" * 20, "key 1"), (b"a b" * 9, "key 1"))
    for content, message in wrong:
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_keys(path)
    with pytest.raises(UserError, match="No such file"):
        read_keys(tmp_path / "none")
    assert all(is_loopback(host) for host in ("127.0.0.2", "::1", "localhost"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "x", ""))


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_its_place(client, stream):
    client.engine.step_s = 0.01
    connection = connected(client)
    connection.sendall(request({"prompt": "x", "max_tokens": 200, "stream": stream, "n": 3}))
    if stream:
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
    while len(client.engine.running) < 3:
        time.sleep(0.005)
    connection.close()
    client.settled()
    assert client.engine.cancelled == 3


def test_headers_and_readers_have_a_time():
    with serving(limits=Limits(most=6, headers_s=0.3, stalled_s=0.3)) as client:
        client.engine.context = 10**6
        silent, slow, again = connected(client), connected(client), connected(client)
        slow.sendall(b"GET /health HTTP/1.1\r\nHost: ")
        again.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert again.recv(4096).startswith(b"HTTP/1.1 200")
        again.sendall(b"GET /health")  # and no more
        for connection in (silent, slow, again):
            assert b"200" not in ended(connection)
        with socket.socket() as reader:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # before connecting: it decides on TCP's window
            reader.settimeout(10)
            reader.connect(client.address)
            reader.sendall(request({"prompt": "x", "max_tokens": 50_000, "stream": True, "logprobs": 20}))
            assert reader.recv(10).startswith(b"HTTP")
            client.settled()
            assert client.engine.cancelled == 1


def test_there_are_only_so_many_connections():
    with serving(limits=Limits(most=6)) as client:
        held = [connected(client) for _ in range(6)]
        for connection in held:  # all are accepted
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        assert ended(connected(client)).startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
        held.pop().close()
        until = time.monotonic() + 10
        while client.ask("GET", "/health")[0] != 200:
            assert time.monotonic() < until
        for connection in held:
            connection.close()


def test_strangers_disturb_nobody(client):
    """Noise, half-open connections, requests that break off: an answer that runs meanwhile is whole."""
    client.engine.step_s = 0.002
    answers = []
    asking = threading.Thread(target=lambda: answers.append(client.complete(prompt="x", max_tokens=200)))
    asking.start()
    noise = [
        b"\x16\x03\x01" + bytes(200), b"GET / HTTP/9.9\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", b"\r\n" * 100,
        request({"prompt": "x"})[:-3],
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET //etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n",
        request({"prompt": "x", "max_tokens": 100, "stream": True}) * 3,
        b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    ]  # fmt: skip
    for _ in range(4):
        for bytes_ in noise:
            connection = connected(client)
            with contextlib.suppress(OSError):
                connection.sendall(bytes_)
                connection.shutdown(socket.SHUT_WR)
                assert b"root:" not in ended(connection)
            connection.close()
    asking.join()
    assert answers[0]["usage"]["completion_tokens"] == 200


def test_a_body_that_does_not_come(monkeypatch):
    monkeypatch.setattr(api, "BODY_S", 0.2)
    with serving() as client:
        connection = connected(client)
        connection.sendall(request({"prompt": "x"})[:-1])
        assert ended(connection).startswith(b"HTTP/1.1 408 ")


def test_one_callers_full_request_is_not_anothers(client):
    """A request that finds no room leaves those that run alone."""
    client.engine.step_s, client.engine.most_waiting = 0.005, 2
    answers = []
    asking = threading.Thread(target=lambda: answers.append(client.complete(prompt="x", max_tokens=60)))
    asking.start()
    while not client.engine.running:
        time.sleep(0.001)
    assert client.ask("POST", "/v1/completions", {"prompt": "x", "n": 2})[0] == 503
    asking.join()
    assert answers[0]["usage"]["completion_tokens"] == 60
