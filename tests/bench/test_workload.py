"""Loads: lengths, arrivals and traces."""

import json

import numpy as np
import pytest

from dsv3_jax.bench.workload import Lengths, Prompts, Request, arriving, draw_requests, read_trace
from dsv3_jax.errors import UserError


def test_lengths_have_their_median_and_bounds():
    drawn = Lengths(8, 50, 128).draw(np.random.default_rng(0), 20_000)
    assert (drawn.min(), drawn.max()) == (8, 128)
    assert abs(np.median(drawn) - 50) <= 1
    # a lognormal of deviation 0.6 is above 50 e^0.6 = 91 in 15.9% of the cases
    assert np.mean(drawn > 91) == pytest.approx(0.159, abs=0.01)


def test_arrivals_are_a_poisson_process():
    """Gaps of an exponential distribution: mean and deviation are both 1 / rate."""
    at = [r.arrival_s for r in arriving([Request(0.0, (1,), 1)] * 20_000, rate=4, seed=1)]
    gaps = np.diff(at)
    assert gaps.mean() == pytest.approx(0.25, rel=0.03)
    assert gaps.std() == pytest.approx(0.25, rel=0.03)
    assert gaps.min() > 0
    assert {r.arrival_s for r in arriving([Request(3.0, (1,), 1)] * 3, rate=float("inf"), seed=1)} == {0.0}


def test_prompts_are_pieces_of_the_text():
    text = np.arange(100, 400, dtype=np.int32)
    requests = draw_requests(Prompts(1000, text), Lengths(8, 20, 40), Lengths(4, 10, 30), 50, seed=0)
    for request in requests:
        assert request.prompt == tuple(range(request.prompt[0], request.prompt[0] + len(request.prompt)))
    assert len({request.prompt[0] for request in requests}) > 40
    assert requests == draw_requests(Prompts(1000, text), Lengths(8, 20, 40), Lengths(4, 10, 30), 50, seed=0)
    assert requests != draw_requests(Prompts(1000, text), Lengths(8, 20, 40), Lengths(4, 10, 30), 50, seed=1)
    with pytest.raises(UserError, match="prompts of 301 tokens are longer than the text they are of, 300 tokens"):
        draw_requests(Prompts(1000, text), Lengths(8, 20, 301), Lengths(4, 10, 30), 50, seed=0)
    ids = [i for r in draw_requests(Prompts(16), Lengths(8, 20, 40), Lengths(4, 10, 30), 50, seed=0) for i in r.prompt]
    assert (min(ids), max(ids)) == (0, 15)


@pytest.mark.parametrize("text", ["", "8:50", "50:8:128", "0:1:2", "a:b:c", "8:50:128:2", "-1:2:3", "1:2:99999999999"])
def test_lengths_that_cannot_be_are_refused(text):
    with pytest.raises(UserError, match=f"--prompt-lengths={text!r}: use LOW:MEDIAN:HIGH"):
        Lengths.parse("--prompt-lengths", text)


def test_a_trace_is_read_in_order_of_arrival(tmp_path):
    lines = [
        {"arrival_s": 1.5, "prompt": "a text", "max_tokens": 3},
        {"arrival_s": 0, "prompt_tokens": [4, 5], "max_tokens": 7},
    ]
    (tmp_path / "trace.jsonl").write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    assert read_trace(tmp_path / "trace.jsonl") == [Request(0.0, (4, 5), 7), Request(1.5, "a text", 3)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is no JSON"),
        ("[]", "line 2 is no JSON object"),
        ('{"arrival_s": 0, "max_tokens": 1}', "line 2: give one of prompt and prompt_tokens"),
        ('{"arrival_s": 0, "max_tokens": 1, "prompt": "a", "prompt_tokens": [1]}', "give one of prompt and prompt_tokens"),
        ('{"arrival_s": -1, "max_tokens": 1, "prompt": "a"}', "arrival_s=-1; use seconds"),
        ('{"arrival_s": NaN, "max_tokens": 1, "prompt": "a"}', "arrival_s=nan"),
        ('{"arrival_s": true, "max_tokens": 1, "prompt": "a"}', "arrival_s=True"),
        ('{"arrival_s": 0, "max_tokens": 0, "prompt": "a"}', "max_tokens=0; use 1 or more"),
        ('{"arrival_s": 0, "prompt": "a"}', "max_tokens=None"),
        ('{"arrival_s": 0, "max_tokens": 1, "prompt": ""}', "prompt=''; use a text"),
        ('{"arrival_s": 0, "max_tokens": 1, "prompt_tokens": []}', r"prompt_tokens=\[\]; use a list of token ids"),
        ('{"arrival_s": 0, "max_tokens": 1, "prompt_tokens": [1.5]}', "use a list of token ids"),
        ('{"arrival": 0, "max_tokens": 1, "prompt": "a"}', "unknown 'arrival'; use arrival_s, max_tokens, prompt"),
    ],
)
def test_a_trace_that_is_none_is_refused(line, message, tmp_path):
    (tmp_path / "trace.jsonl").write_text(f'{{"arrival_s": 0, "max_tokens": 1, "prompt": "a"}}\n{line}\n')
    with pytest.raises(UserError, match=message):
        read_trace(tmp_path / "trace.jsonl")


def test_an_empty_trace_is_refused(tmp_path):
    (tmp_path / "trace.jsonl").write_text("\n")
    with pytest.raises(UserError, match="has no requests"):
        read_trace(tmp_path / "trace.jsonl")
    (tmp_path / "trace.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is no UTF-8"):
        read_trace(tmp_path / "trace.jsonl")
