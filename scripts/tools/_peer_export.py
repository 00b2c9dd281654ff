"""The consumer of check_export.py: transformers on torch, in an environment of its own, which knows nothing of this project.

Run by that script with another interpreter, never imported. Reads JSON on the command line, {"requests": [...]}, each of them
{"directories": exports of one model, "ids": an .npy of prompts, "new_tokens": n, "out": where to put 0.npz, 1.npz, ... of
logits and greedy tokens, "text": something to tokenize or null}; prints one JSON line.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def consume(directory: str, ids: torch.Tensor, new_tokens: int, out: Path) -> dict:
    """Logits and greedy tokens into a file; what the client says of its loading."""
    model, loading = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", output_loading_info=True)
    model = model.float().eval()  # bfloat16 flips choices of experts that are close
    model.generation_config.eos_token_id = None  # all of the tokens, whatever they are
    with torch.no_grad():
        logits = model(ids).logits
        greedy = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
        )
    np.savez(out, logits=logits.numpy(), greedy=greedy.numpy())
    found = {name: sorted(map(str, loading[name])) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    return found | {"dtype": str(model.dtype), "finite": bool(torch.isfinite(logits).all())}


def answer(request: dict) -> list[dict]:
    """What the client says of loading each directory of a request."""
    ids = torch.from_numpy(np.load(request["ids"]))
    directories = request["directories"]
    found = [
        consume(directory, ids, request["new_tokens"], Path(request["out"]) / f"{i}.npz")
        for i, directory in enumerate(directories)
    ]
    if request["text"]:
        found[0]["tokens"] = AutoTokenizer.from_pretrained(directories[0])(request["text"])["input_ids"]
    return found


def main() -> None:
    print(json.dumps({"loading": [answer(request) for request in json.loads(sys.argv[1])["requests"]]}))


if __name__ == "__main__":
    main()
