"""Hugging Face's `DeepseekV3Config` (config.json) to `ModelConfig`: every field is honoured, checked, or refused by name."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from dsv3_jax.config import ModelConfig, RopeConfig, config_from_dict
from dsv3_jax.errors import UserError
from dsv3_jax.interop import fp8

# Fields that say nothing about the computation, or repeat what others say.
_IGNORED = {
    "architectures", "auto_map", "aux_loss_alpha", "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id",
    "ep_size", "head_dim", "id2label", "is_encoder_decoder", "label2id", "model_type", "num_key_value_heads",
    "output_attentions", "output_hidden_states", "output_router_logits", "pad_token_id", "pretraining_tp",
    "problem_type", "qk_head_dim", "quantization_config", "return_dict", "seq_aux", "torch_dtype", "transformers_version",
    "use_cache",
}  # fmt: skip

# Fields that the architecture fixes: any other value is another model.
_FIXED = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "moe_layer_freq": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}

# What DeepseekV3Config takes for a field that config.json leaves out, where our own default is another or the checks below
# need it (transformers 5.23).
_DEFAULTS = {
    "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "num_hidden_layers": 61, "first_k_dense_replace": 3, "num_attention_heads": 128, "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256,
    "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "max_position_embeddings": 4096,
}  # fmt: skip

# Keys of quantization_config that are not needed: how scales were rounded, and which modules are in 16 bits.
_QUANTIZATION_IGNORED = {"scale_fmt", "modules_to_not_convert", "ignored_layers"}

_RENAMED = {"num_mtp_layers": "num_nextn_predict_layers"}


def _rope(raw: dict[str, Any]) -> dict[str, Any]:
    """Fields of `RopeConfig`, from `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (older files)."""
    given = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise UserError(f"config.json: rope_parameters={given!r} must be an object")
    rope = dict(given)
    rope["rope_type"] = rope.pop("type", rope.get("rope_type", "default"))
    if rope["rope_type"] not in ("default", "yarn"):
        raise UserError(f"config.json: rope_type={rope['rope_type']!r} is not supported; use default or yarn")
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise UserError("config.json: partial_rotary_factor is not supported; the whole rope head is rotated")
    if "rope_theta" in raw:
        rope.setdefault("rope_theta", raw["rope_theta"])
    known = {f.name for f in dataclasses.fields(RopeConfig)}
    unknown = sorted(set(rope) - known)
    if unknown:
        raise UserError(f"config.json: rope parameter {unknown[0]!r} is unknown; known: {', '.join(sorted(known))}")
    rope = {key: value for key, value in rope.items() if value is not None}
    if rope["rope_type"] == "yarn":
        context = raw["max_position_embeddings"]
        original = rope.setdefault("original_max_position_embeddings", context)
        # where these are no two lengths, the check of the complete config says what is wrong
        if "factor" not in rope and all(isinstance(n, int) and n > 0 for n in (context, original)):
            rope["factor"] = context / original
    floats = {f.name for f in dataclasses.fields(RopeConfig) if f.type is float}
    # an integer of hundreds of digits is no float: the check of the complete config says so
    return {k: float(v) if k in floats and type(v) is int and abs(v) < 2**63 else v for k, v in rope.items()}


def _check_quantization(quantization: Any, where: str) -> None:
    """Refuse everything but DeepSeek's block-FP8, which needs no settings: the tensors themselves show it."""
    if not isinstance(quantization, dict):
        raise UserError(f"{where}: quantization_config={quantization!r} must be an object")
    for key, value in fp8.QUANTIZATION_CONFIG.items():
        if quantization.get(key, None if key == "quant_method" else value) != value:
            raise UserError(f"{where}: quantization_config.{key}={quantization.get(key)!r} is not supported; only {value!r} is")
    unknown = sorted(set(quantization) - set(fp8.QUANTIZATION_CONFIG) - _QUANTIZATION_IGNORED)
    if unknown:
        raise UserError(f"{where}: quantization_config.{unknown[0]} is unknown, so its effect on the weights is too")


def read_config_json(directory: str | Path) -> dict[str, Any]:
    """The fields of `directory/config.json`. Raises `UserError` if it is not a DeepSeek-V3's."""
    path = Path(directory) / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not isinstance(raw, dict) or raw.get("model_type") != "deepseek_v3":
        found = raw.get("model_type") if isinstance(raw, dict) else type(raw).__name__
        raise UserError(f"{path}: model_type={found!r}; only 'deepseek_v3' can be loaded")
    return raw


def model_config(raw: dict[str, Any], where: str) -> ModelConfig:
    """A config.json's fields as a `ModelConfig`; `where` names the file in errors.

    Raises `UserError` naming a field that is unknown, unsupported or impossible.
    """
    raw = _DEFAULTS | raw
    if raw.get("quantization_config"):
        _check_quantization(raw["quantization_config"], where)
    for name, value in _FIXED.items():
        if raw.get(name, value) != value:
            raise UserError(f"{where}: {name}={raw[name]!r} is not supported; only {value!r} is")
    heads = raw["num_attention_heads"]
    if raw.get("num_key_value_heads", heads) not in (heads, None):
        raise UserError(f"{where}: num_key_value_heads={raw['num_key_value_heads']} must equal num_attention_heads={heads}")

    known = {f.name for f in dataclasses.fields(ModelConfig)}
    model: dict[str, Any] = {_RENAMED.get(str(key), str(key)): value for key, value in raw.items()}
    rope = _rope(model)
    unknown = sorted(set(model) - known - _IGNORED - set(_FIXED) - {"rope_scaling", "rope_theta"})
    unknown = [key for key in unknown if not key.startswith("_")]
    if unknown:
        raise UserError(f"{where}: field {unknown[0]!r} is unknown, so its effect on the model is too")
    sections = {"model": {k: v for k, v in model.items() if k in known} | {"rope_parameters": rope}}
    # a config of its own defaults, but for the model: seq_len must not trip over a short context
    sections["data"] = {"seq_len": 1}
    return config_from_dict(sections, where).model


def hf_config(c: ModelConfig, before: dict[str, Any] | None = None) -> dict[str, Any]:
    """config.json's fields for a model, as released checkpoints have them; transformers, vLLM and SGLang read these.

    `before` is the config.json that the model was imported from, whose fields that say nothing about the computation stay.
    """
    dropped = {"quantization_config", "rope_parameters", "transformers_version", "torch_dtype", "dtype", "auto_map", *_RENAMED}
    kept = {key: value for key, value in (before or {}).items() if key not in dropped}
    model = {f.name: getattr(c, f.name) for f in dataclasses.fields(c) if f.name != "rope_parameters"}
    rope = dataclasses.asdict(c.rope_parameters)
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    if rope["truncate"]:  # the default, which released files leave out
        del rope["truncate"]
    scaling = None if kind == "default" else {"type": kind} | {k: v for k, v in rope.items() if v is not None}
    return {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", **kept, **model, **_FIXED,
        "num_key_value_heads": c.num_attention_heads, "ep_size": 1, "use_cache": True,
        "rope_theta": theta, "rope_scaling": scaling,
    }  # fmt: skip


def read_hf_config(directory: str | Path) -> ModelConfig:
    """The model of `directory/config.json`. Raises `UserError` as `read_config_json` and `model_config`."""
    return model_config(read_config_json(directory), str(Path(directory) / "config.json"))
