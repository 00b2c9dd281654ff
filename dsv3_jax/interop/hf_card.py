"""The model card of an export: README.md, which says what the checkpoint is and how it was made."""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from dsv3_jax.checkpoint.load import Checkpoint
from dsv3_jax.checkpoint.storage import stored_step
from dsv3_jax.config import ModelConfig
from dsv3_jax.progress import human

_FP8 = (
    "Projections and experts are e4m3 with a scale (`weight_scale_inv`) for every 128 x 128 block, the rest is bfloat16 "
    "(router bias: float32).\n\n"
)
_INTEGERS = (
    "Weights are integers with a scale for each group of inputs, in {}; the rest is bfloat16 (router bias: float32).\n\n"
)
_GGUF = (
    "Weights are integers with a scale for each block of 32 inputs; `attn_k_b`, kv_b's part for keys, is transposed and was "
    "rounded again, to Q8_0; the rest is float16 and float32. `model-mtp.gguf`, where there is one, has the "
    "multi-token-prediction module too.\n\n"
)
_LAYOUTS = {
    "hf-fp8": _FP8, "hf-w4": _INTEGERS.format("compressed-tensors' layout `pack-quantized`"),
    "hf-gptq": _INTEGERS.format("the layout of GPTQ's tools"), "gguf": _GGUF,
}  # fmt: skip
_TRANSFORMERS = """```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this directory", dtype="auto")
```
"""
_GPTQMODEL = """```python
import torch
from gptqmodel import GPTQModel

model = GPTQModel.load("this directory", dtype=torch.float16)
```

transformers loads the experts of this layout as random numbers, without an error.
"""
_LLAMA_CPP = """```sh
llama-cli --model model.gguf
```
"""


def model_card(config: ModelConfig, format: str, size: int, sha256: Mapping[str, str], origin: Mapping[str, str]) -> str:
    """`size`: bytes of all tensors; `sha256` by file name; `origin`: rows of the table of where the weights come from."""
    rows = "\n".join(f"| {key} | {value} |" for key, value in origin.items())
    files = "\n".join(f"| `{name}` | `{digest}` |" for name, digest in sha256.items())
    layout = _LAYOUTS.get(format, "")
    of_llama_cpp = format.startswith("gguf")
    mtp = config.num_nextn_predict_layers
    modules = f", and {mtp} multi-token-prediction module{'s' * (mtp > 1)} (`model.layers.{config.num_hidden_layers}.*`)"
    return f"""---
library_name: {"llama.cpp" if of_llama_cpp else "transformers"}
pipeline_tag: text-generation
tags: [deepseek_v3, dsv3_jax]
---

# A model of DeepSeek-V3's architecture

{config.num_hidden_layers} layers, hidden size {config.hidden_size}, {config.n_routed_experts} experts of which a token takes \
{config.num_experts_per_tok}{modules if mtp else ""}; {human(size, "B")} of weights as `{format}`.

{layout}Exported by dsv3_jax {version("dsv3-jax")}:

| | |
|---|---|
{rows}

{_LLAMA_CPP if of_llama_cpp else _GPTQMODEL if format == "hf-gptq" else _TRANSFORMERS}
| file | sha256 |
|---|---|
{files}
"""


def origin_of_checkpoint(found: Checkpoint, imported: bool, format: str) -> dict[str, str]:
    """The card's rows about an exported checkpoint: what run, step, data and precision its weights come from."""
    c = found.config
    if imported:
        return {"from": f"`{found.path.name}`, imported from another Hugging Face checkpoint", "format": f"`{format}`"}
    step = stored_step(found.path) or 0  # which the directory's name need not say
    tokens = step * c.data.batch_size * c.data.seq_len
    corpus = "the source text of Python's standard library" if c.data.path is None else f"`{Path(c.data.path).name}`"
    return {
        "from": f"run `{c.name}`, step {step} of {c.train.steps}",
        "trained on": f"{human(tokens)} tokens of {corpus}, in sequences of {c.data.seq_len}",
        "precision in training": f"`{c.precision.recipe}`",
        "format": f"`{format}`",
    }
