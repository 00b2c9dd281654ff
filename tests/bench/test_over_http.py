"""A load over HTTP, on a server of the standard library that answers as OpenAI's API does."""

import contextlib
import http.server
import json
import threading
import time

import pytest

from dsv3_jax.bench.over_http import Server
from dsv3_jax.bench.workload import Request
from dsv3_jax.errors import UserError
from dsv3_jax.serve.core import COUNTERS


class Handler(http.server.BaseHTTPRequestHandler):
    """Three tokens in two events for each completion; refuses prompts that begin with 7, and breaks off those with 8."""

    asked: list
    counted = 0

    def log_message(self, *_):
        pass

    def _answer(self, status, content):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        if self.headers["Authorization"] != "Bearer key":
            self._answer(401, b"{}")
        elif self.path == "/v1/models":
            self._answer(200, b'{"data": [{"id": "tiny"}]}')
        else:
            type(self).counted += 10
            names = [n.removesuffix("_s") + ("_seconds" if n.endswith("_s") else "") for n in COUNTERS]
            text = "".join(f"# TYPE dsv3_{n}_total counter\ndsv3_{n}_total {self.counted + i}\n" for i, n in enumerate(names))
            self._answer(200, text.encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, body))
        if body["prompt"][0] == 7:
            return self._answer(503, b'{"error": "full"}')
        events = [
            {"choices": [{"text": "a"}]}, {"choices": [{"text": ""}]}, {"choices": [{"text": "bc"}], "usage": None},
            {"choices": [], "usage": {"completion_tokens": 3}},
        ]  # fmt: skip
        if body["prompt"][0] == 8:
            events[1:] = [{"error": {"message": "the engine has failed"}}]
        stream = [f"data: {json.dumps(event)}\n\n" for event in events]
        self.send_response(200)
        self.end_headers()
        for event in [*stream, "data: [DONE]\n\n"]:
            self.wfile.write(event.encode())
            time.sleep(0.01)


@contextlib.contextmanager
def server(handler=Handler):
    handler.asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
        thread = threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{serving.server_port}"
        serving.shutdown()
        thread.join()


def test_requests_are_streamed_and_timed():
    with server() as url:
        client = Server(f"{url}/v1", "key")
        served = client.serve_load([Request(0.0, (1, 2), 3), Request(0.05, (7,), 3), Request(0.06, (8,), 3)])
    good, refused, broken = served.outcomes
    assert (good.error, good.prompt_tokens, good.tokens, len(good.deliveries)) == (
        "",
        2,
        3,
        2,
    )  # an event without text is no delivery
    assert 0 < good.first_token_s < good.deliveries[1][0] <= served.wall_s
    assert "status 503" in refused.error
    assert "the engine has failed" in broken.error
    path, body = Handler.asked[0]
    assert path == "/v1/completions"
    assert body == {
        "model": "tiny", "prompt": [1, 2], "max_tokens": 3, "temperature": 0, "stream": True, "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    assert served.counts == dict.fromkeys(COUNTERS, 10.0)


def test_a_server_of_others_tells_no_counts():
    class Other(Handler):
        def do_GET(self):
            self._answer(200, b'{"data": [{"id": "tiny"}]}')

    with server(Other) as url:
        assert Server(url, None).serve_load([Request(0.0, (1,), 3)]).counts == {}


def test_addresses_at_which_nobody_answers_are_refused():
    with server() as url, pytest.raises(UserError, match="does not answer as OpenAI's API does: HTTPException: status 401"):
        Server(url, "wrong")
    with pytest.raises(UserError, match=r"http://127.0.0.1:1 does not answer as OpenAI's API does: ConnectionRefusedError"):
        Server("http://127.0.0.1:1", None)
    with pytest.raises(UserError, match="ftp://x is no address of a server; use http://HOST:PORT"):
        Server("ftp://x", None)
