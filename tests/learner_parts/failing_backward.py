"""A model whose backward pass fails for batches with one token, although the forward pass succeeds."""

from typing import Any

import torch


class _FailsBackward(torch.autograd.Function):
    """The identity, whose backward pass fails or spoils the gradient of batches with this token."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, bad: bool, error: Exception | None) -> torch.Tensor:
        ctx.bad, ctx.error = bad, error
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        if ctx.bad and ctx.error is not None:
            raise ctx.error
        return (gradient * float("nan") if ctx.bad else gradient), None, None


def fail_backward(
    model: torch.nn.Module, token: int, error: Exception | None, *, layer: int = 0, after: bool = False
) -> None:
    """Make the backward pass fail for batches with this token, after the later layers have their gradients.

    error: raised; None: the gradient is not a number instead. layer, after: where it fails: at the gradient of the
    input of this layer, or of its output.
    """
    seen = [False]

    def look(_: object, arguments: tuple[torch.Tensor]) -> None:
        seen[0] = bool((arguments[0] == token).any())

    model.get_input_embeddings().register_forward_pre_hook(look)  # type: ignore[operator]
    decoder: Any = model
    if after:
        decoder.base_model.layers[layer].register_forward_hook(
            lambda _, __, output: _FailsBackward.apply(output, seen[0], error)
        )
        return
    decoder.base_model.layers[layer].register_forward_pre_hook(
        lambda _, arguments: (_FailsBackward.apply(arguments[0], seen[0], error), *arguments[1:])
    )
