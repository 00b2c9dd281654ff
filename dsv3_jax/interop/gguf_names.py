"""llama.cpp's names for this architecture, `deepseek2`: its tensors, made of ours, and the keys of a file's header.

llama.cpp multiplies by kv_b's two parts one at a time, as MLA with absorbed projections does: `attn_k_b` is the keys' part with
its matrices transposed, `attn_v_b` the values'. Experts of a layer are one tensor. An MTP module is a block after the others.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import gguf

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import UserError
from dsv3_jax.interop.hf_tensors import Source, sources

ARCHITECTURE = "deepseek2"
_NAMES = {
    "input_layernorm.weight": "attn_norm.weight", "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight", "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight", "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight", "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight", "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    **{f"mlp.{kind}_proj.weight": f"ffn_{kind}.weight" for kind in ("gate", "up", "down")},
    **{f"mlp.shared_experts.{kind}_proj.weight": f"ffn_{kind}_shexp.weight" for kind in ("gate", "up", "down")},
    "enorm.weight": "nextn.enorm.weight", "hnorm.weight": "nextn.hnorm.weight", "eh_proj.weight": "nextn.eh_proj.weight",
    "shared_head.norm.weight": "nextn.shared_head_norm.weight",
}  # fmt: skip
_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_IN_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_FIRST_EXPERT = re.compile(r"mlp\.experts\.0\.(gate|up|down)_proj\.weight")


@dataclass(frozen=True)
class Part:
    """A tensor of the file: one of ours, those of all experts, or a part of kv_b."""

    name: str
    shape: tuple[int, ...]  # as NumPy has it: llama.cpp lists its axes in the other order
    sources: tuple[Source, ...]
    kind: Literal["plain", "experts", "keys", "values"] = "plain"


def _kv_b(c: ModelConfig, s: Source, prefix: str) -> Iterator[Part]:
    H, C = c.num_attention_heads, c.kv_lora_rank
    yield Part(f"{prefix}attn_k_b.weight", (H, C, c.qk_nope_head_dim), (s,), "keys")
    yield Part(f"{prefix}attn_v_b.weight", (H, c.v_head_dim, C), (s,), "values")


def parts(c: ModelConfig, mtp: bool) -> Iterator[Part]:
    """Every tensor of a file, with the MTP module's block or without."""
    # rotated entries are pairs in llama.cpp, whichever order our checkpoint came in
    found = {s.tensor: s for s in sources(replace(c, rope_interleave=True))}
    for s in found.values():
        if s.tensor in _TOP:
            yield Part(_TOP[s.tensor], s.shape, (s,))
            continue
        match = _IN_LAYER.fullmatch(s.tensor)
        assert match, s.tensor
        layer, name = int(match[1]), match[2]
        prefix = f"blk.{layer}."
        if layer >= c.num_hidden_layers and not mtp:
            continue
        if expert := _FIRST_EXPERT.fullmatch(name):
            experts = tuple(found[s.tensor.replace("experts.0.", f"experts.{e}.")] for e in range(c.n_routed_experts))
            yield Part(f"{prefix}ffn_{expert[1]}_exps.weight", (len(experts), *s.shape), experts, "experts")
        elif name == "self_attn.kv_b_proj.weight":
            yield from _kv_b(c, s, prefix)
        elif not name.startswith("mlp.experts."):
            yield Part(prefix + _NAMES[name], s.shape, (s,))


def check(c: ModelConfig) -> None:
    """Raise `UserError` for a model that llama.cpp would refuse or compute otherwise."""
    rope = c.rope_parameters
    problem = None
    if c.attention_bias:
        problem = "attention_bias=true: llama.cpp has no biases in this architecture"
    elif c.q_lora_rank is not None and c.num_hidden_layers in (26, 27):
        problem = (
            f"num_hidden_layers={c.num_hidden_layers} with q_lora_rank: llama.cpp takes 26 or 27 layers as a V2-Lite without"
        )
    elif c.rms_norm_eps != 1e-6:
        problem = f"rms_norm_eps={c.rms_norm_eps}: llama.cpp has one for all norms, and those of q_a and kv_a always have 1e-6"
    elif rope.rope_type == "yarn":
        if rope.mscale_all_dim and rope.mscale != rope.mscale_all_dim:
            problem = (
                f"rope_parameters: mscale={rope.mscale} and mscale_all_dim={rope.mscale_all_dim}: llama.cpp has one for both"
            )
        elif rope.attention_factor is not None:
            problem = f"rope_parameters.attention_factor={rope.attention_factor}: llama.cpp derives it"
        elif not rope.truncate:
            problem = "rope_parameters.truncate=false: llama.cpp rounds the bounds of the ramp"
    if problem:
        raise UserError(f"gguf: model.{problem}")


def check_mtp(c: ModelConfig) -> None:
    """Raise `UserError` for MTP modules that llama.cpp would not draft with."""
    if c.num_nextn_predict_layers > 1:
        raise UserError(f"gguf: model.num_nextn_predict_layers={c.num_nextn_predict_layers}: llama.cpp takes one MTP module")


def add_header(writer: gguf.GGUFWriter, c: ModelConfig, mtp: bool) -> None:
    """The keys that say what is computed."""
    rope = c.rope_parameters
    writer.add_block_count(c.num_hidden_layers + mtp)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_vocab_size(c.vocab_size)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_leading_dense_block_count(c.num_dense_layers)
    # with absorbed projections all heads share one key, the latent and the rotated part, and one value, the latent
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(1)
    writer.add_q_lora_rank(c.q_lora_rank or 0)
    writer.add_kv_lora_rank(c.kv_lora_rank)
    writer.add_key_length(c.kv_lora_rank + c.qk_rope_head_dim)
    writer.add_value_length(c.kv_lora_rank)
    writer.add_key_length_mla(c.qk_head_dim)
    writer.add_value_length_mla(c.v_head_dim)
    writer.add_expert_count(c.n_routed_experts)
    writer.add_expert_used_count(c.num_experts_per_tok)
    writer.add_expert_shared_count(c.n_shared_experts)
    writer.add_expert_feed_forward_length(c.moe_intermediate_size)
    writer.add_expert_group_count(c.n_group)
    writer.add_expert_group_used_count(c.topk_group)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_norm(c.norm_topk_prob)
    writer.add_expert_weights_scale(c.routed_scaling_factor)
    writer.add_rope_dimension_count(c.qk_rope_head_dim)
    writer.add_rope_freq_base(rope.rope_theta)
    if rope.rope_type == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope.factor)
        writer.add_rope_scaling_orig_ctx_len(rope.original_max_position_embeddings)
        writer.add_rope_scaling_yarn_beta_fast(rope.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(rope.beta_slow)
        writer.add_rope_scaling_yarn_log_mul(0.1 * rope.mscale_all_dim)
    if mtp:
        writer.add_nextn_predict_layers(1)
