"""`dsv3 bench`: which loads it runs, what it prints, and what it refuses."""

import json
import math
from pathlib import Path

import pytest

from dsv3_jax.bench import command
from dsv3_jax.bench.figures import Limits, Outcome
from dsv3_jax.bench.in_process import Served
from dsv3_jax.bench.workload import Lengths, Prompts
from dsv3_jax.errors import UserError
from dsv3_jax.serve.core import COUNTERS
from tests.commands import dsv3


def options(**fields) -> command.Options:
    standard = {
        "requests": 8, "load": (0.5, math.inf), "rate": (), "trace": None, "prompts": None, "prompt_lengths": Lengths(2, 3, 4),
        "output_lengths": Lengths(1, 2, 3), "limits": Limits(1.0, 1.0), "seed": 0, "slots": 2, "prompt_rows": 8, "exact": False,
        "batch": 2, "single": 1,
    }  # fmt: skip
    return command.Options(**(standard | fields))


class Server:
    """Serves each load in 2 s, one token a request 0.5 s after it came; counts the same each time."""

    def __init__(self, *_):
        self.loads = []
        self.serve_load = lambda requests: self(requests, "")

    def __call__(self, requests, _):
        self.loads.append(requests)
        outcomes = [Outcome(r.arrival_s, len(r.prompt), ((r.arrival_s + 0.5, 1),)) for r in requests]
        return Served(outcomes, dict.fromkeys(COUNTERS, 4.0), 2.0)


def test_shares_are_of_what_all_at_once_were_served_at():
    server = Server()
    loads = command._loads(options(requests=2000, load=(0.5, 0.25)), Prompts(64), server)["loads"]
    assert list(loads) == ["at once", "25%", "50%"]
    at_once, quarter, half = server.loads
    assert {request.arrival_s for request in at_once} == {0.0}
    # 2,000 requests in 2 s are a capacity of 1,000 a second
    assert (loads["25%"]["rate_per_s"], loads["50%"]["rate_per_s"]) == (250, 500)
    assert quarter[-1].arrival_s == pytest.approx(8, rel=0.1)
    assert half[-1].arrival_s == pytest.approx(4, rel=0.1)
    assert not {r.prompt for r in at_once if len(r.prompt) == 4} >= {r.prompt for r in half if len(r.prompt) == 4}
    assert loads["50%"]["first_token_s"] == pytest.approx({"p50": 0.5, "p90": 0.5, "p99": 0.5})


def test_rates_need_no_capacity():
    server = Server()
    loads = command._loads(options(load=(), rate=(8.0, 2.0)), Prompts(64), server)["loads"]
    assert list(loads) == ["2/s", "8/s"]


def test_a_table_and_a_file(tmp_path, monkeypatch):
    """Of an address, whose prompts are random ids that any tokenizer has."""
    made = []
    monkeypatch.setattr(command, "Server", lambda url, key: made.append((url, key)) or Server())
    (tmp_path / "key").write_text("secret\nother\n")
    done = dsv3("bench", "http://there", "--load", "inf", "--api-key-file", "key", "--out", "bench.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert made == [("http://there", "secret")]
    assert "at once" in done.stdout
    figures = json.loads((tmp_path / "bench.json").read_text())["loads"]["at once"]
    assert figures["requests"] == 200
    assert figures["tokens_per_s"] == 100


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("no_such_run",), "no_such_run does not exist"),
        (("ftp://there",), "does not exist"),
        (("http://127.0.0.1:1",), "http://127.0.0.1:1 does not answer as OpenAI's API does"),
        (("x", "--prompt-lengths", "8:50"), "--prompt-lengths='8:50': use LOW:MEDIAN:HIGH"),
        (("x", "--load", "0"), "--load 0.0: use numbers above 0, or inf"),
        (("x", "--rate", "nan"), "--rate nan: use numbers above 0, or inf"),
        (("x", "--requests", "0"), "--requests 0 is out of range; use 1 or more"),
        (("x", "--api-key-file", "no_such_file"), "no_such_file: No such file"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(words, message, tmp_path: Path):
    done = dsv3("bench", *words, "--out", "bench.json", cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "bench.json").exists()


def test_a_trace_of_texts_needs_a_server(tmp_path):
    (tmp_path / "trace.jsonl").write_text('{"arrival_s": 0, "prompt": "a", "max_tokens": 1}\n')
    with pytest.raises(UserError, match=r"trace.jsonl has texts, which need a server; give prompt_tokens"):
        command._require_ids(command._at_once(options(trace=tmp_path / "trace.jsonl"), Prompts(64)), "trace.jsonl")
