"""One weight update inside vLLM: pack again what the engine packs, then read back what computes.

The CPU build computes with packed copies of its weights: of every linear layer, of the output head and of the experts.
A reload replaces the weights, but two kinds of copies survive it: that of a tied head, which loads nothing itself, and
those of experts, which vLLM packs at the first load only. Both are packed again here. Afterwards each layer is
multiplied with unit vectors, which returns columns of the matrix that computes, exactly; they are compared with the
weights as they were loaded.

On a GPU vLLM copies the weights of an update into the memory of the old ones, which CUDA graphs read. Linear layers are
read back in the same way. Experts are compared with what vLLM made of them in the kernel's order, before that copy.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from palimpsest.common import failpoints

COLUMNS = 32
"""Columns of each matrix that one update reads back. Successive updates read successive columns."""
EXPERTS = 2
"""Experts of each layer that one update reads back."""


class Differs(Exception):
    """A layer computes with other weights than the loaded ones; the message names it."""


@dataclass(slots=True)
class _Loaded:
    """What one module was loaded with: some columns of its matrix, or some of its experts, before packing."""

    columns: slice | None = None
    width: int = 0
    block: Tensor | None = None
    experts: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


class WeightUpdate:
    """One update of a vLLM model. Use `recording` around the load, then `pack_rest`, then `read_back`.

    number: counts the updates; selects the columns and experts to read back.
    """

    def __init__(self, model: nn.Module, *, number: int) -> None:
        self._model, self._number = model, number
        self._loaded: dict[int, _Loaded] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record a part of each module's weights when vLLM has loaded them and is about to process them."""
        methods = {id(module.quant_method): module.quant_method for _, module in _processed_modules(self._model)}
        for method in methods.values():
            method.process_weights_after_loading = self._recorded(method.process_weights_after_loading)
        try:
            yield
        finally:
            for method in methods.values():
                del method.process_weights_after_loading  # the class's method shows again

    def pack_rest(self) -> None:
        """Process each module that loaded nothing itself but shares a loaded weight: a tied output head."""
        modules = [(module, getattr(module, "weight", None)) for _, module in _processed_modules(self._model)]
        loaded = {w.data_ptr() for module, w in modules if id(module) in self._loaded and w is not None and w.numel()}
        for module, weight in modules:
            if id(module) not in self._loaded and weight is not None and weight.data_ptr() in loaded:
                self._record(module)
                module.quant_method.process_weights_after_loading(module)

    def read_back(self, published: Mapping[str, Tensor]) -> None:
        """Compare what computes with what was loaded. Raises Differs.

        published: the version's tensors by checkpoint name. Parameters that the engine keeps under the same name are
        compared with them directly.
        """
        self._compare_parameters(published)
        for name, module in _processed_modules(self._model):
            loaded = self._loaded.get(id(module))
            if loaded is None:
                if _has_matrix(module):
                    raise Differs(f"{name} was not loaded: it still computes with the previous version's weights")
                continue
            if loaded.block is not None and loaded.columns is not None:
                _compare(name, _columns(module, loaded.columns, loaded.width, loaded.block), loaded.block)
            for expert, (w13, w2) in loaded.experts.items():
                _compare(f"{name} expert {expert} w13", module.w13_weight[expert], w13)
                _compare(f"{name} expert {expert} w2", module.w2_weight[expert], w2)

    def _recorded(self, process: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
        def process_weights_after_loading(module: nn.Module) -> None:
            self._record(module)
            process(module)
            self._record_processed(module)

        return process_weights_after_loading

    def _record(self, module: Any) -> None:
        loaded = self._loaded[id(module)] = _Loaded()
        if _is_experts(module):
            for expert in self._experts(module):
                packed = packed_expert(module, module.w13_weight[expert], module.w2_weight[expert])
                if packed is not None:
                    loaded.experts[expert] = packed
            return
        weight = getattr(module, "weight", None)
        if weight is not None and weight.dim() == 2 and _is_linear(module):
            loaded.columns = self._part(weight.shape[1])
            loaded.width = weight.shape[1]
            loaded.block = weight[:, loaded.columns].detach().clone()

    def _record_processed(self, module: Any) -> None:
        """Of experts that the engine does not pack for a CPU: keep what the update computes with, in the order of the
        GPU's kernel. vLLM copies it afterwards into the memory that CUDA graphs read."""
        loaded = self._loaded[id(module)]
        if _is_experts(module) and not loaded.experts and not is_packed_for_cpu(module):
            for expert in self._experts(module):
                w13, w2 = (weight.detach()[expert].clone() for weight in (module.w13_weight, module.w2_weight))
                loaded.experts[expert] = w13, w2

    def _experts(self, module: Any) -> set[int]:
        """The experts that this update compares."""
        count = module.w13_weight.shape[0]
        return {(self._number * EXPERTS + i) % count for i in range(min(EXPERTS, count))}

    def _compare_parameters(self, published: Mapping[str, Tensor]) -> None:
        own = dict(self._model.named_parameters())
        for name, tensor in published.items():
            mapped = self._own_name(name)
            if mapped is None:
                continue
            parameter = own.get(mapped)
            if parameter is None or not parameter.numel() or parameter.dim() > 2 or parameter.dim() != tensor.dim():
                continue
            padded = parameter.dim() == 2 and self._is_embedding(mapped) and parameter.shape[0] > tensor.shape[0]
            if parameter.shape != tensor.shape and not padded:
                continue  # sharded
            part = self._part(tensor.shape[0]) if tensor.dim() == 2 else slice(None)
            value = parameter.detach()[: tensor.shape[0]][part]
            _compare(name, value, tensor[part].to(value.device, value.dtype))

    def _part(self, size: int) -> slice:
        """The columns or rows that this update compares, of `size`."""
        start = self._number % -(-size // COLUMNS) * COLUMNS
        return slice(start, min(start + COLUMNS, size))

    def _own_name(self, name: str) -> str | None:
        """The engine's name of a checkpoint's tensor; None if the engine fuses it with others or drops it."""
        mapper = getattr(self._model, "hf_to_vllm_mapper", None)
        if mapper is None:
            return name
        mapped, shard = mapper._map_name_with_shard(name) or (None, None)
        return mapped if shard is None else None

    def _is_embedding(self, parameter: str) -> bool:
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        return isinstance(self._model.get_submodule(parameter.rpartition(".")[0]), VocabParallelEmbedding)


def repack_experts_on_update(method: type) -> None:
    """Make this class of vLLM's MoE methods pack the experts for a CPU at every load; vLLM does it at the first.

    Idempotent. Kernels of a GPU get the weights of an update from vLLM itself; their own set-up must not run twice.
    Source: `UnquantizedFusedMoEMethod._setup_kernel` of vLLM 0.32.
    """
    setup = method._setup_kernel  # type: ignore[attr-defined]
    if getattr(setup, "packs_every_load", False):
        return

    def _setup_kernel(self: Any, layer: nn.Module, w13: Tensor, w2: Tensor) -> None:
        is_update = self.moe_kernel is not None
        setup(self, layer=layer, w13=w13, w2=w2)
        if is_update and is_packed_for_cpu(layer) and not failpoints.active("rollout.skip_experts"):
            self.moe_kernel.fused_experts.process_weights_after_loading(layer)

    _setup_kernel.packs_every_load = True  # type: ignore[attr-defined]
    method._setup_kernel = _setup_kernel  # type: ignore[attr-defined]


def map_experts_on_cpu() -> None:
    """Make the CPU build's experts obey the map of expert parallelism: vLLM 0.32 passes the numbers of all experts to a
    kernel that knows only the experts of this process, which reads beyond its memory.

    Idempotent. An expert of another process gets weight 0 here; the sum over the processes adds its share. Does nothing
    on a GPU, where the kernels know the map.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    apply = CPUUnquantizedExperts.apply
    if getattr(apply, "maps_experts", False):
        return

    def mapped(self: Any, *args: Any, **given: Any) -> None:
        bound = signature(apply).bind(self, *args, **given)
        values = bound.arguments
        if values["expert_map"] is not None:
            own = values["expert_map"][values["topk_ids"].long()]
            values["topk_weights"] = values["topk_weights"].masked_fill(own < 0, 0.0)
            values["topk_ids"] = own.clamp(min=0).to(values["topk_ids"].dtype)
        apply(*bound.args, **bound.kwargs)

    mapped.maps_experts = True  # type: ignore[attr-defined]
    CPUUnquantizedExperts.apply = mapped


def is_packed_for_cpu(module: Any) -> bool:
    """Whether the experts of a layer are packed for vLLM's CPU kernel. False on a GPU, and with zentorch."""
    kernel = module.quant_method.moe_kernel
    if kernel is None:
        return False
    experts = kernel.fused_experts
    return getattr(experts, "isa", None) is not None and not experts._use_zentorch


def packed_expert(module: Any, w13: Tensor, w2: Tensor) -> tuple[Tensor, Tensor] | None:
    """The weights of one expert as the CPU build packs them; None where another kernel computes (a GPU, zentorch).

    w13: gate and up weights, [2 * intermediate, hidden]. w2: down weights, [hidden, intermediate].
    """
    if not is_packed_for_cpu(module):
        return None
    experts = module.quant_method.moe_kernel.fused_experts
    isa = experts.isa
    from vllm._custom_ops import cpu_prepack_moe_weight

    size, padded = w2.shape[1], experts._padded_intermediate_size(experts.moe_config)
    if padded != size:
        wide = w13.new_zeros(2 * padded, w13.shape[1])
        wide[:size], wide[padded : padded + size] = w13[:size], w13[size:]
        long = w2.new_zeros(w2.shape[0], padded)
        long[:, :size] = w2
        w13, w2 = wide, long
    first, second = (cpu_prepack_moe_weight(w.detach()[None].contiguous(), isa)[0] for w in (w13, w2))
    return first, second


def _processed_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Modules with weights that vLLM processes after a load."""
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

    for name, module in model.named_modules():
        if isinstance(getattr(module, "quant_method", None), QuantizeMethodBase):
            yield name, module


def _is_linear(module: Any) -> bool:
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    return isinstance(module.quant_method, (UnquantizedLinearMethod, UnquantizedEmbeddingMethod))


def _is_experts(module: Any) -> bool:
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    return isinstance(module.quant_method, UnquantizedFusedMoEMethod)


def _has_matrix(module: Any) -> bool:
    return _is_experts(module) or (_is_linear(module) and getattr(module, "weight", None) is not None)


def _columns(module: Any, columns: slice, width: int, like: Tensor) -> Tensor:
    """Columns of the matrix that the module computes with: its products with unit vectors of this width.

    like: tensor of the result's shape [rows, columns], type and device. Exact: each sum has one term that is not 0.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead):
        looked_up: Tensor = module.weight.detach()[:, columns]
        return looked_up
    units = torch.zeros(like.shape[1], width, dtype=like.dtype, device=like.device)
    units[torch.arange(len(units)), torch.arange(columns.start, columns.stop)] = 1.0
    product: Tensor = module.quant_method.apply(module, units, None)
    return product.T[: like.shape[0]]


def _compare(name: str, value: Tensor, expected: Tensor) -> None:
    different = (value != expected) & ~(value.isnan() & expected.isnan())  # NaN: padding that a kernel never reads
    if bool(different.any()):
        largest = float((value.float() - expected.float()).abs().max())
        raise Differs(
            f"{name} computes with other weights than the published ones: {int(different.sum())} of "
            f"{different.numel()} compared values differ, by {largest:.3g} at most"
        )
