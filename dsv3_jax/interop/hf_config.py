"""Hugging Face's `DeepseekV3Config` (config.json) to `ModelConfig`: every field is honoured, checked, or refused by name."""

import dataclasses
from pathlib import Path
from typing import Any

from dsv3_jax.config import ModelConfig, RopeConfig, config_from_dict
from dsv3_jax.errors import UserError
from dsv3_jax.interop import fp8
from dsv3_jax.interop.hf_directory import not_a_checkpoint, read_object

CONFIG = "config.json"
# The names under which released models have this architecture; exports have the first.
MODEL_TYPES = ("deepseek_v3", "kimi_k2")
ARCHITECTURE = "DeepseekV3ForCausalLM"

# Fields that say nothing about the computation, or repeat what others say.
_IGNORED = {
    "architectures", "auto_map", "aux_loss_alpha", "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id",
    "ep_size", "head_dim", "id2label", "is_encoder_decoder", "label2id", "model_type", "num_key_value_heads",
    "output_attentions", "output_hidden_states", "output_router_logits", "pad_token_id", "pretraining_tp",
    "problem_type", "qk_head_dim", "quantization_config", "return_dict", "seq_aux", "torch_dtype", "transformers_version",
    "use_cache",
}  # fmt: skip

# Fields that uploaders and older libraries leave behind: who wrote the file, and how text was once generated. They are ignored
# with a line, so that nobody wonders.
_MARKERS = {
    "add_cross_attention", "attn_implementation", "author", "bad_words_ids", "base_model", "begin_suppress_tokens",
    "cross_attention_hidden_size", "datasets", "decoder_start_token_id", "description", "diversity_penalty", "do_sample",
    "early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "finetuning_task",
    "forced_bos_token_id", "forced_eos_token_id", "is_decoder", "language", "length_penalty", "library_name", "license",
    "max_length", "min_length", "model_name", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences",
    "output_scores", "pipeline_tag", "prefix", "pruned_heads", "remove_invalid_values", "repetition_penalty",
    "return_dict_in_generate", "router_aux_loss_coef", "sep_token_id", "suppress_tokens", "tags", "task_specific_params",
    "temperature", "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "top_k", "top_p", "torchscript",
    "transformers.js_config", "transformers_js_config", "typical_p", "unsloth_fixed", "unsloth_version", "use_bfloat16",
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

# Keys of quantization_config that the tensors themselves answer: which are in 8 bits, and whether a client should keep them so.
_QUANTIZATION_IGNORED = {"modules_to_not_convert", "modules_to_convert", "ignored_layers", "dequantize"}
# Keys with several values that the tensors' dtypes then agree with.
_QUANTIZATION_VALUES = {"scale_fmt": ("float", fp8.POWERS_OF_TWO), "expert_dtype": ("fp8",)}

_RENAMED = {"num_mtp_layers": "num_nextn_predict_layers", "num_local_experts": "n_routed_experts"}
_MODEL_FIELDS = {f.name for f in dataclasses.fields(ModelConfig)}


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _rope_fields(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """Rope's fields from all their places. Raises `UserError` where these differ: some clients believe one, some another."""
    found: dict[str, Any] = {}
    places = {name: raw.get(name) or {} for name in ("rope_parameters", "rope_scaling")}
    for place, given in (places | {"config.json": {"rope_theta": raw.get("rope_theta")}}).items():
        if not isinstance(given, dict):
            raise UserError(f"{where}: {place}={_shown(given)} must be an object")
        for key, value in given.items():
            name = "rope_type" if key == "type" else key
            if value is not None and found.setdefault(name, value) != value:
                raise UserError(f"{where}: {name} is {_shown(found[name])}, and {_shown(value)} as {key} of {place}")
    return found


def _rope(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """Fields of `RopeConfig`, from `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (older files)."""
    rope = {"rope_type": "default"} | _rope_fields(raw, where)
    if rope["rope_type"] not in ("default", "yarn"):
        raise UserError(f"{where}: rope_type={_shown(rope['rope_type'])} is not supported; use default or yarn")
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{where}: partial_rotary_factor is not supported; the whole rope head is rotated")
    known = {f.name for f in dataclasses.fields(RopeConfig)}
    unknown = sorted(set(rope) - known)
    if unknown:
        raise UserError(f"{where}: rope parameter {_shown(unknown[0])} is unknown; known: {', '.join(sorted(known))}")
    if rope["rope_type"] == "yarn":
        context = raw["max_position_embeddings"]
        original = rope.setdefault("original_max_position_embeddings", context)
        # where these are no two lengths, the check of the complete config says what is wrong
        if "factor" not in rope and all(isinstance(n, int) and 0 < n < 2**63 for n in (context, original)):
            rope["factor"] = context / original
    floats = {f.name for f in dataclasses.fields(RopeConfig) if f.type is float}
    # an integer of hundreds of digits is no float: the check of the complete config says so
    return {k: float(v) if k in floats and type(v) is int and abs(v) < 2**63 else v for k, v in rope.items()}


def _check_quantization(quantization: Any, where: str) -> None:
    """Refuse everything but DeepSeek's block-FP8, which needs no settings: the tensors themselves show it."""
    if not isinstance(quantization, dict):
        raise UserError(f"{where}: quantization_config={_shown(quantization)} must be an object")
    allowed = {key: (value,) for key, value in fp8.QUANTIZATION_CONFIG.items()} | _QUANTIZATION_VALUES
    for key, values in allowed.items():
        found = quantization.get(key)
        if found not in values and (found is not None or key == "quant_method"):
            only = " and ".join(map(repr, values))
            raise UserError(f"{where}: quantization_config.{key}={_shown(found)} is not supported; only {only}")
    known = set(allowed) | _QUANTIZATION_IGNORED
    unknown = sorted(key for key in set(quantization) - known if quantization[key] is not None)
    if unknown:
        raise UserError(f"{where}: quantization_config.{unknown[0][:80]} is unknown, so its effect on the weights is too")


def read_config_json(directory: str | Path) -> dict[str, Any]:
    """The fields of `directory/config.json`. Raises `UserError` if it is not a DeepSeek-V3's."""
    directory = Path(directory)
    if not (directory / CONFIG).exists():
        raise not_a_checkpoint(directory, f"no {CONFIG}")
    raw = read_object(directory / CONFIG)
    kind, architectures = raw.get("model_type"), raw.get("architectures")
    if kind not in MODEL_TYPES or (kind != MODEL_TYPES[0] and (architectures or [ARCHITECTURE]) != [ARCHITECTURE]):
        raise UserError(
            f"{directory / CONFIG}: model_type={_shown(kind)} with architectures={_shown(architectures)}; only "
            f"{' and '.join(MODEL_TYPES)} with {ARCHITECTURE} can be loaded"
        )
    return raw


def model_config(raw: dict[str, Any], where: str) -> ModelConfig:
    """A config.json's fields as a `ModelConfig`; `where` names the file in errors.

    Raises `UserError` naming a field that is unknown, unsupported or impossible.
    """
    if raw.get("quantization_config"):
        _check_quantization(raw["quantization_config"], where)
    for name, value in _FIXED.items():
        if raw.get(name, value) != value:
            raise UserError(f"{where}: {name}={_shown(raw[name])} is not supported; only {value!r} is")
    model = _DEFAULTS | {key: value for key, value in raw.items() if key not in _RENAMED}
    for alias in _RENAMED.keys() & raw.keys():
        name = _RENAMED[alias]
        if raw.get(name, raw[alias]) != raw[alias]:
            raise UserError(f"{where}: {alias}={_shown(raw[alias])} and {name}={_shown(raw[name])} are two names of one field")
        model[name] = raw[alias]
    heads = model["num_attention_heads"]
    if model.get("num_key_value_heads", heads) not in (heads, None):
        found = _shown(model["num_key_value_heads"])
        raise UserError(f"{where}: num_key_value_heads={found} must equal num_attention_heads={_shown(heads)}")
    rope = _rope(model, where)
    unknown = sorted(key for key in _unknown_fields(raw) - _MARKERS if raw[key] is not None)
    if unknown:
        raise UserError(f"{where}: field {unknown[0][:80]!r} is unknown, so its effect on the model is too")
    sections = {"model": {k: v for k, v in model.items() if k in _MODEL_FIELDS} | {"rope_parameters": rope}}
    # a config of its own defaults, but for the model: seq_len must not trip over a short context
    sections["data"] = {"seq_len": 1}
    try:
        return config_from_dict(sections, where).model
    except UserError as error:  # of which those about a section's fields together do not name the file
        raise UserError(str(error) if where in str(error) else f"{where}: {error}") from None


def _unknown_fields(raw: dict[str, Any]) -> set[str]:
    known = _MODEL_FIELDS | _IGNORED | _FIXED.keys() | _RENAMED.keys() | {"rope_scaling", "rope_theta"}
    return {key for key in raw.keys() - known if not key.startswith("_")}


def ignored_fields(raw: dict[str, Any]) -> list[str]:
    """Fields of a config.json that `model_config` leaves out and that a reader might wonder about: uploaders', or null."""
    return sorted(_unknown_fields(raw))


def hf_config(c: ModelConfig, before: dict[str, Any] | None = None) -> dict[str, Any]:
    """config.json's fields for a model, as released checkpoints have them; transformers, vLLM and SGLang read these.

    `before` is the config.json that the model was imported from, whose fields that say nothing about the computation stay.
    """
    dropped = {
        "architectures", "auto_map", "dtype", "model_type", "quantization_config", "rope_parameters", "torch_dtype",
        "transformers_version", *_RENAMED,
    }  # fmt: skip
    kept = {key: value for key, value in (before or {}).items() if key not in dropped}
    model = {f.name: getattr(c, f.name) for f in dataclasses.fields(c) if f.name != "rope_parameters"}
    rope = dataclasses.asdict(c.rope_parameters)
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    if rope["truncate"]:  # the default, which released files leave out
        del rope["truncate"]
    scaling = None if kind == "default" else {"type": kind} | {k: v for k, v in rope.items() if v is not None}
    return {
        "architectures": [ARCHITECTURE], "model_type": MODEL_TYPES[0], **kept, **model, **_FIXED,
        "num_key_value_heads": c.num_attention_heads, "ep_size": 1, "use_cache": True,
        "rope_theta": theta, "rope_scaling": scaling,
    }  # fmt: skip


def read_hf_config(directory: str | Path) -> ModelConfig:
    """The model of `directory/config.json`. Raises `UserError` as `read_config_json` and `model_config`."""
    return model_config(read_config_json(directory), str(Path(directory) / CONFIG))
