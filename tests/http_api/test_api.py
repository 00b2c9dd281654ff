"""What clients get, over real connections to a server whose engine follows a script."""

import itertools
import json

import pytest

from dsv3_jax.config import LARGEST_SEED
from tests.http_api.fake import SCRIPT, serving

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hi"}]
SCHEMA = {
    "type": "object", "properties": {"a": {"enum": ["x", "y"]}, "b": {"type": "boolean"}}, "required": ["a", "b"],
    "additionalProperties": False,
}  # fmt: skip


def as_json(schema):
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}


def test_completion(client):
    answer = client.complete(prompt="def", max_tokens=5, temperature=0)
    (choice,) = answer["choices"]
    assert choice == {"index": 0, "text": "The quick brown fox", "logprobs": None, "finish_reason": "length"}
    prompt = len(client.tokenizer.encode("def", add_special_tokens=False).ids) + 1  # and the begin token
    assert answer["usage"]["prompt_tokens"] == prompt
    assert answer["usage"]["completion_tokens"] == 5
    assert answer["usage"]["total_tokens"] == prompt + 5
    assert answer["model"] == "fake/model"


def test_prompts_of_every_kind_and_n(client):
    ids = client.tokenizer.encode("def", add_special_tokens=False).ids
    for prompt, count in (("def", 1), (["def", "fox"], 2), (ids, 1), ([ids, [5, 6]], 2)):
        answer = client.complete(prompt=prompt, max_tokens=2, n=3, seed=LARGEST_SEED)
        assert [choice["index"] for choice in answer["choices"]] == list(range(3 * count))
        texts = [choice["text"] for choice in answer["choices"]]
        assert texts[1:3] == ["The qu", " quick"]  # seeds 0 and 1: the one after the largest is 0
        assert texts[:3] * count == texts
    assert client.complete(prompt=[5, 6], max_tokens=1)["usage"]["prompt_tokens"] == 2  # ids are taken as they are


def test_echo_and_logprobs_of_the_prompt(client):
    """What lm-eval reads: the first place has none, and offsets are those of the text."""
    for most in (0, 1):
        (choice,) = client.complete(prompt="The fox", max_tokens=most, echo=True, logprobs=1)["choices"]
        ids = [0, *client.tokenizer.encode("The fox", add_special_tokens=False).ids]
        expected = ids + client.engine.script[:most]
        assert choice["text"] == "The fox" + "The"[: 3 * most]
        found = choice["logprobs"]
        assert found["token_logprobs"] == [None, *(-token / 100 for token in expected[1:])]
        assert found["top_logprobs"][0] is None
        assert found["top_logprobs"][1] == {client.tokenizer.decode([2]): -0.02, "The": -ids[1] / 100}
        assert found["tokens"][0] == "<|begin_of_text|>"
        for token, offset in list(zip(found["tokens"], found["text_offset"], strict=True))[1:]:
            assert choice["text"][offset:].startswith(token)
        assert choice["finish_reason"] == "length"


def test_streams_are_the_same_text(client):
    body = {
        "prompt": ["def", "fox"],
        "max_tokens": 20,
        "n": 2,
        "seed": 4,
        "logprobs": 0,
        "echo": True,
        "stop": ["lazy", "🎉 —"],
    }
    whole = client.complete(**body)
    texts, tokens, reasons = [""] * 4, [[] for _ in range(4)], [None] * 4
    events = client.events(**body, stream_options={"include_usage": True})
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == whole["usage"]
    for event in events[:-1]:
        assert event["usage"] is None
        for choice in event["choices"]:
            at = choice["index"]
            assert reasons[at] is None
            texts[at] += choice["text"]
            tokens[at] += choice["logprobs"]["tokens"]
            reasons[at] = choice["finish_reason"]
    assert texts == [choice["text"] for choice in whole["choices"]]
    assert tokens == [choice["logprobs"]["tokens"] for choice in whole["choices"]]
    assert reasons == [choice["finish_reason"] for choice in whole["choices"]] == ["stop"] * 4
    assert all("usage" not in event for event in client.events(prompt="x"))
    usages = [
        e["usage"] for e in client.events(prompt="x", stream_options={"include_usage": True, "continuous_usage_stats": True})
    ]
    assert usages[-1]["completion_tokens"] == 16
    assert all(a["completion_tokens"] <= b["completion_tokens"] for a, b in itertools.pairwise(usages))


def test_chat(client):
    body = {
        "messages": [{"role": "system", "content": "é"}, *HELLO],
        "max_completion_tokens": 4,
        "logprobs": True,
        "top_logprobs": 2,
    }
    status, _, answer = client.ask("POST", CHAT, body)
    assert status == 200
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "The quick brown"[: len(choice["message"]["content"])]}
    rendered = "<|begin_of_text|>system: é\nuser: hi\nassistant:"
    assert answer["usage"]["prompt_tokens"] == len(client.tokenizer.encode(rendered, add_special_tokens=False).ids)
    assert bytes(b for token in choice["logprobs"]["content"] for b in token["bytes"]).decode() == choice["message"]["content"]
    assert [len(token["top_logprobs"]) for token in choice["logprobs"]["content"]] == [2] * 4
    events = client.events(CHAT, **body)
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert all("role" not in event["choices"][0]["delta"] for event in events[1:])
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == choice["message"]["content"]
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    parts = [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}]
    assert client.ask("POST", CHAT, {"messages": parts, "max_tokens": 1})[2]["usage"]["prompt_tokens"] > 0
    room = client.ask("POST", CHAT, {"messages": HELLO})[2]["usage"]
    assert room["total_tokens"] == client.engine.context  # no max_tokens: what there is room for


def test_stop_is_cancelled_in_the_engine(client):
    client.engine.step_s = 0.001
    (choice,) = client.complete(prompt="x", max_tokens=200, stop="fox")["choices"]
    assert choice["text"] == "The quick brown "
    assert choice["finish_reason"] == "stop"
    client.settled()
    assert client.engine.cancelled == 1


@pytest.mark.parametrize("stream", [False, True])
def test_answers_are_held_to_a_schema(client, stream):
    body = {"prompt": "x", "max_tokens": 100, "response_format": as_json(SCHEMA)}
    if stream:
        text = "".join(event["choices"][0]["text"] for event in client.events(**body))
    else:
        text = client.complete(**body)["choices"][0]["text"]
    found = json.loads(text)
    assert found["a"] in ("x", "y")
    assert isinstance(found["b"], bool)
    texts = {choice["text"] for choice in client.complete(**body, n=3)["choices"]}
    assert texts == {text}  # each answer has a constraint of its own


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"suffix": "y"}, "suffix", "suffix is not supported; parameters: echo, "),
        ({"best_of": 2}, "best_of", "best_of is not supported"),
        ({"n": 10**9}, "n", "n=1000000000: input should be less than or equal to 16"),
        ({"n": 10**40}, "n", "less than or equal to 16"),
        ({"temperature": "warm"}, "temperature", "valid number"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"stop": ""}, "stop", "at least 1 character"),
        ({"stop": "s" * 257}, "stop", "at most 256 characters"),
        ({"max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
        ({"max_tokens": 2.5}, "max_tokens", "integer"),
        ({"max_tokens": 10**6}, None, "the context is 256"),
        ({"echo": "yes"}, "echo", "boolean"),
        ({"seed": 2**32}, "seed", "less than or equal to 4294967295"),
        ({"logit_bias": {"-1": 1}}, "logit_bias.-1", "should match"),
        ({"prompt": None}, "prompt", "A text, token ids, or a list of either"),
        ({"prompt": []}, "prompt", "A text, token ids"),
        ({"prompt": [[1], "a"]}, "prompt.0", "prompt.0"),
        ({"prompt": [320]}, "prompt", "320 is no token; the vocabulary has 0 to 319"),
        ({"prompt": [1] * 257}, "prompt", "257 tokens"),
        ({"prompt": ["a"] * 65}, "prompt", "at most 64"),
        ({"prompt": ["a"] * 64, "n": 3}, "n", "at most 128 answers"),
        ({"stream_options": {}}, "stream_options", "is for stream: true alone"),
        ({"stream": True, "stream_options": {"every": 1}}, "stream_options.every", "see /openapi.json"),
        ({"response_format": {"type": "xml"}}, "response_format", "'json_object'"),
        ({"response_format": as_json({"type": "nothing"})}, None, "the schema is not supported: Invalid type: nothing"),
        ({"response_format": as_json({"patternProperties": {"a": {}}})}, None, "patternProperties is not supported"),
        ({"response_format": as_json({"enum": ["x" * 70_000]})}, None, "use 65536 at most"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos", "exclude each other"),
    ],
)  # fmt: skip
def test_what_is_refused(client, body, param, message):
    error = client.refused(**{"prompt": "x", **body})
    assert message.replace("65536", "65,536") in error["message"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages.0.name"),
        ({"messages": HELLO, "tools": []}, "tools"),
        ({"messages": HELLO, "max_tokens": 0}, "max_tokens"),
        ({"messages": HELLO, "max_tokens": 1, "max_completion_tokens": 1}, "max_completion_tokens"),
        ({"messages": HELLO, "top_logprobs": 1}, "top_logprobs"),
        ({"messages": [{"role": "user", "content": "x" * 2000}]}, "prompt"),
    ],
)
def test_what_chat_refuses(client, body, param):
    assert client.refused(CHAT, **body)["param"] == param


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b'{"prompt": "\xff"}', "not valid JSON"),
        (b'{"prompt": "\\ud800"}', "not valid JSON"),
        (b'{"prompt": ' + b"[" * 100_000, "recursion limit"),
        (b'{"prompt": "x", "temperature": NaN}', "finite number"),
        (b'{"prompt": "x", "temperature": 1e999}', "finite number"),
        (b"[]", "the body=[]"),
        (b'"prompt"', "the body="),
    ],
)
def test_bodies_that_are_no_requests(client, body, message):
    status, _, answer = client.ask("POST", "/v1/completions", body)
    assert status == 400
    assert message in answer["error"]["message"]


def test_a_body_has_a_size_and_a_type(client):
    body = b'{"prompt": "' + b"x" * 2**22 + b'"}'
    for headers in ({}, {"Transfer_Encoding": "chunked"}):
        sent = body if not headers else b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
        status, _, answer = client.ask("POST", "/v1/completions", sent, **headers)
        assert (status, answer["error"]["code"]) == (413, "too_large")
    status, _, answer = client.ask("POST", "/v1/completions", b"{}", Content_Type="text/plain")
    assert (status, answer["error"]["message"]) == (415, "content-type=text/plain: send application/json")


@pytest.mark.parametrize("path", ["/", "/openapi.json", "/metrics", "/health", "/v1/models"])
def test_pages(client, path):
    status, _, content = client.ask("GET", path)
    assert status == 200
    assert content
    assert client.ask("POST", path, {})[0] == 405
    assert client.ask("DELETE", path)[0] == 405


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd", "fake", "fake/model/", "fake%2fmodel%00", "~root"]
)
def test_other_models_are_not_found(client, name):
    status, _, answer = client.ask("GET", f"/v1/models/{name}")
    assert status == 404
    assert "root:" not in json.dumps(answer)
    status, _, answer = client.ask("POST", "/v1/completions", {"prompt": "x", "model": name})
    assert (status, answer["error"]["code"]) == (404, "model_not_found")
    assert client.ask("GET", "/v1/models/fake/model")[2]["id"] == "fake/model"
    assert client.ask("GET", "/v1/models/fake%2fmodel")[2]["id"] == "fake/model"


def test_a_full_queue(client):
    """n answers have room together, or none runs."""
    client.engine.most_waiting, client.engine.step_s = 2, 0.01
    status, headers, answer = client.ask("POST", "/v1/completions", {"prompt": "x", "n": 3, "max_tokens": 100})
    assert (status, headers["Retry-After"], answer["error"]["code"]) == (503, "2", "queue_full")
    client.settled()
    assert client.engine.cancelled == 2
    assert client.complete(prompt="x", n=2, max_tokens=1)


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_fails(client, stream):
    client.engine.failing = "out of memory"
    body = {"prompt": "x", "stream": stream}
    error = {"error": {"message": "out of memory", "type": "server_error", "param": None, "code": "engine_error"}}
    if stream:
        assert client.events(**body) == [error]
    else:
        assert client.ask("POST", "/v1/completions", body)[::2] == (500, error)


def test_metrics(client):
    from prometheus_client.parser import text_string_to_metric_families

    client.complete(prompt="x")
    families = {family.name: family for family in text_string_to_metric_families(client.ask("GET", "/metrics")[2])}
    assert families["dsv3_requests_running"].type == "gauge"
    assert families["dsv3_busy_seconds"].samples[0].value == 1.5
    assert families["dsv3_busy_seconds"].type == "counter"
    assert families["dsv3_first_token_seconds"].type == "histogram"
    assert sum(sample.value for sample in families["dsv3_http_responses"].samples) >= 1


def test_without_a_chat_template():
    with serving(template=None) as client:
        assert client.refused(CHAT, messages=HELLO)["code"] == "no_chat_template"
        assert client.ask("GET", "/v1/models")[2]["data"][0]["chat"] is False
        assert client.complete(prompt="x")["choices"][0]["text"].startswith(SCRIPT[:9])
