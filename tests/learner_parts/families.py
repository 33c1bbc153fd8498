"""A small random model of each family: the configurations, and the folders that transformers writes for them."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

WINDOW = 16
"""Tokens of a sliding window: shorter than the tests' sequences, so that it has an effect."""
GAIN = 5.0
"""Factor of the matrices at initialization, so that the distributions are not flat."""
SMALL = {
    "vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LAYERS = ["sliding_attention", "full_attention"]
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama (tied)": ("llama", {"tie_word_embeddings": True}),
    "Llama (untied)": ("llama", {}),
    "Llama 3 (scaled RoPE)": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
            }
        },
    ),
    "Qwen2": ("qwen2", {}),
    "Qwen2-MoE": ("qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 64}),
    "Qwen3": ("qwen3", {}),
    "Qwen3-MoE": ("qwen3_moe", EXPERTS | {"norm_topk_prob": True}),
    "Mistral": ("mistral", {"sliding_window": WINDOW}),
    "Mixtral": ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "Gemma": ("gemma", {"tie_word_embeddings": True}),
    "Gemma 2": (
        "gemma2",
        {
            "tie_word_embeddings": True, "sliding_window": WINDOW, "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
        },
    ),
    "Gemma 3 (text)": (
        "gemma3_text",
        {
            "tie_word_embeddings": True, "sliding_window": WINDOW, "query_pre_attn_scalar": 16, "layer_types": LAYERS,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1_000.0},
                "full_attention": {"rope_type": "default", "rope_theta": 100_000.0},
            },
        },
    ),
    "Phi-3": ("phi3", {"sliding_window": WINDOW}),
    "GLM-4": ("glm4", {"attention_bias": True}),
    "GLM-4-MoE": (
        "glm4_moe",
        {
            "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "first_k_dense_replace": 1,
            "n_shared_experts": 1, "use_qk_norm": True,
        },
    ),
    "OLMo 2": ("olmo2", {}),
    "OLMoE": ("olmoe", {"num_experts": 8, "num_experts_per_tok": 2}),
    "Granite": (
        "granite",
        {
            "logits_scaling": 2.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5,
            "attention_multiplier": 0.25,
        },
    ),
    "SmolLM3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "Cohere": ("cohere", {"logit_scale": 0.5, "tie_word_embeddings": True}),
    "gpt-oss": (
        "gpt_oss",
        {
            "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": WINDOW, "layer_types": LAYERS,
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0,
                "truncate": False, "original_max_position_embeddings": 64,
            },
        },
    ),
}  # fmt: skip
"""Family -> model type and settings of transformers. Scales, soft caps and windows have values that change results."""

EAGER = ("Gemma 2", "gpt-oss")
"""Families with attention that torch's `scaled_dot_product_attention` does not compute: soft caps and sinks."""


def config_of(family: str) -> PretrainedConfig:
    """The configuration of a family's small model."""
    kind, settings = FAMILIES[family]
    return AutoConfig.for_model(kind, **SMALL | settings)


def attention_of(family: str) -> str:
    """`model.attention` for the family: the default, if the learner accepts it."""
    return "eager" if family in EAGER else "sdpa"


def build(family: str, folder: Path, *, seed: int = 0) -> Path:
    """Write a random model of the family in bf16. folder: created."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(family), dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(GAIN)
    model.save_pretrained(folder)
    return folder
