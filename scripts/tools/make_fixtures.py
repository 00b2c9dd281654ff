"""Write tests/fixtures/options_*: tiny checkpoints with unusual options and reference results, by transformers.

Run with the peer's interpreter (`python -c "import _peer; print(_peer.peer_python())"` in scripts/tools/ makes and names it):
    .venv-torch/bin/python scripts/tools/make_fixtures.py
"""

import json
from pathlib import Path

import numpy as np
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpLayer

OUT = Path(__file__).resolve().parents[2] / "tests" / "fixtures"
SMALL = {
    "vocab_size": 97, "hidden_size": 40, "intermediate_size": 56, "moe_intermediate_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 3, "num_key_value_heads": 3, "q_lora_rank": 20, "kv_lora_rank": 12, "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6, "v_head_dim": 14, "n_routed_experts": 6, "n_shared_experts": 2, "num_experts_per_tok": 2,
    "n_group": 3, "topk_group": 2, "first_k_dense_replace": 1, "max_position_embeddings": 160, "initializer_range": 0.1,
}  # fmt: skip
CASES = {
    # everything that can be switched away from the default, in few models
    "options_a": {"attention_bias": True, "tie_word_embeddings": True, "norm_topk_prob": False, "rms_norm_eps": 1e-3,
                  "routed_scaling_factor": 1.3},
    "options_b": {"rope_interleave": False, "first_k_dense_replace": 0, "q_lora_rank": None, "n_group": 1, "topk_group": 1,
                  "attention_bias": True},
    "options_c": {"first_k_dense_replace": 3, "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 40, "beta_fast": 16,
        "beta_slow": 2, "mscale": 0.7, "mscale_all_dim": 0.4}},
}  # fmt: skip


def reference(model: DeepseekV3ForCausalLM, config: DeepseekV3Config) -> dict[str, np.ndarray]:
    ids = torch.randint(2, config.vocab_size, (2, 130))
    out = model(ids, labels=ids, output_hidden_states=True)
    out.loss.backward()
    prompt = ids[:, :9]
    model.generation_config.eos_token_id = None  # all of the tokens, whatever they are
    greedy = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20,
                            do_sample=False, pad_token_id=0)  # fmt: skip
    arrays = {
        "input_ids_0": ids, "logits_0": out.logits.detach(), "prompt_ids": prompt, "greedy_ids": greedy,
        "train_ids": ids, "train_loss": out.loss.detach(),
    }  # fmt: skip
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and (parameter.ndim == 1 or "layers.1.self_attn" in name or "gate.weight" in name):
            arrays[f"grad:{name}"] = parameter.grad
    return {name: a.numpy() for name, a in arrays.items()}


def mtp(model: DeepseekV3ForCausalLM, config: DeepseekV3Config, directory: Path) -> dict[str, np.ndarray]:
    """Add an MTP module's tensors to the checkpoint, and its logits to the reference."""
    from safetensors.torch import load_file, save_file

    layer = MtpLayer(config, type(model.model.layers[-1]), type(model.model.norm), config.num_hidden_layers - 1).eval()
    for name, parameter in layer.named_parameters():
        torch.nn.init.normal_(parameter, float("norm" in name), 0.1)
    ids = torch.randint(2, config.vocab_size, (2, 33))
    inputs, following = ids[:, :-1], ids[:, 1:]
    positions = torch.arange(32)[None]
    hidden = model.model(inputs).last_hidden_state
    mask = torch.full((32, 32), float("-inf")).triu(1)[None, None]
    out = layer(model.model.embed_tokens(following), hidden, model.model.rotary_emb(hidden, positions), mask, positions, None)
    tensors = load_file(directory / "model.safetensors")
    prefix = f"model.layers.{config.num_hidden_layers}."
    rename = {"mtp_block.": "", "post_norm.": "shared_head.norm."}
    for name, value in layer.state_dict().items():
        for old, new in rename.items():
            name = name.replace(old, new)
        if name.startswith("mlp.experts."):
            for e in range(config.n_routed_experts):
                kinds = ("gate", "up") if "gate_up" in name else ("down",)
                for kind, part in zip(kinds, value[e].chunk(len(kinds), 0), strict=True):
                    tensors[f"{prefix}mlp.experts.{e}.{kind}_proj.weight"] = part.contiguous()
        else:
            tensors[prefix + name] = value.contiguous()
    tensors[prefix + "embed_tokens.weight"] = model.model.embed_tokens.weight.detach().clone()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return {"mtp_ids": ids.numpy(), "mtp_logits": model.lm_head(out).detach().numpy()}


def main() -> None:
    for seed, (name, options) in enumerate(CASES.items()):
        torch.manual_seed(seed)
        config = DeepseekV3Config(**(SMALL | options), num_nextn_predict_layers=int(name == "options_b"))
        model = DeepseekV3ForCausalLM(config).eval()
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith(("bias", "norm.weight")):
                torch.nn.init.normal_(parameter, float("norm" in parameter_name), 0.1)
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):
                buffer.normal_(0, 0.1)
        directory = OUT / name
        model.save_pretrained(directory)
        arrays = reference(model, config)
        if config.num_nextn_predict_layers:
            with torch.no_grad():
                arrays |= mtp(model, config, directory)
        np.savez(directory / "reference.npz", **arrays)
        if name == "options_c":  # as DeepSeek's own files have it
            path = directory / "config.json"
            raw = json.loads(path.read_text())
            rope = raw.pop("rope_parameters")
            raw["rope_theta"] = rope.pop("rope_theta")
            raw["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
            path.write_text(json.dumps(raw, indent=2))


if __name__ == "__main__":
    main()
