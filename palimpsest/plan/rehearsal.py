"""Rehearses the passes of the learner on fake tensors and counts their bytes.

Fake tensors have shapes and types but no data, so the passes of any model can be rehearsed on any machine, with the
learner's own code and the code of transformers. Source: FakeTensorMode of PyTorch.

The rehearsed attention is fused (scaled_dot_product_attention without a mask) unless the run's is eager.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from palimpsest.common.config.learner import OptimizerConfig
from palimpsest.common.config.lora import LoraConfig
from palimpsest.common.model_path import WHOLE, refuse_no_model, sentence
from palimpsest.common.user_error import UserError
from palimpsest.plan.live_bytes import LiveBytes
from palimpsest.plan.published_tensors import published_tensors
from palimpsest.services.learner.model.logprobs import TokensWithGradient, float32_blocks, head_gradients
from palimpsest.services.learner.model.lora import add_adapter
from palimpsest.services.learner.model.output_head import LinearHead, Transform, decoder_of
from palimpsest.services.learner.model.packing import attend_in_rows
from palimpsest.services.learner.model.policy import keep_layer_inputs
from palimpsest.services.learner.model.trainable import TrainablePolicy
from palimpsest.services.learner.sharding.sharded_model import blocks_of

FUSED = "palimpsest_fused"
"""Name under which transformers knows the fused attention without a mask."""


@dataclass(frozen=True, slots=True)
class PassShape:
    """The largest pass of the learner."""

    rows: int
    length: int
    """Tokens of each row."""
    chunk: int
    """learner.logprob_chunk_tokens"""
    activation_checkpointing: int
    """One of so many layers is computed again in the backward pass; 0: none."""
    attention: str
    """model.attention"""
    packed: bool = False
    """learner.layout = "packed": the rows are in one sequence."""
    rest: int = 0
    """Tokens of one more row of a packed pass, shorter than the others."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """learner.lora"""
    context: int = 1
    """learner.context_parallel"""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [self.length] * self.rows + ([self.rest] if self.rest else [])

    @property
    def tokens(self) -> int:
        """Tokens of the pass."""
        return self.rows * self.length + self.rest

    @property
    def own_tokens(self) -> int:
        """Tokens of the pass that one rank computes: with learner.context_parallel two of 2 N chunks of each row."""
        if self.context == 1:
            return self.tokens
        return sum(2 * -(-length // (2 * self.context)) for length in self.lengths)


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Sizes of a model, in bytes unless a name says otherwise."""

    kind: str
    """Class name in transformers."""
    parameters: int
    """Number of parameters."""
    vocabulary: int
    """Number of token ids."""
    weights: int
    """Parameters and buffers in their own type."""
    trained: int
    """Number of trained parameters: all, or those of the adapter."""
    copied: int
    """What a copy for other weights adds: all weights, or the adapter and the buffers."""
    decoder_weights: int
    """Trained parameters of the decoder, without the head."""
    decoder_parameters: int
    """Number of trained parameters of the decoder."""
    largest_block: int
    """Number of parameters of the largest block, without an adapter; 0 if transformers names no blocks."""
    outside: int
    """Number of parameters outside the blocks: embedding, last norm, head."""
    decoder_frozen: int = 0
    """Parameters of the decoder that are not trained."""
    layers: int = 0
    """Number of layers."""
    key_bytes: int = 0
    """Keys and values of a token in one layer."""
    published: tuple[int, ...] = ()
    """Each tensor of a version; empty for a model with an adapter."""


@dataclass(frozen=True, slots=True)
class Rehearsed:
    """Bytes of tensors that the passes make, without weights, masters, gradients and moments."""

    model: ModelSize
    kept: int
    """Held at the end of the forward pass for the backward pass, with log-probs and entropies."""
    training: int
    """Maximum during forward and backward pass; at least `kept`."""
    scoring: int
    """Maximum during a forward pass without gradients."""
    step: int
    """Maximum during an optimizer step, which holds one float32 value for each parameter."""


def rehearse(path: str, shape: PassShape) -> Rehearsed:
    """Rehearse passes and step for the model of a folder or hub id. Reads its config.json, no weights.

    Raises UserError if transformers cannot build the model or the passes need values, which fake tensors do not have.
    """
    refuse_no_model(path)
    try:
        with _fake(shape):
            model = _model(path, shape)
            return _rehearse(model, shape)
    except UserError:
        raise
    except Exception as error:  # the code of a model may raise anything
        raise UserError(
            f"palimpsest plan cannot rehearse the passes of model.path {path} ({sentence(error)}): {WHOLE}. If the "
            f"model is whole, measure its memory with a run of one version"
        ) from None


@contextmanager
def _fake(shape: PassShape) -> Iterator[None]:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.utils import logging

    logging.set_verbosity_error()
    AttentionInterface.register(FUSED, partial(_within_rows, shape.lengths) if shape.packed else _fused)
    AttentionMaskInterface.register(FUSED, _no_mask)
    with FakeTensorMode():
        yield


def _fused(module: Any, query: Tensor, key: Tensor, value: Tensor, _: Any, **options: Any) -> Any:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, query, key, value, None, **options)


def _within_rows(
    lengths: list[int], module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **named: Any
) -> Any:
    """The attention of packed rows."""
    if query.shape[2] != sum(lengths):
        return _fused(module, query, key, value, None, **named)
    return attend_in_rows(module, query, key, value, lengths, **named), None


def _no_mask(*_: Any, **__: Any) -> None:
    """Return no mask: rows are padded on the right, and the attention is causal.

    While tensors are fake, transformers would build the mask that it leaves out in a real pass.
    """


def _model(path: str, shape: PassShape) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path)
    kind = "eager" if shape.attention == "eager" else FUSED

    def built() -> torch.nn.Module:
        model: torch.nn.Module = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation=kind
        )
        return model

    if not shape.lora.rank:
        return built().eval()
    with unset_fake_temporarily(), torch.device("meta"):  # peft converts its tensors, and fake ones cannot be
        model = built()
        add_adapter(model, shape.lora)
    _materialize(model)
    return model.eval()


def _materialize(model: torch.nn.Module) -> None:
    """Replace the tensors of the device meta by empty ones, floating-point parameters in bf16. Tied ones stay tied."""
    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, tensor in module.named_parameters(recurse=False):
            if id(tensor) not in made:
                empty = torch.empty(tensor.shape, dtype=torch.bfloat16)
                made[id(tensor)] = torch.nn.Parameter(empty, requires_grad=tensor.requires_grad)
            setattr(module, name, made[id(tensor)])
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _rehearse(model: torch.nn.Module, shape: PassShape) -> Rehearsed:
    causal: Any = model
    model_size, layer = _size(model), causal.get_output_embeddings()
    if not isinstance(layer, torch.nn.Linear):
        raise UserError(
            f"palimpsest plan knows models with a linear head; {model_size.kind} has {type(layer).__name__}. Measure "
            f"its memory with a run of one version"
        )
    head = LinearHead(layer.weight, layer.bias, Transform())
    if shape.activation_checkpointing:
        keep_layer_inputs(model, every=shape.activation_checkpointing)
    policy = TrainablePolicy(model, OptimizerConfig())
    known = [*model.parameters(), *model.buffers(), *policy.masters, *policy.gradients()]
    size = (1, shape.own_tokens) if shape.packed else (shape.rows, shape.length)
    tokens = torch.zeros(size, dtype=torch.int64)
    with LiveBytes(known) as scoring, torch.no_grad():
        _logprobs(model, head, tokens, shape.chunk, entropy=False)
    with LiveBytes(known) as training:
        values = _logprobs(model, head, tokens, shape.chunk, entropy=True)
        kept = training.now
        values.mean().backward()  # type: ignore[no-untyped-call]
        del values
    policy.optimizer.step()
    moments = [each for state in policy.optimizer.state.values() for each in state.values()]
    with LiveBytes([*known, *moments]) as step:
        policy.optimizer.step()
    return Rehearsed(model_size, kept, max(kept, training.peak), scoring.peak, step.peak)


def _size(model: torch.nn.Module) -> ModelSize:
    causal: Any = model
    values, own = causal.config.get_text_config(), list(model.parameters())
    model_type: torch.dtype = own[0].dtype
    heads = getattr(values, "num_attention_heads", None) or 1
    key_heads = getattr(values, "num_key_value_heads", None) or heads
    head_size = getattr(values, "head_dim", None) or getattr(values, "hidden_size", 0) // heads
    trained = [p for p in own if p.requires_grad]
    decoder = [p for p in decoder_of(model).parameters() if p.requires_grad]
    frozen = [p for p in own if not p.requires_grad]
    base = {id(p) for p in frozen or own}
    blocks = [sum(p.numel() for p in block.parameters() if id(p) in base) for block in _blocks(model)]
    return ModelSize(
        kind=type(model).__name__,
        parameters=sum(p.numel() for p in own),
        vocabulary=causal.get_input_embeddings().num_embeddings,
        weights=_bytes(own) + _bytes(list(model.buffers())),
        trained=sum(p.numel() for p in trained),
        copied=_bytes(trained) + _bytes(list(model.buffers())),
        decoder_weights=_bytes(decoder),
        decoder_parameters=sum(p.numel() for p in decoder),
        largest_block=max(blocks, default=0),
        outside=sum(p.numel() for p in frozen or own) - sum(blocks),
        decoder_frozen=_bytes([p for p in decoder_of(model).parameters() if not p.requires_grad]),
        layers=int(getattr(values, "num_hidden_layers", 0)),
        key_bytes=2 * model_type.itemsize * int(key_heads) * int(head_size),
        published=published_tensors(model) if len(trained) == len(own) else (),
    )


def _blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    try:
        return blocks_of(model)
    except UserError:
        return []


def _bytes(tensors: list[Any]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _logprobs(model: torch.nn.Module, head: LinearHead, tokens: Tensor, chunk: int, *, entropy: bool) -> Tensor:
    """Return the log-prob of each token, as policy.py computes it with every token wanted."""
    hidden = decoder_of(model)(input_ids=tokens, use_cache=False).last_hidden_state.flatten(0, 1)
    values: Tensor = _EveryToken.apply(hidden, head.weight, head.bias, tokens.flatten(), chunk, entropy)  # type: ignore[no-untyped-call]
    return values


def _logits(head: LinearHead, hidden: Tensor, chunk: int, *, entropy: bool) -> Tensor | None:
    """Make the logits of two chunks, and two float32 blocks of each: a block is made while the one before is live.

    Returns the logits of a single chunk.
    """
    for start in range(0, len(hidden), chunk)[:2]:
        logits = head.logits(hidden[start : start + chunk])
        for block in islice(float32_blocks(logits), 2):
            scaled = logits[block].float()
            all_logprobs = scaled.log_softmax(-1)
            if entropy:
                probs = torch.exp(all_logprobs, out=scaled)  # noqa: F841  # logprobs.py holds it until the next block
        if len(hidden) <= chunk:
            return logits
        del logits
    return None


class _EveryToken(torch.autograd.Function):
    """The tensors of logprobs.py. That code selects tokens by value, which fake tensors do not have."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int, entropy: bool
    ) -> Tensor:
        head = LinearHead(weight, bias, Transform())
        logprobs, entropies, normalizers = (torch.zeros(len(hidden)) for _ in range(3))
        logits = _logits(head, hidden, chunk, entropy=entropy)
        ctx.logits = logits if any(ctx.needs_input_grad) else None
        ctx.save_for_backward(hidden, weight, bias, targets, normalizers, entropies)
        ctx.chunk = chunk
        return logprobs

    @staticmethod
    def backward(ctx: Any, by_logprob: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normalizers, entropies = ctx.saved_tensors
        head = LinearHead(weight, bias, Transform())
        every = torch.zeros(len(hidden), dtype=torch.int64)
        tokens = TokensWithGradient(
            hidden=hidden[every],
            targets=targets[every],
            temperatures=None,
            normalizers=normalizers[every, None],
            by_logprob=by_logprob[every, None],
            by_entropy=None,
            entropies=entropies[every, None],
        )
        needs = ctx.needs_input_grad
        logits, ctx.logits = ctx.logits, None
        by_hidden, by_weight, by_bias = head_gradients(
            head, tokens, ctx.chunk, weight=needs[1], bias=needs[2], logits=logits
        )
        spread = torch.zeros_like(hidden).index_copy_(0, every, by_hidden.to(hidden.dtype))
        return spread, by_weight, by_bias, None, None, None
