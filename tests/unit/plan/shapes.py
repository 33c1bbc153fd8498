"""The shape of a small model, and its number of parameters."""

from typing import Any

from transformers import Qwen3Config

SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "architectures": ["Qwen3ForCausalLM"],
}
PARAMETERS = 512 * 64 + 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 2 * 16 + 3 * 64 * 192 + 2 * 64) + 64
"""Of SHAPE with tied embeddings: embedding; two layers (query, key and value, output, norms, MLP, norms); norm."""
DENSE = Qwen3Config(**SHAPE, tie_word_embeddings=True)
