"""The consumer of check_export.py: transformers on torch, in an environment of its own, which knows nothing of this project.

Run by that script with another interpreter, never imported. Reads a JSON request on the command line: {"directory": an export,
"ids": an .npy of prompts, "new_tokens": n, "out": where to put an .npz of logits and greedy tokens}; prints one JSON line.
"""

import json
import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    request = json.loads(sys.argv[1])
    model, loading = AutoModelForCausalLM.from_pretrained(request["directory"], dtype="auto", output_loading_info=True)
    model = model.float().eval()  # bfloat16 flips choices of experts that are close
    model.generation_config.eos_token_id = None  # all of the tokens, whatever they are
    ids = torch.from_numpy(np.load(request["ids"]))
    with torch.no_grad():
        logits = model(ids).logits
        greedy = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=request["new_tokens"], do_sample=False, pad_token_id=0
        )
    np.savez(request["out"], logits=logits.numpy(), greedy=greedy.numpy())
    found = {name: sorted(map(str, loading[name])) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if request.get("text"):
        found["tokens"] = AutoTokenizer.from_pretrained(request["directory"])(request["text"])["input_ids"]
    print(json.dumps(found | {"dtype": str(model.dtype), "finite": bool(torch.isfinite(logits).all())}))


if __name__ == "__main__":
    main()
