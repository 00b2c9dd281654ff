"""The peer of bench_train.py, bench_decode.py and bench_serve.py: transformers' DeepSeek-V3 on torch, in its own environment.

Run by those scripts with another interpreter, never imported. Reads a JSON request on the command line, prints one
JSON line: {"task": "train"|"decode"|"serve", ...}.
"""

import json
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import ContinuousBatchingConfig, DeepseekV3Config, DeepseekV3ForCausalLM, GenerationConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def train(request: dict) -> dict:
    """Whole training steps (forward, backward, clipping, AdamW) at batch x seq_len; the median of the timed ones."""
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**request["config"])).to(getattr(torch, request["dtype"]))
    model.train()
    model.config.use_cache = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)
    forward = torch.compile(model) if request["compile"] else model
    batch, seq_len = request["batch_size"], request["seq_len"]

    def step() -> float:
        ids = torch.randint(0, request["config"]["vocab_size"], (batch, seq_len))
        loss = forward(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    start = time.perf_counter()
    step()
    first = time.perf_counter() - start
    step()  # the second step still allocates the optimiser's scratch
    times = []
    for _ in range(request["steps"]):
        start = time.perf_counter()
        loss = step()
        times.append(time.perf_counter() - start)
    return {"first_step_s": first, "step_s": statistics.median(times), "loss": loss}


def decode(request: dict) -> dict:
    """Greedy decoding with the cache; seconds per call of `generate`, prompt of `prompt_len` included."""
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**request["config"])).eval()
    result = {}
    for batch in request["batch_sizes"]:
        ids = torch.randint(2, request["config"]["vocab_size"], (batch, request["prompt_len"]))

        def call(n: int, ids=ids) -> float:
            start = time.perf_counter()
            with torch.no_grad():
                out = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=n,
                    min_new_tokens=n,
                    do_sample=False,
                    pad_token_id=0,
                )
            assert out.shape[1] == ids.shape[1] + n
            return time.perf_counter() - start

        call(8)
        result[str(batch)] = statistics.median(call(request["new_tokens"]) for _ in range(request["repeats"]))
    return {"seconds": result}


def serve(request: dict) -> dict:
    """Greedy texts of all requests, ([ids], number of tokens) each: in batches by `generate`, or by continuous batching."""
    model = DeepseekV3ForCausalLM.from_pretrained(request["model"], dtype=torch.float32).eval()
    requests = json.loads(Path(request["requests"]).read_text())
    if request["way"] == "continuous":
        _widen_cache(model)
    work = {"generate": _in_batches, "continuous": _continuously}[request["way"]]
    with torch.no_grad():
        work(model, requests[:8], request["batch"])
        start = time.perf_counter()
        texts = work(model, requests, request["batch"])
    return {"seconds": time.perf_counter() - start, "texts": texts}


def _in_batches(model, requests: list, batch: int) -> list[list[int]]:
    texts = []
    for i in range(0, len(requests), batch):
        part = requests[i : i + batch]
        longest, most = max(len(ids) for ids, _ in part), max(n for _, n in part)
        ids = torch.tensor([[0] * (longest - len(ids)) + ids for ids, _ in part])
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids, _ in part])
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=most, min_new_tokens=most, do_sample=False, pad_token_id=0
        )
        texts += [row[longest : longest + n] for row, (_, n) in zip(out.tolist(), part, strict=True)]
    return texts


def _widen_cache(model) -> None:
    """Let transformers 5.23's paged cache, which has one width for keys and values, the rotary keys', hold MLA's."""
    model.config.head_dim = model.config.qk_head_dim  # after loading: the rotary tables are made
    update = PagedAttentionCache.update

    def widened(self, key_states, value_states, **options):
        width = value_states.shape[-1]
        padded = torch.nn.functional.pad(value_states, (0, key_states.shape[-1] - width))
        keys, values = update(self, key_states=key_states, value_states=padded, **options)
        return keys, values[..., :width]

    PagedAttentionCache.update = widened


def _continuously(model, requests: list, batch: int) -> list[list[int]]:
    most = max(len(ids) + n for ids, n in requests)
    pages = ContinuousBatchingConfig(page_size=32, num_blocks=batch * -(-most // 32), max_batch_tokens=2 * batch)
    config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    with model.continuous_batching_context_manager(config, continuous_batching_config=pages) as manager:
        names = [manager.add_request(ids, max_new_tokens=n) for ids, n in requests]
        done = {}
        while len(done) < len(names):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                if result.error:
                    raise RuntimeError(result.error)
                done[result.request_id] = result.generated_tokens
            elif result is None and not manager.is_running():
                raise RuntimeError("continuous batching has ended early")
    return [done[name] for name in names]


def main() -> None:
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    result = {"train": train, "decode": decode, "serve": serve}[request["task"]](request)
    print(json.dumps(result | {"peak_gb": peak_gb(), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
