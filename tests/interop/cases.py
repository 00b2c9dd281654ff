"""What the tests of Hugging Face checkpoints share: models to write, and a writer of block-FP8 by DeepSeek's formula."""

import json
import math
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from safetensors.numpy import load_file

import dsv3_jax as dsv3
from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.interop.hf_config import hf_config
from dsv3_jax.interop.hf_tensors import sources
from dsv3_jax.interop.safetensors_file import DTYPES, MappedFile, read_header, write_safetensors

F8, BF16 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.bfloat16)
# 576 rows of kv_a, as the released model has, a hidden size that is no multiple of 128, and several blocks elsewhere
RAGGED = dsv3.ModelConfig(
    vocab_size=70, hidden_size=200, intermediate_size=330, moe_intermediate_size=136, num_hidden_layers=2,
    num_nextn_predict_layers=1, num_attention_heads=3, q_lora_rank=150, kv_lora_rank=512, qk_nope_head_dim=40,
    qk_rope_head_dim=64, v_head_dim=50, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1,
)  # fmt: skip
FP8_CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def random_model(config: dsv3.ModelConfig, seed: int = 0) -> dsv3.Transformer:
    """Random weights; norms and the balancing bias too."""
    graph, shapes = nnx.split(nnx.eval_shape(lambda: dsv3.Transformer(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(seed)
    return nnx.merge(graph, jax.tree.map(lambda a: jnp.asarray(rng.normal(a.ndim == 2, 0.1, a.shape), jnp.float32), shapes))


def compressed_checkpoint(root: Path, config: dsv3.ModelConfig, profile: str, *overrides: str) -> Path:
    """Random weights with a tokenizer, each to the nearest number of a profile."""
    text = " ".join(f"the {word} of {n} seas" for n, word in enumerate(["ship", "line", "port", "wind"] * 200))
    (root / "text.txt").write_text(text)
    directory = dsv3.save_hf(random_model(config), root / "hf", "hf-f32")
    train_tokenizer([text], config.vocab_size).save(str(directory / "tokenizer.json"))
    source = dsv3.import_hf(directory, root / "ckpt", ("data.seq_len=16",))
    options = (f"calibration.path={root / 'text.txt'}", "calibration.tokens=64", "method=round", *overrides)
    return dsv3.compress(source, root / "compressed", profile, options)


def noise_checkpoint(directory: Path, experts: int) -> Path:
    """About 7 MB an expert of float32 noise."""
    config = replace(
        RAGGED, vocab_size=64, hidden_size=512, moe_intermediate_size=512, num_hidden_layers=5, n_routed_experts=experts,
        num_nextn_predict_layers=0,
    )  # fmt: skip
    noise = np.random.default_rng(0).standard_normal(2**20, np.float32)
    return write(directory, {s.tensor: np.resize(noise, s.shape) for s in sources(config)}, hf_config(config))


def read_all(directory: Path) -> dict[str, np.ndarray]:
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        entries = read_header(file)
        mapped = MappedFile(file, entries)
        found |= {name: mapped.view(name) for name in entries}
    return found


def write(directory: Path, tensors: dict[str, np.ndarray], config: dict) -> Path:
    """One file and config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "model.safetensors").unlink(missing_ok=True)
    write_safetensors(directory / "model.safetensors", {n: (t.dtype, t.shape) for n, t in tensors.items()}, tensors.__getitem__)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def quantized(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """DeepSeek's: block by block, s = max|w| / 448, w / s in e4m3."""
    scales = np.zeros((math.ceil(w.shape[0] / 128), math.ceil(w.shape[1] / 128)), np.float32)
    values = np.zeros(w.shape, F8)
    for i, j in np.ndindex(scales.shape):
        block = w[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
        scales[i, j] = np.abs(block).max() / 448
        values[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128] = (block / scales[i, j]).astype(F8)
    return values, scales


def dequantized(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """w = value * scale, number by number."""
    rows, columns = (np.arange(n) // 128 for n in values.shape)
    return values.astype(np.float32) * scales[rows][:, columns]


def is_fp8(name: str) -> bool:
    """Whether the release has a tensor in 8 bits."""
    projection = name.endswith("_proj.weight") or name.endswith("kv_a_proj_with_mqa.weight")
    return projection and not name.endswith("eh_proj.weight")


def fp8_checkpoint(source: Path, directory: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """A float32 checkpoint in the release's layout, and the weights that it stands for."""
    tensors, meant = {}, {}
    for name, w in load_file(source / "model.safetensors").items():
        if is_fp8(name):
            tensors[name], tensors[name + "_scale_inv"] = quantized(w)
            meant[name] = dequantized(tensors[name], tensors[name + "_scale_inv"])
        else:
            tensors[name] = w if name.endswith("bias") else w.astype(BF16)
            meant[name] = tensors[name].astype(np.float32)
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": FP8_CONFIG, "dtype": "bfloat16"}
    return write(directory, tensors, config), meant


assert DTYPES["F8_E4M3"] == F8
