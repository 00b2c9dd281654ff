"""dsv3_jax: the DeepSeek-V3 stack in JAX.

>>> import dsv3_jax as dsv3
>>> dsv3.train(dsv3.load_config("configs/tiny.yaml"))   # into runs/tiny
>>> dsv3.evaluate("runs/tiny")                          # {"loss": ..., "perplexity": ..., ...}
>>> model = dsv3.load("runs/tiny")                      # or dsv3.load_hf("dir"): a flax.nnx module
>>> logits = model(tokens)                              # i32[B, T] -> f32[B, T, V]
>>> ids = dsv3.generate(model, prompt_ids)              # greedy unless a temperature is given; i32[B, T + N]
>>> dsv3.compress("runs/tiny", "compressed/tiny", "w4")  # a checkpoint in few bits

Names are imported on first use, so that importing the package is quick and touches no device.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsv3_jax.checkpoint.load import load as load
    from dsv3_jax.compression.compress import compress as compress
    from dsv3_jax.config import Config as Config
    from dsv3_jax.config import ModelConfig as ModelConfig
    from dsv3_jax.config import ParallelConfig as ParallelConfig
    from dsv3_jax.config import load_config as load_config
    from dsv3_jax.errors import UserError as UserError
    from dsv3_jax.interop.hf_export import save_hf as save_hf
    from dsv3_jax.interop.hf_import import import_hf as import_hf
    from dsv3_jax.interop.hf_load import load_hf as load_hf
    from dsv3_jax.model.transformer import Transformer as Transformer
    from dsv3_jax.serve.engine import Engine as Engine
    from dsv3_jax.serve.generate import generate as generate
    from dsv3_jax.serve.request import SamplingParams as SamplingParams
    from dsv3_jax.training.evaluate import evaluate as evaluate
    from dsv3_jax.training.loop import train as train

_HOME = {
    "Config": "config",
    "ModelConfig": "config",
    "ParallelConfig": "config",
    "load_config": "config",
    "UserError": "errors",
    "train": "training.loop",
    "evaluate": "training.evaluate",
    "import_hf": "interop.hf_import",
    "load_hf": "interop.hf_load",
    "save_hf": "interop.hf_export",
    "compress": "compression.compress",
    "load": "checkpoint.load",
    "Transformer": "model.transformer",
    "Engine": "serve.engine",
    "SamplingParams": "serve.request",
    "generate": "serve.generate",
}

__all__ = [
    "Config", "Engine", "ModelConfig", "ParallelConfig", "SamplingParams", "Transformer", "UserError", "compress", "evaluate",
    "generate", "import_hf", "load", "load_config", "load_hf", "save_hf", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dsv3_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"dsv3_jax.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
