# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Hugging Face checkpoints, both ways
#
# Load a checkpoint of DeepSeek-V3's architecture, look at it, and write it for PyTorch clients in three formats. Runs on a CPU
# in less than a minute, as a notebook (jupytext) or as a script: `python notebooks/01_load_and_export.py [HF_DIR]`.
#
# Without a directory it makes a small model of random weights; everything below works the same with a real one.

# %%
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")  # virtual devices, to try a mesh on; before JAX starts
os.environ.setdefault("NPROC", "64")  # threads in which all of them can wait for each other
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

import dsv3_jax as dsv3

scratch = Path(tempfile.mkdtemp())
given = [Path(a) for a in sys.argv[1:] if Path(a, "config.json").is_file()]  # a notebook's kernel has arguments of its own

# %% [markdown]
# ## A checkpoint
#
# `save_hf` writes config.json, safetensors and a model card; the directory appears only once it is complete.

# %%
if given:
    source = given[0]
else:
    config = dsv3.ModelConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, moe_intermediate_size=64, num_hidden_layers=4,
        num_nextn_predict_layers=1, n_routed_experts=16, initializer_range=0.06,
    )  # fmt: skip
    source = dsv3.save_hf(dsv3.Transformer(config, rngs=nnx.Rngs(0)), scratch / "model", format="hf-f32")
print(sorted(p.name for p in source.iterdir()))
print(json.dumps(json.loads((source / "config.json").read_text()), indent=1)[:400], "...")

# %% [markdown]
# ## Load it
#
# Parameters are float32, exactly the checkpoint's numbers, whatever it holds (float32, bfloat16, block-FP8). The model is a
# `flax.nnx.Module` whose arrays say in their names what their axes are.

# %%
model = dsv3.load_hf(source)
for path, variable in list(nnx.to_flat_state(nnx.state(model)))[:6]:
    print(".".join(map(str, path)), variable.get_value().shape)

prompt = np.random.default_rng(0).integers(2, model.config.vocab_size, (2, 32))
logits = np.asarray(model(prompt))
print("logits", logits.shape, "greedy:", dsv3.generate(model, prompt[:1, :8], max_new_tokens=8)[0, 8:])

# %% [markdown]
# ## On a mesh
#
# The same call spreads the weights as training stores them, and each process reads only what its devices hold.

# %%
meshed = dsv3.load_hf(source, parallel=dsv3.ParallelConfig(fsdp=2, expert=4))
experts = meshed.moe_blocks.ffn.w_down_EMD.get_value()
print("experts' weights", experts.shape, "a device has", experts.addressable_shards[0].data.shape)
difference = np.abs(np.asarray(meshed(prompt)) - logits).max()
print(f"logits differ by {difference:.1e}")
assert difference < 1e-3

# %% [markdown]
# ## Export it, in three formats
#
# `hf-fp8` is DeepSeek's own block-FP8 (e4m3 with a float32 scale for every 128 x 128 block), which transformers, vLLM and
# SGLang recognise. What each costs in accuracy is seen best in the distribution of the next token: random weights are hard on
# it, because a routing choice flips easily.


# %%
def log_probs(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


sizes, divergences = {}, {}
for name in ("hf-f32", "hf-bf16", "hf-fp8"):
    out = dsv3.save_hf(model, scratch / name, format=name)
    sizes[name] = sum(p.stat().st_size for p in out.glob("*.safetensors"))
    p, q = log_probs(logits), log_probs(np.asarray(dsv3.load_hf(out)(prompt)))
    divergences[name] = (np.exp(p) * (p - q)).sum(-1).mean()
    print(f"{name:8s} {sizes[name] / 1e6:7.2f} MB   mean KL divergence of the next token {divergences[name]:.2e}")
assert sizes["hf-fp8"] < sizes["hf-bf16"] < sizes["hf-f32"]
assert divergences["hf-f32"] < 1e-6

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3))
left.bar(list(sizes), [size / 1e6 for size in sizes.values()])
left.set_ylabel("MB")
right.bar(list(divergences), list(divergences.values()))
right.set_ylabel("KL divergence, nats")
figure.suptitle("three formats of one model")
figure.tight_layout()
figure.savefig(scratch / "formats.png")

# %% [markdown]
# ## Import it, for training
#
# On the command line: `dsv3 import HF_DIR CKPT_DIR`, then `dsv3 eval`, `generate`, `export`, or training from it. It writes one
# tensor at a time, and an import that was interrupted continues when it is started again. `--plan` says beforehand
# which tensor fills which array.

# %%
from rich.console import Console

from dsv3_jax.interop.hf_plan import plan_import, show_plan

show_plan(plan_import(source), Console(width=140))
checkpoint = dsv3.import_hf(source, scratch / "checkpoint")
again = np.asarray(dsv3.load(checkpoint)(prompt))
print("the imported checkpoint's logits are the same:", bool((again == logits).all()))
assert np.abs(again - logits).max() < 1e-4
print("everything is in", scratch)
