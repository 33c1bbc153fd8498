"""Memory of an engine and of its KV cache on each GPU. Pure.

vLLM takes `gpu_memory_utilization` of each GPU and gives what weights and buffers leave to the KV cache.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from palimpsest.common.config.engines import VllmEngineConfig
from palimpsest.common.model_limits import mixture_key
from palimpsest.plan.causes import GIB
from palimpsest.plan.gpus import Gpus

BFLOAT16 = 2


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """Bytes on each GPU of an engine."""

    weights: int
    cache: int
    """What remains for the KV cache, before the engine's own buffers; negative if the weights do not fit."""
    token: int
    """Bytes of a token in the KV cache, on each GPU; 0 if the configuration of the model does not tell."""

    def tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return max(0, self.cache) // self.token if self.token else 0


def engine_memory(engine: VllmEngineConfig, weights: int, text_config: Mapping[str, Any], gpus: Gpus) -> EngineMemory:
    """Return the memory of an engine. weights: bytes of the model; text_config: config.json of its language model."""
    width = engine.tensor_parallel
    own = -(-weights // width)
    if engine.expert_parallel and (experts := _experts(text_config)):
        own = -(-weights * -(-experts // width) // experts)  # one GPU may hold an expert more than its share
    taken = int(gpus.gib * GIB * engine.gpu_memory_utilization)
    return EngineMemory(own, taken - own, _token(text_config, width))


def _experts(config: Mapping[str, Any]) -> int:
    """Number of experts of a layer; 0 if the configuration does not tell."""
    key = mixture_key(config)
    return 0 if key is None else int(config[key])


def _token(config: Mapping[str, Any], width: int) -> int:
    """Bytes of keys and values of a token on each GPU, bf16. An engine repeats key heads if it has more GPUs."""
    heads = config.get("num_attention_heads")
    layers, hidden = config.get("num_hidden_layers"), config.get("hidden_size")
    if not (heads and layers and hidden) or "kv_lora_rank" in config or ("layer_types" in config and _mixed(config)):
        return 0
    size = config.get("head_dim") or hidden // heads
    key_heads = config.get("num_key_value_heads") or heads
    return int(2 * BFLOAT16 * layers * max(1, key_heads // width) * size)


def _mixed(config: Mapping[str, Any]) -> bool:
    """Whether layers differ in what they keep of a token."""
    return len(set(config["layer_types"])) > 1
