"""How a causal LM turns hidden states into logits.

Most models multiply the hidden states by the weight of a linear head, and some apply an elementwise transform to the
product. `find_head` recognizes such a head by comparing it with the model's own code, bit for bit.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

CHUNK_ATTRIBUTE = "logprob_chunk_tokens"
"""Attribute of a model: learner.logprob_chunk_tokens. Copies of the model have it too."""
PROBE_TOKENS = 8
PROBE_LOGIT = 200.0
"""Largest logit of the second probe: a soft cap changes it visibly."""
CONFIGURED: tuple[tuple[str, Literal["divide", "multiply", "softcap"]], ...] = (
    ("logits_scaling", "divide"),
    ("logits_scaling", "multiply"),
    ("logit_scale", "multiply"),
    ("lm_head_multiplier", "multiply"),
    ("final_logit_softcapping", "softcap"),
    ("logits_soft_cap", "softcap"),
)
"""Configuration fields of transformers that change the logits after the head, and how."""


@dataclass(frozen=True, slots=True)
class Transform:
    """An elementwise function of the head's product: x, x / c, x c, or c tanh(x / c)."""

    kind: Literal["identity", "divide", "multiply", "softcap"] = "identity"
    value: float = 1.0
    """c"""

    def apply_(self, logits: Tensor) -> Tensor:
        """Transform the logits in place, with the operations and the type that transformers uses."""
        match self.kind:
            case "identity":
                return logits
            case "divide":
                return logits.div_(self.value)
            case "multiply":
                return logits.mul_(self.value)
            case "softcap":
                return logits.div_(self.value).tanh_().mul_(self.value)

    def slope(self, logits: Tensor) -> Tensor | float:
        """Derivative of the transform, from the transformed logits."""
        match self.kind:
            case "identity":
                return 1.0
            case "divide":
                return 1.0 / self.value
            case "multiply":
                return self.value
            case "softcap":
                return 1.0 - (logits / self.value).square()


@dataclass(frozen=True, slots=True)
class LinearHead:
    """Logits = transform(hidden @ weight.T + bias)."""

    weight: Tensor
    """[vocabulary, hidden size]"""
    bias: Tensor | None
    """[vocabulary]"""
    transform: Transform

    def logits(self, hidden: Tensor, entries: slice = slice(None)) -> Tensor:
        """Return the logits of some vocabulary entries, in the type of the hidden states [tokens, hidden size].

        That is the type of the weight, except in a float32 pass (float32.py).
        """
        weight = self.weight[entries].to(hidden.dtype)
        bias = None if self.bias is None else self.bias[entries].to(hidden.dtype)
        return self.transform.apply_(torch.nn.functional.linear(hidden, weight, bias))


@dataclass(frozen=True, slots=True)
class ModelHead:
    """The model's own code after its decoder, for a head that `find_head` does not recognize."""

    logits: Callable[[Tensor], Tensor]
    """Takes hidden states [tokens, hidden size] and returns logits [tokens, vocabulary]."""


_found: WeakKeyDictionary[torch.nn.Module, Transform | Literal["none"] | None] = WeakKeyDictionary()
"""Result of the probe by model. None: the model's own code is needed. "none": it cannot run without the decoder."""


def find_head(model: torch.nn.Module) -> LinearHead | ModelHead | None:
    """Return the model's head; None if the logits cannot be computed from the decoder's hidden states.

    The first call for a model runs it on 8 tokens.
    """
    if model not in _found:
        _found[model] = _probe(model)
    found = _found[model]
    if found == "none":
        return None
    if found is None:
        return ModelHead(_after_decoder(model))
    head = _linear(model)
    return LinearHead(head.weight, head.bias, found)


def decoder_of(model: torch.nn.Module) -> torch.nn.Module:
    """The part of a causal LM that computes the hidden states."""
    decoder: torch.nn.Module = model.base_model  # type: ignore[assignment]
    return decoder


@torch.no_grad()
def _probe(model: torch.nn.Module) -> Transform | Literal["none"] | None:
    """Compare the model's logits with those of each supported head, at two scales of the hidden states."""
    decoder = getattr(model, "base_model", None)
    if decoder is None or decoder is model:
        return "none"
    device = next(model.parameters()).device
    tokens = torch.arange(PROBE_TOKENS, device=device)[None]
    hidden = decoder(input_ids=tokens, use_cache=False).last_hidden_state[0]
    after_decoder = _after_decoder(model)
    try:
        whole, replayed = model(input_ids=tokens, use_cache=False).logits[0], after_decoder(hidden)
    except Exception:  # the code of a model may raise anything when it runs without its decoder
        return "none"
    if not _equal(whole, replayed):
        return "none"
    layer = _linear(model)
    if not isinstance(layer, torch.nn.Linear):
        return None
    product = torch.nn.functional.linear(hidden, layer.weight, layer.bias)
    large = hidden * (PROBE_LOGIT / product.abs().max().clamp(min=torch.finfo(product.dtype).tiny))
    for transform in _transforms(model):
        head = LinearHead(layer.weight, layer.bias, transform)
        if all(_equal(head.logits(states), after_decoder(states)) for states in (hidden, large)):
            return transform
    return None


def _transforms(model: torch.nn.Module) -> Iterator[Transform]:
    yield Transform()
    model_config: Any = model.config
    config = model_config.get_text_config()
    for name, kind in CONFIGURED:
        if value := getattr(config, name, None):
            yield Transform(kind, value)


def _linear(model: torch.nn.Module) -> Any:
    causal: Any = model
    return causal.get_output_embeddings()


def _equal(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left, right)


def _after_decoder(model: torch.nn.Module) -> Callable[[Tensor], Tensor]:
    """The model's own forward code, with a decoder that returns its input. Parameters are shared with the model."""
    causal: Any = copy.copy(model)
    modules = dict(model._modules)
    modules[causal.base_model_prefix] = _GivenStates(decoder_of(model))
    causal.__dict__["_modules"] = modules

    def logits(hidden: Tensor) -> Tensor:
        result: Tensor = causal(inputs_embeds=hidden[None], use_cache=False).logits[0]
        return result

    return logits


class _GivenStates(torch.nn.Module):
    """A decoder whose hidden states are its input. Other attributes are those of the model's decoder."""

    def __init__(self, decoder: torch.nn.Module) -> None:
        super().__init__()
        self.__dict__["_decoder"] = decoder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_decoder"], name)

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> Any:
        """Return the input as hidden states."""
        return _Output(inputs_embeds)


class _Output:
    """A decoder's output. Every field but the hidden states is None: families read different fields."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor | None:
        return self.last_hidden_state if index == 0 else None

    def __getattr__(self, name: str) -> None:
        return None
