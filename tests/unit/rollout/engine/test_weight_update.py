"""Experts of a GPU's kernel in an update. Stand-ins with vLLM's attributes: its GPU kernels need a GPU."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from palimpsest.services.rollout.engine import weight_update
from palimpsest.services.rollout.engine.weight_update import Differs, WeightUpdate, repack_experts_on_update


class Method:
    """vLLM's method of a layer of experts, whose kernel swaps gate and up. It has no packed form for a CPU."""

    def __init__(self) -> None:
        self.moe_kernel: Any = None
        self.set_up = 0

    def _setup_kernel(self, layer: nn.Module, w13: torch.Tensor, w2: torch.Tensor) -> None:
        if self.moe_kernel is None:
            experts = SimpleNamespace(process_weights_after_loading=self._count)
            self.moe_kernel = SimpleNamespace(fused_experts=experts)
            experts.process_weights_after_loading(layer)

    def _count(self, _: nn.Module) -> None:
        self.set_up += 1

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.w13_weight.data = layer.w13_weight.data.flip(1)
        self._setup_kernel(layer=layer, w13=layer.w13_weight, w2=layer.w2_weight)


class Layer(nn.Module):
    """Four experts; the last number of each is padding, which no load writes."""

    def __init__(self, value: float, method: Method) -> None:
        super().__init__()
        self.quant_method = method
        for name in ("w13_weight", "w2_weight"):
            values = torch.arange(24.0).reshape(4, 2, 3) + value
            values[:, :, -1] = torch.nan
            self.register_parameter(name, nn.Parameter(values.bfloat16(), requires_grad=False))


@pytest.fixture
def layer(monkeypatch: pytest.MonkeyPatch) -> Layer:
    """A layer that computes with its first weights."""
    monkeypatch.setattr(weight_update, "_processed_modules", lambda model: [("experts", model)])
    monkeypatch.setattr(weight_update, "_is_experts", lambda _: True)
    made = Layer(0.0, Method())
    made.quant_method.process_weights_after_loading(made)
    return made


def updated(layer: Layer, *, copies: bool) -> None:
    """Load other weights as vLLM's layerwise reload does, and read them back."""
    update, kept = WeightUpdate(layer, number=1), {name: tensor.data for name, tensor in layer.named_parameters()}
    with update.recording():
        for name, tensor in Layer(5.0, layer.quant_method).named_parameters():
            getattr(layer, name).data = tensor.data
        layer.quant_method.process_weights_after_loading(layer)
        for name, memory in kept.items():
            if copies:
                memory.copy_(getattr(layer, name))
            getattr(layer, name).data = memory
    update.read_back({})


def test_experts_in_the_order_of_a_kernel_are_read_back(layer: Layer) -> None:
    updated(layer, copies=True)


def test_experts_that_an_update_does_not_reach_are_found(layer: Layer) -> None:
    with pytest.raises(Differs, match="experts expert 2 w13 computes with other weights"):
        updated(layer, copies=False)


def test_the_kernel_of_a_gpu_is_set_up_once(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Method, "_setup_kernel", Method._setup_kernel)  # restored afterwards
    repack_experts_on_update(Method)
    updated(layer, copies=True)
    assert layer.quant_method.set_up == 1


def test_experts_that_are_packed_for_a_cpu_are_packed_at_each_update(
    layer: Layer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Method, "_setup_kernel", Method._setup_kernel)
    monkeypatch.setattr(weight_update, "packed_expert", lambda *_: None)
    repack_experts_on_update(Method)
    layer.quant_method.moe_kernel.fused_experts.isa = "vec"
    layer.quant_method.moe_kernel.fused_experts._use_zentorch = False
    updated(layer, copies=True)
    assert layer.quant_method.set_up == 2
