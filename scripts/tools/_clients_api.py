"""What clients find at a server: the openai package, lm-eval's log-likelihoods, and a browser.

Runs in .venv-api (see _peer.py). One argument, a JSON object: url, key, model, tokenizer (a directory), prompt, pairs of texts
for lm-eval, and browser (a path, or null). Prints one JSON line.
"""

import json
import re
import sys

import openai


def by_openai(url: str, key: str, model: str, prompt: str) -> dict:
    """What the openai package gets of a request in each of its ways."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
    ask = {"model": model, "prompt": prompt, "max_tokens": 24}
    plain = client.completions.create(**ask, temperature=0, logprobs=3)
    chunks = list(client.completions.create(**ask, temperature=0, stream=True, stream_options={"include_usage": True}))
    stop = plain.choices[0].text[8:11]
    stopped = client.completions.create(**ask, temperature=0, stop=[stop])
    sampled = [client.completions.create(**ask, temperature=1, seed=5, n=3) for _ in range(2)]
    unseeded = client.completions.create(**ask, temperature=1, n=3)
    chosen = plain.choices[0].logprobs
    return {
        "models": [model.id for model in client.models.list()],
        "text": plain.choices[0].text,
        "usage": plain.usage.model_dump(include={"prompt_tokens", "completion_tokens", "total_tokens"}),
        "streamed": "".join(choice.text for chunk in chunks for choice in chunk.choices),
        "chunks": len(chunks),
        "streamed_usage": chunks[-1].usage.model_dump(include={"prompt_tokens", "completion_tokens", "total_tokens"}),
        "stop": stop,
        "stopped": [stopped.choices[0].text, stopped.choices[0].finish_reason],
        "sampled": [[choice.text for choice in answer.choices] for answer in sampled],
        "unseeded": [choice.text for choice in unseeded.choices],
        "logprobs_are_of_the_likeliest": all(
            abs(max(top.values()) - logprob) < 1e-6
            for top, logprob in zip(chosen.top_logprobs, chosen.token_logprobs, strict=True)
        ),
        "tokens": "".join(chosen.tokens),
        "errors": errors(url, key, model),
    }


def errors(url: str, key: str, model: str) -> dict:
    """The exceptions of the openai package for requests that are refused."""
    found = {}
    for name, its_key, asked in (
        ("unknown", key, {"suffix": "x"}), ("range", key, {"temperature": -1}), ("model", key, {"model": "none"}),
        ("key", "wrong-key-0123456789", {}), ("long", key, {"max_tokens": 10**6}),
    ):  # fmt: skip
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=its_key, max_retries=0)
        try:
            client.completions.create(**{"model": model, "prompt": "x", **asked})
            found[name] = None
        except openai.APIStatusError as error:
            found[name] = [type(error).__name__, error.param]
    try:
        openai.OpenAI(base_url=f"{url}/v1", api_key=key).chat.completions.create(
            model=model, messages=[{"role": "user", "content": "hi"}], max_tokens=4, logprobs=True, top_logprobs=2
        )
        found["chat"] = None
    except openai.APIStatusError as error:
        found["chat"] = [type(error).__name__, error.code]
    return found


def by_lm_eval(url: str, key: str, model: str, tokenizer: str, pairs: list[list[str]]) -> list:
    """Log-likelihoods of the second texts after the first ones, and whether they are what greedy decoding gives."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    client = LocalCompletionsAPI(
        base_url=f"{url}/v1/completions", model=model, tokenizer=tokenizer, tokenizer_backend="huggingface", batch_size=8,
        max_length=256, header={"Authorization": f"Bearer {key}"},
    )  # fmt: skip
    asked = [Instance("loglikelihood", {}, tuple(pair), i) for i, pair in enumerate(pairs)]
    return client.loglikelihood(asked, disable_tqdm=True)


def by_browser(url: str, key: str, browser: str) -> dict:
    """What a person sees at the server's page: two answers, an error, the figures; and what the browser complains of."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = opened.new_context(http_credentials={"username": "me", "password": key}).new_page()
        complaints = []
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(url)
        page.locator("#model", has_text="tokens").wait_for()
        page.fill("#most", "12")
        page.fill("#text", "<b>hi</b>")
        page.click("#send")
        page.locator("#stop:disabled").wait_for()
        page.fill("#text", "again")
        page.keyboard.press("Control+Enter")
        page.locator(".assistant").nth(1).wait_for(state="attached")
        page.locator("#stop:disabled").wait_for()
        page.fill("#most", "1000000")
        page.fill("#text", "too long")
        page.click("#send")
        page.wait_for_selector(".error")
        page.locator("#figures div", has_text=re.compile(r"finished\s*[2-9]")).wait_for()
        seen = {
            "asked": page.locator(".user").all_inner_texts(), "answers": page.locator(".assistant").all_inner_texts(),
            "error": page.inner_text(".error"), "figures": page.inner_text("#figures"), "complaints": complaints,
        }  # fmt: skip
        opened.close()
    return seen


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    server = request["url"], request["key"], request["model"]
    found = {"openai": by_openai(*server, request["prompt"])}
    found["lm_eval"] = by_lm_eval(*server, request["tokenizer"], request["pairs"])
    if request["browser"]:
        found["browser"] = by_browser(*server[:2], request["browser"])
    print(json.dumps(found))
