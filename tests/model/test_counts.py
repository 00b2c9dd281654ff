"""Parameters, cache and FLOPs of a model small enough to count by hand."""

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.counts import cache_numbers_per_token, count_parameters, training_flops_per_token

SMALL = ModelConfig(
    vocab_size=10, hidden_size=4, intermediate_size=6, moe_intermediate_size=3, num_hidden_layers=2, first_k_dense_replace=1,
    num_nextn_predict_layers=0, num_attention_heads=2, q_lora_rank=None, kv_lora_rank=5, qk_nope_head_dim=2,
    qk_rope_head_dim=2, v_head_dim=3, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1,
)  # fmt: skip
ATTENTION = 4 * 2 * 4 + 4 * 7 + 5 * 2 * 5 + 2 * 3 * 4  # queries, latent and rotated key, its expansion, output
EXPERT = 4 * 2 * 3 + 3 * 4  # gate and up, down


def test_parameters():
    counts = count_parameters(SMALL)
    router = 4 * 4 + 4
    norms = 2 * (4 + 4 + 5) + 4
    assert counts.main == {
        "embedding": 40, "head": 40, "attention": 2 * ATTENTION, "dense ffn": 4 * 2 * 6 + 6 * 4,
        "routed experts": 4 * EXPERT, "shared experts": EXPERT, "router": router, "norms": norms,
    }  # fmt: skip
    assert counts.activated == counts.total - 40 - 2 * EXPERT  # the embedding, and two experts of four
    assert (counts.mtp, counts.mtp_activated) == (0, 0)


def test_flops_and_cache():
    attention = 2 * 2 * (4 + 3) * 4  # layers, heads, sizes of a key and a value; 4 of 7 keys are seen on average
    assert training_flops_per_token(SMALL, 7) == 6 * (count_parameters(SMALL).activated + attention)
    assert cache_numbers_per_token(SMALL) == 2 * (5 + 2)
