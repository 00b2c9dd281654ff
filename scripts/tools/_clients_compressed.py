"""The consumers of check_compressed.py, in an environment of their own, which know nothing of this project.

Run by that script with another interpreter, never imported. Reads JSON on the command line, {"client": one of the functions
below, "paths": what it loads, "ids": an .npy of prompts, "out": a folder for 0.npz, 1.npz, ... of logits}; prints one JSON line
with what the client says of loading each.
"""

import ctypes
import json
import sys
from pathlib import Path

import numpy as np

TEXT = b"def main():\n    return 0\n"


def transformers(path: str, ids: np.ndarray) -> tuple[np.ndarray, dict]:
    """compressed-tensors, in float32. Experts stay in their scales' float16, where 4-bit weights are exact: they are cast."""
    import torch
    from transformers import AutoModelForCausalLM

    model, loading = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    tokens = torch.from_numpy(ids)
    with torch.no_grad():
        model(tokens)  # weights outside of experts are dequantised on the first use
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.float()
        logits = model(tokens).logits.numpy()
    return logits, {name: sorted(map(str, loading[name])) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")}


def gptqmodel(path: str, ids: np.ndarray) -> tuple[np.ndarray, dict]:
    """Its own loader and CPU kernels, in float16. `quantized`: how many modules are integer."""
    import torch
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.nn_modules.qlinear import BaseQuantLinear

    model = GPTQModel.load(path, device="cpu", dtype=torch.float16, backend=BACKEND.TORCH).model
    with torch.no_grad():
        logits = model(torch.from_numpy(ids)).logits.float().numpy()
    return logits, {"quantized": sum(isinstance(module, BaseQuantLinear) for module in model.modules())}


def llama_cpp(path: str, ids: np.ndarray) -> tuple[np.ndarray, dict]:
    """A float32 cache. It multiplies integer weights by activations that it rounds to 8 bits; see `llama_cpp_f32`."""
    import llama_cpp as c

    model = c.Llama(
        path, n_ctx=ids.shape[1], n_batch=ids.shape[1], n_ubatch=ids.shape[1], logits_all=True, n_threads=2, verbose=False,
        type_k=c.GGML_TYPE_F32, type_v=c.GGML_TYPE_F32, flash_attn=False,
    )  # fmt: skip
    logits = []
    for row in ids:
        model.reset()
        model.eval(row.tolist())
        logits.append(np.array(model.scores[: len(row)]))
    return np.stack(logits), {"tokens": model.tokenize(TEXT)}


def llama_cpp_f32(path: str, ids: np.ndarray) -> tuple[np.ndarray, dict]:
    """The file as llama.cpp's own tool dequantises it to float32, so that nothing is rounded in the products."""
    import llama_cpp as c

    plain = Path(path).with_suffix(".f32.gguf")
    parameters = c.llama_model_quantize_default_params()
    parameters.ftype, parameters.allow_requantize, parameters.nthread = 0, True, 2  # 0: LLAMA_FTYPE_ALL_F32
    code = c.llama_model_quantize(path.encode(), str(plain).encode(), ctypes.byref(parameters))
    assert code == 0, f"llama_model_quantize returned {code}"
    found = llama_cpp(str(plain), ids)
    plain.unlink()
    return found


def main() -> None:
    request = json.loads(sys.argv[1])
    ids, said = np.load(request["ids"]), []
    for i, path in enumerate(request["paths"]):
        logits, about = globals()[request["client"]](path, ids)
        np.savez(Path(request["out"]) / f"{i}.npz", logits=logits)
        said.append(about | {"finite": bool(np.isfinite(logits).all())})
    print(json.dumps({"said": said}))


if __name__ == "__main__":
    main()
