"""`dsv3 serve`: what it refuses before it loads anything; and the whole of it, in a process of its own."""

import http.client
import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.commands import dsv3, dsv3_process
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "--host=0.0.0.0 lets others connect: give --api-key-file, a file with one key on each line"),
        (["--host", "::"], "--host=:: lets others connect"),
        (["--api-key-file", "none"], "cannot read none: No such file or directory"),
        (["--api-key-file", "empty"], "--api-key-file=empty holds no key"),
        (["--host", "no.such.host.invalid"], "--host=no.such.host.invalid --port=0: "),
        (["--port", "70000"], "--port=70000 is out of range; use 0 to 65535"),
        (["--port", "-1"], "--port=-1 is out of range"),
    ],
)
def test_one_line_and_exit_code_2(options, message, tmp_path):
    (tmp_path / "empty").write_text("\n")
    given = options if "--port" in options else [*options, "--port", "0"]
    done = dsv3("serve", "runs/none", *given, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"dsv3: error: {message}")
    assert len(done.stderr.splitlines()) == 1


def test_a_port_in_use_and_a_model_that_is_none(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        done = dsv3("serve", "runs/none", "--port", port, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, f"dsv3: error: --host=127.0.0.1 --port={port}: Address already in use\n")
    done = dsv3("serve", "runs/none", "--port", port, cwd=tmp_path)
    assert done.returncode == 2
    assert "runs/none does not exist" in done.stderr


@pytest.mark.parametrize("package", ["starlette", "uvicorn", "jinja2"])
def test_without_the_extra_there_is_one_line(package, monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.startswith(("dsv3_jax.http_api", f"{package}."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    done = dsv3("serve", "runs/none", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, f"dsv3: error: {package} is not installed; pip install 'dsv3-jax[serve]'\n")


def asked(port: int, body: dict) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    return connection.getresponse()


@pytest.mark.slow
def test_from_a_run_to_the_signal_that_ends_it(micro_overrides_in, tmp_path: Path):
    """The text is `dsv3 generate`'s; a stream that runs when SIGTERM comes has its end, and then the exit code is 0."""
    trained = dsv3("train", str(ROOT / "configs" / "tiny.yaml"), *micro_overrides_in(tmp_path), "name=it", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    expected = dsv3("generate", "runs/it", "--prompt", "document", "--max-new-tokens", "12", cwd=tmp_path).stdout
    command = [
        str(Path(sys.executable).with_name("dsv3")),
        "serve",
        "runs/it",
        "--port",
        "0",
        "--slots",
        "2",
        "--context",
        "256",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        try:
            line = process.stdout.readline()  # type: ignore[union-attr]
            assert line.startswith("it is served at http://127.0.0.1:"), process.communicate()
            port = int(line.rpartition(":")[2])
            answer = json.load(asked(port, {"prompt": "document", "max_tokens": 12, "temperature": 0}))
            assert "document" + answer["choices"][0]["text"] == expected.rstrip("\n")
            talk = subprocess.run(
                [command[0], "chat", f"http://127.0.0.1:{port}", "--temperature", "0", "--max-tokens", "12"],
                input="document\n", capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert "document" + talk.stdout == expected
            stream = asked(port, {"prompt": "document", "max_tokens": 200, "stream": True, "ignore_eos": True})
            first = stream.readline()
            process.send_signal(signal.SIGTERM)
            rest = stream.read().decode()
            assert first.startswith(b"data: ")
            assert rest.endswith("data: [DONE]\n\n")
            assert '"finish_reason":"length"' in rest
        finally:
            process.terminate()
            time.sleep(0)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    with pytest.raises(ConnectionRefusedError):
        asked(port, {})
    assert dsv3_process("chat", f"http://127.0.0.1:{port}", cwd=tmp_path).returncode == 2
