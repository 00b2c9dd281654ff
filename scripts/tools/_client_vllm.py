"""The consumer of check_vllm.py: vLLM's CPU build, in an environment of its own, which knows nothing of this project.

Run by that script with another interpreter, never imported. Reads JSON on the command line, {"path": a folder of safetensors,
"ids": an .npy of prompts, "dtype", "out": the .npy to write}; prints one JSON line: {}, or {"refused": why it is not loaded}.
"""

import json
import os
import sys

import numpy as np

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that what goes wrong is raised here

from vllm import LLM, SamplingParams


def log_probabilities(model: LLM, ids: np.ndarray, vocabulary: int) -> np.ndarray:
    """f64[B, T - 1, V]: those of every token after the first ones of each prompt."""
    wanted = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=-1)
    out = np.full((*ids.shape, vocabulary), -np.inf)
    prompts = [{"prompt_token_ids": row.tolist()} for row in ids]
    for found, answer in zip(out, model.generate(prompts, wanted, use_tqdm=False), strict=True):
        for place, entries in enumerate(answer.prompt_logprobs):
            for token, entry in (entries or {}).items():
                found[place, token] = entry.logprob
    return out[:, 1:]


def main() -> None:
    request = json.loads(sys.argv[1])
    ids = np.load(request["ids"])
    try:
        model = LLM(
            request["path"], dtype=request["dtype"], skip_tokenizer_init=True, max_model_len=ids.shape[1] + 1, max_logprobs=-1,
            # its own rotary kernel was wrong on a processor with AVX-512
            compilation_config={"custom_ops": ["none"]}, enforce_eager=True, enable_prefix_caching=False,
            kv_cache_memory_bytes=2**28,
        )  # fmt: skip
    except (ValueError, NotImplementedError, RuntimeError) as error:
        print(json.dumps({"refused": " ".join(str(error).split())}))
        return
    np.save(request["out"], log_probabilities(model, ids, model.model_config.get_vocab_size()))
    print(json.dumps({}))


if __name__ == "__main__":
    main()
