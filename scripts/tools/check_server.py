"""Check that clients which nobody here wrote get from `dsv3 serve` what they should, each in .venv-api (see _peer.py).

Exports a run for Hugging Face, serves the export, and asks it: with the openai package (streams, log-probabilities, stop, n,
seed, usage, errors), with lm-eval over `local-completions` (log-likelihoods equal the model's own within 1e-4), and with
schemathesis on /openapi.json (nothing it makes up gets a 5xx or an answer that the document does not describe); and looks at
its page by a browser, where one is installed.

Example: python scripts/tools/check_server.py runs/tiny
"""

import argparse
import contextlib
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from _peer import ask, peer_python

import dsv3_jax as dsv3
from dsv3_jax.data.tokenizer import load_tokenizer

TOLERANCE = 1e-4
PROMPT = "def main("
PAIRS = [  # no first text ends in a space: lm-eval would move it to the second
    ["import os", "\nimport sys\n"], ["def f(self):\n    return", " None\n"], ["if x is", " not None:\n        return"],
    ["class A", ":\n    pass"], ["for i in", " range(10):"], ["raise", " ValueError('é 日本')"], ["\"\"\"Return", " a string."],
]  # fmt: skip
_TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"  # for schemathesis
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# 413 is right for what is too long in many ways at once; and no schema says that prompt and max_tokens have to fit together
_SCHEMATHESIS = """
[checks.negative_data_rejection]
expected-statuses = [400, 401, 403, 404, 405, 408, 413, 415]
[checks.positive_data_acceptance]
expected-statuses = ["2xx", 400, 404]
"""


@contextlib.contextmanager
def server(model: Path, key_file: Path, *options: str) -> Iterator[str]:
    """The address of a `dsv3 serve` of its own, which SIGTERM must end with exit code 0."""
    command = [str(Path(sys.executable).with_name("dsv3")), "serve", str(model), "--port", "0", "--api-key-file", str(key_file)]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if " is served at " not in line:
                raise SystemExit(f"dsv3 serve has not started: {line}")
            yield line.split()[-1]
        finally:
            process.terminate()
    if process.returncode:
        raise SystemExit(f"dsv3 serve ended with exit code {process.returncode}")


def our_likelihoods(directory: Path) -> list[tuple[float, bool]]:
    """What lm-eval asks, by the model's own logits."""
    model = dsv3.load_hf(directory)
    tokenizer = load_tokenizer(directory / "tokenizer.json", model.config.vocab_size)
    found = []
    for context, continuation in PAIRS:
        ids = tokenizer.encode(context + continuation, add_special_tokens=False).ids
        begin = len(tokenizer.encode(context, add_special_tokens=False).ids)
        logits = np.asarray(model(jnp.asarray([ids]))[0, begin - 1 : -1], np.float64)
        logprobs = np.asarray(jax.nn.log_softmax(logits, axis=-1))
        expected = np.asarray(ids[begin:])
        total = float(logprobs[np.arange(len(expected)), expected].sum())
        found.append((total, bool((logits.argmax(-1) == expected).all())))
    return found


def greedy_text(directory: Path) -> str:
    """What /v1/completions should answer to PROMPT at temperature 0."""
    model = dsv3.load_hf(directory)
    tokenizer = load_tokenizer(directory / "tokenizer.json", model.config.vocab_size)
    begin = tokenizer.token_to_id("<|begin_of_text|>")
    prompt = [begin, *tokenizer.encode(PROMPT, add_special_tokens=False).ids]
    out = np.asarray(dsv3.generate(model, [prompt], 24))[0].tolist()
    return tokenizer.decode(out[len(prompt) :])


def judge_openai(found: dict, text: str) -> list[str]:
    """What is wrong with what the openai package got."""
    wanted = {
        "text": text, "streamed": text, "tokens": text, "streamed_usage": found["usage"],
        "stopped": [text[: text.index(found["stop"])], "stop"], "logprobs_are_of_the_likeliest": True,
        "errors": {
            "unknown": ["BadRequestError", "suffix"], "range": ["BadRequestError", "temperature"],
            "model": ["NotFoundError", "model"], "key": ["AuthenticationError", None], "long": ["BadRequestError", None],
            "chat": None,
        },
    }  # fmt: skip
    wrong = [f"openai: {key} is {found[key]!r}, not {value!r}" for key, value in wanted.items() if found[key] != value]
    if found["chunks"] < 3:
        wrong.append(f"openai: a stream came in {found['chunks']} chunks")
    if found["sampled"][0] != found["sampled"][1] or len({*found["sampled"][0]}) < 3:
        wrong.append(f"openai: three answers of one seed, twice: {found['sampled']}")
    if found["unseeded"] == found["sampled"][0]:
        wrong.append("openai: without a seed the text is that of a seed")
    return wrong


def judge_lm_eval(found: list, ours: list[tuple[float, bool]]) -> list[str]:
    differences = [abs(theirs - mine) for (theirs, _), (mine, _) in zip(found, ours, strict=True)]
    print(f"lm-eval: {len(found)} log-likelihoods, at most {max(differences):.1e} from ours (allowed: {TOLERANCE})")
    wrong = [f"lm-eval: {PAIRS[i]} differs by {d}" for i, d in enumerate(differences) if not d <= TOLERANCE]
    if [greedy for _, greedy in found] != [greedy for _, greedy in ours]:
        wrong.append("lm-eval: other texts are greedy ones")
    return wrong


def judge_browser(seen: dict) -> list[str]:
    """What is wrong with the page."""
    right = {"asked": ["<b>hi</b>", "again", "too long"], "complaints": []}
    wrong = [f"browser: {key} is {seen[key]!r}" for key, value in right.items() if seen[key] != value]
    if "max_tokens=1000000" not in seen["error"] or len(seen["answers"]) != 3 or "NaN" in seen["figures"]:
        wrong.append(f"browser: {seen}")
    return wrong


def schemathesis(url: str, key: str, examples: int, scratch: Path) -> list[str]:
    config = scratch / "schemathesis.toml"
    config.write_text(_SCHEMATHESIS)
    done = subprocess.run(
        [
            str(peer_python("api").with_name("schemathesis")), "--config-file", str(config), "run", f"{url}/openapi.json",
            "--header", f"Authorization: Bearer {key}", "--checks", "all", "--max-examples", str(examples), "--seed", "1",
            "--request-timeout", "120", "--no-color",
        ],
        capture_output=True, text=True, check=False, cwd=scratch,
    )  # fmt: skip
    generated = [line.strip() for line in done.stdout.splitlines() if " generated" in line]
    print(f"schemathesis: {' '.join(generated)}")
    return [f"schemathesis:\n{done.stdout[-6000:]}{done.stderr[-2000:]}"] if done.returncode else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--examples", type=int, default=40, help="schemathesis' examples of each operation")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        exported, key, key_file = scratch / "model", secrets.token_urlsafe(24), scratch / "keys"
        key_file.write_text(key)
        command = [str(Path(sys.executable).with_name("dsv3")), "export", str(args.run), str(exported), "--format", "hf-f32"]
        subprocess.run(command, check=True)
        (exported / "chat_template.jinja").write_text(_TEMPLATE)
        with server(exported, key_file, "--slots", "8", "--context", "256") as url:
            request = {
                "url": url, "key": key, "model": "model", "tokenizer": str(exported), "prompt": PROMPT, "pairs": PAIRS,
                "browser": next(filter(None, map(shutil.which, _BROWSERS)), None),
            }  # fmt: skip
            if request["browser"] is None:
                print(f"no browser is here ({', '.join(_BROWSERS)}): the page stays unseen")
            found = ask(peer_python("api"), "tools/_clients_api.py", request, False)
            wrong = judge_openai(found["openai"], greedy_text(exported))
            wrong += judge_lm_eval(found["lm_eval"], our_likelihoods(exported))
            wrong += judge_browser(found["browser"]) if "browser" in found else []
            wrong += schemathesis(url, key, args.examples, scratch)
    print("\n".join(wrong) or "all as it should be")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
