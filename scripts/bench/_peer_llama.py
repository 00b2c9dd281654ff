"""The peer of bench_decode_w4.py: llama.cpp, in an environment of its own.

Run by that script with another interpreter, never imported. Reads JSON on the command line, {"path": a GGUF file, "threads",
"prompt": tokens, "skip": new tokens before the clock starts, "tokens": those that are timed}; prints one JSON line.
"""

import json
import sys
import time

import llama_cpp as c
import numpy as np


def main() -> None:
    request = json.loads(sys.argv[1])
    prompt, skip, timed, threads = (request[name] for name in ("prompt", "skip", "tokens", "threads"))
    length = len(prompt) + skip + timed
    model = c.Llama(request["path"], n_ctx=length, n_threads=threads, n_threads_batch=threads, verbose=False)
    model.eval(prompt)
    tokens: list[int] = []
    begin = 0.0
    for i in range(skip + timed):
        if i == skip:
            begin = time.perf_counter()
        tokens.append(int(np.ctypeslib.as_array(c.llama_get_logits_ith(model.ctx, -1), (model.n_vocab(),)).argmax()))
        model.eval(tokens[-1:])
    seconds = (time.perf_counter() - begin) / timed
    print(json.dumps({"seconds": seconds, "tokens": tokens, "system": c.llama_print_system_info().decode()}))


if __name__ == "__main__":
    main()
