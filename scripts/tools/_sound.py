"""Sound inputs of the readers that fuzz.py tries: small, and with a value of every kind."""

import json
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.checkpoint.manifest import write_manifest
from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.interop.safetensors_file import write_safetensors


def _lines(*rows: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


OVERRIDES = [
    "optim.lr=1e-3", "model.q_lora_rank=null", "data.path=texts/*.txt,more/*.jsonl", "parallel.fsdp=-1",
    "model={hidden_size: 64}", "train.steps=100", "name=run-7", "parallel.compress=auto", "model.rope_parameters.factor=4.0",
    "checkpoint.keep_every=null",
]  # fmt: skip
METRICS = _lines(*(
    {"step": n, "loss": 5.0 - n / 10, "cross_entropy": 4.0, "step_time_s": 0.5, "time": 100.0 + n, "tokens": 64 * n}
    | ({"eval_loss": 3.5} if n % 4 == 0 else {}) for n in range(1, 13)
))  # fmt: skip
EVENTS = _lines(
    {"time": 90.0, "event": "launch", "attempt": 1, "workers": 2, "hosts": ["a", "b"]}, {"time": 91.0, "event": "started"},
    {"time": 95.0, "event": "restored", "step": 0, "dropped": None}, {"time": 100.0, "event": "compiled", "step": 1},
    {"time": 106.0, "event": "saved", "step": 6, "stall_s": 0.2, "steps_s": 3.0},
    {"time": 108.5, "event": "failure", "attempt": 1, "cause": "process 1 on b was ended by SIGKILL", "host": "b"},
    {"time": 109.0, "event": "launch", "attempt": 2}, {"time": 110.0, "event": "started"},
    {"time": 110.5, "event": "restored", "step": 6, "dropped": {"steps": 2, "seconds": 1.0, "last": 108.0}},
    {"time": 111.0, "event": "compiled", "step": 7}, {"time": 113.0, "event": "ended", "step": 12},
    {"time": 114.0, "event": "done", "code": 0},
)  # fmt: skip
ROUTING = _lines(*({"step": n, "load": [[4, 3, 2, n], [1, 5, 3, 3]]} for n in range(4)))
PLAN = json.dumps(
    {"plans": [{"topology": "v5p:2x2x1", "devices": 4, "step": {"seconds": 2.5, "hidden": 0.6}, "notes": []}]}
).encode()
GENERATION = json.dumps({"bos_token_id": 0, "eos_token_id": [1, 2], "do_sample": True, "temperature": 0.6}).encode()
ROLL_CALL = json.dumps({"process": 1, "processes": 2, "host": "b", "token": ""}).encode()


def _trace_fields() -> list:
    """A trace of two devices as protocol buffers' fields, [number, value], of tensorflow/tsl's xplane.proto."""
    names = {1: "fusion.1", 2: "all-gather-start.3", 3: "all-gather-done.3", 4: "while.2"}
    events = [(4, 0, 100), (2, 0, 1), (1, 1, 30), (3, 30, 40), (1, 40, 60)]
    line = [[1, 1], [2, "XLA Ops"], [3, 1000]]
    line += [[4, [[1, n], [2, begin * 10**6], [3, (end - begin) * 10**6]]] for n, begin, end in events]
    known = [[4, [[1, n], [2, [[1, n], [2, name]]]]] for n, name in names.items()]
    return [[1, [[1, n], [2, f"/device:TPU:{n}"], [3, line], *known]] for n in range(2)]


def _varint(n: int) -> bytes:
    return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + _varint(n >> 7)


def _encoded(fields: list) -> bytes:
    out = b""
    for number, value in fields:
        if isinstance(value, int):
            out += _varint(number << 3) + _varint(value)
        else:
            content = value.encode() if isinstance(value, str) else _encoded(value)
            out += _varint(number << 3 | 2) + _varint(len(content)) + content
    return out


def trace() -> bytes:
    return _encoded(_trace_fields())


def odd_trace(rng: random.Random) -> bytes:
    """A trace that is sound as a file, with other numbers, names and fields in it."""
    fields = json.loads(json.dumps(_trace_fields()))

    def every(fields: list) -> list[list]:
        return [found for field in fields for found in [field, *(every(field[1]) if isinstance(field[1], list) else [])]]

    for _ in range(rng.choice([1, 1, 3])):
        field = rng.choice(every(fields))
        if isinstance(field[1], list):
            field[1] = rng.choice([[], field[1] * 2, field[1][1:]])
        elif isinstance(field[1], str):
            field[1] = rng.choice(["", "/host:CPU", "while.1", "all-reduce-done.1", "[/x]", "\x1b", "x" * 5000])
        else:
            field[rng.choice([0, 1, 1, 1])] = rng.choice([1, 2, 4, 100, 2**31, 2**63 - 1, 2**64 - 1])
    return _encoded(fields)


def safetensors() -> bytes:
    tensors = {f"model.layers.{n}.weight": np.full((2, n + 1), n, np.float32) for n in range(3)}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model.safetensors"
        write_safetensors(path, {name: (t.dtype, t.shape) for name, t in tensors.items()}, tensors.__getitem__)
        return path.read_bytes()


def index() -> bytes:
    names = {f"model.layers.{n}.weight": f"model-{n % 2 + 1:05d}-of-00002.safetensors" for n in range(6)}
    return json.dumps({"metadata": {"total_size": 100}, "weight_map": names}).encode()


def tokenizer() -> bytes:
    return train_tokenizer(["the quick brown fox", "jumps over the lazy dog"] * 3, 280).to_str().encode()


def manifest() -> bytes:
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint_files(Path(scratch))
        write_manifest(Path(scratch))
        return (Path(scratch) / "manifest.json").read_bytes()


def checkpoint_files(directory: Path) -> None:
    for name, content in (("_METADATA", b"{}"), ("weights/d/a1", b"1234"), ("tokenizer.json", b"[]")):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
