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
    tokens = model.tokenize(TEXT, special=True) if model.metadata["tokenizer.ggml.model"] != "none" else None
    return np.stack(logits), {"tokens": tokens}


def _f32(path: str) -> Path:
    """A copy of a file as llama.cpp's own tool dequantises it."""
    import llama_cpp as c

    plain = Path(path).with_suffix(".f32.gguf")
    parameters = c.llama_model_quantize_default_params()
    parameters.ftype, parameters.allow_requantize, parameters.nthread = 0, True, 2  # 0: LLAMA_FTYPE_ALL_F32
    code = c.llama_model_quantize(path.encode(), str(plain).encode(), ctypes.byref(parameters))
    assert code == 0, f"llama_model_quantize returned {code}"
    return plain


def llama_cpp_f32(path: str, ids: np.ndarray) -> tuple[np.ndarray, dict]:
    """The file in float32, so that nothing is rounded in the products."""
    plain = _f32(path)
    found = llama_cpp(str(plain), ids)
    plain.unlink()
    return found


def llama_cpp_mtp(path: str, ids: np.ndarray) -> tuple[np.ndarray, dict]:
    """Greedy texts, and the MTP module's logits at their places, by a drafting context of llama.cpp in float32.

    Its place p has token p and the trunk's hidden state at p - 1, and drafts token p + 1: the returned logits [B, T - 1, V]
    begin with p = 1. `accepted` of `drafted` tokens are those that the trunk generates itself.
    """
    plain = _f32(path)
    found = [_drafts(str(plain), row.tolist()) for row in ids]
    plain.unlink()
    tokens = np.array([tokens for tokens, _ in found])
    logits = np.stack([logits for _, logits in found])
    drafts = logits.argmax(-1)[:, ids.shape[1] - 1 : -1]  # of the generated tokens but the first, which no draft precedes
    accepted = drafts == tokens[:, ids.shape[1] + 1 :]
    return logits, {"text": tokens.tolist(), "drafted": accepted.size, "accepted": int(accepted.sum())}


_NEW_TOKENS = 24


def _drafts(path: str, tokens: list[int]) -> tuple[list[int], np.ndarray]:
    """A greedy text that begins with the tokens, and the module's logits [T - 1, V]."""
    import llama_cpp as c
    from llama_cpp import llama_cpp_ext as ext

    settings = c.llama_model_default_params()
    settings.load_mtp = True
    model = c.llama_model_load_from_file(path.encode(), settings)
    width, vocabulary = c.llama_model_n_embd(model), c.llama_vocab_n_tokens(c.llama_model_get_vocab(model))
    length = len(tokens) + _NEW_TOKENS

    def context(kind: int):
        of_context = c.llama_context_default_params()
        of_context.n_ctx = of_context.n_batch = of_context.n_ubatch = length
        of_context.type_k = of_context.type_v = c.GGML_TYPE_F32
        of_context.ctx_type, of_context.flash_attn_type, of_context.n_threads = kind, 0, 2
        return c.llama_init_from_model(model, of_context)

    def process(of, begin: int, hidden: np.ndarray | None) -> np.ndarray:
        """Logits at the places from `begin` on."""
        batch = c.llama_batch_ext_init(of)
        for place in range(begin, len(tokens)):
            i = c.llama_batch_ext_add_token(batch, 0, tokens[place])
            c.llama_batch_ext_set_pos(batch, i, ctypes.byref(c.llama_pos(place)))
            c.llama_batch_ext_set_output_logits(batch, i, True)
            if hidden is not None:
                row = np.ascontiguousarray(hidden[place - 1])
                its = c.llama_embd(row.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), 1, width)
                c.llama_batch_ext_set_embd_token(batch, i, its)
        code = c.llama_process(of, c.LLAMA_PROCESS_TYPE_DECODE, batch)
        assert code == 0, f"llama_process returned {code}"
        c.llama_batch_ext_free(batch)
        return np.ctypeslib.as_array(c.llama_get_logits(of), (len(tokens) - begin, vocabulary)).copy()

    trunk, module = context(0), context(c.LLAMA_CONTEXT_TYPE_MTP)
    ext.llama_set_embeddings_nextn(trunk, True, False)
    hidden, begin = np.zeros((0, width), np.float32), 0
    while len(tokens) < length:
        logits = process(trunk, begin, None)
        rows = np.ctypeslib.as_array(ext.llama_get_embeddings_nextn(trunk), (len(tokens) - begin, width))
        hidden, begin = np.concatenate([hidden, rows]), len(tokens)
        tokens = [*tokens, int(logits[-1].argmax())]
    return tokens, process(module, 1, hidden)


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
