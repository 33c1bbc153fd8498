"""Load the model, and compute the log-prob that it gives to each token."""

import re
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from palimpsest.common.config.learner import LOGPROB_CHUNK_TOKENS
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.model_limits import refuse_attention, refuse_layout
from palimpsest.common.model_path import WHOLE, refuse_no_model, sentence
from palimpsest.common.user_error import UserError
from palimpsest.services.learner.batch.batching import PaddedBatch
from palimpsest.services.learner.model.context import SlicedRows, context_of
from palimpsest.services.learner.model.device_batch import on_device, packed_rows
from palimpsest.services.learner.model.logprobs import Positions, checkpointed_logprobs, chunked_logprobs
from palimpsest.services.learner.model.lora import add_adapter
from palimpsest.services.learner.model.output_head import (
    CHUNK_ATTRIBUTE,
    PROBE_TOKENS,
    LinearHead,
    decoder_of,
    find_head,
)
from palimpsest.services.learner.model.packing import PACKED, PackedRows, packed_attention, use_packing
from palimpsest.services.learner.model.routing import replayed
from palimpsest.services.learner.sharding.sharded_model import ShardedModel

_NO_ATTENTION = re.compile(r"(\w+) does not support an attention implementation")
"""Beginning of the error of transformers for an attention that the architecture lacks."""


def load_model(
    path: str,
    device: torch.device,
    attention: str,
    *,
    logprob_chunk_tokens: int = LOGPROB_CHUNK_TOKENS,
    layout: str = "padded",
) -> torch.nn.Module:
    """Load the causal LM of a folder or hub id, in bf16 and evaluation mode. Raises UserError.

    layout: learner.layout.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    refuse_no_model(path)
    named = packed_attention(attention) if layout == PACKED else attention
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, attn_implementation=named)
    except Exception as error:
        if unsupported := _NO_ATTENTION.match(str(error)):
            raise UserError(
                f"model.attention is {attention}, which transformers does not support for the model in {path} "
                f'({unsupported[1]}). Set model.attention = "eager"'
            ) from None
        raise UserError(
            f"model.path: {path} is not a causal language model that can be loaded ({sentence(error)}): {WHOLE}"
        ) from None
    values = model.config.to_dict()
    refuse_attention(path, attention, values)
    refuse_layout(path, layout, attention, values)
    # Dropout stays off in training too: the current policy must be the one that sampled
    module: torch.nn.Module = model.to(device).eval()
    setattr(module, CHUNK_ATTRIBUTE, logprob_chunk_tokens)
    if layout == PACKED:
        use_packing(module)
    return module


def load_policy(config: RunConfig, device: torch.device) -> torch.nn.Module:
    """Load the model of the run, with a new adapter if it trains one. Raises UserError."""
    learner = config.learner
    model = load_model(
        config.model.path,
        device,
        config.model.attention,
        logprob_chunk_tokens=learner.logprob_chunk_tokens,
        layout=learner.layout,
    )
    if learner.lora.rank:
        add_adapter(model, learner.lora)
    return model


@torch.no_grad()
def checkpoint_activations(model: torch.nn.Module, *, every: int = 1) -> None:
    """Let every n-th layer compute its activations again in the backward pass. Raises UserError if the model cannot.

    transformers does so for layers in training mode only. Only the layers themselves are set to it, not their parts:
    dropout stays off. A model whose values change with it is refused.
    """
    tokens = torch.arange(PROBE_TOKENS, device=next(model.parameters()).device)[None]
    before = decoder_of(model)(input_ids=tokens, use_cache=False).last_hidden_state
    keep_layer_inputs(model, every=every)
    if not torch.equal(decoder_of(model)(input_ids=tokens, use_cache=False).last_hidden_state, before):
        raise UserError(
            f"learner.activation_checkpointing: {type(model).__name__} computes other values in training mode "
            f"(dropout in its layers); set it to false"
        )


def keep_layer_inputs(model: torch.nn.Module, *, every: int = 1) -> None:
    """Switch the checkpointing of transformers on, without a look at values. Raises UserError if there is none."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    causal: Any = model
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers or not causal.supports_gradient_checkpointing:
        raise UserError(
            f"learner.activation_checkpointing: {type(model).__name__} does not support it; set it to false"
        )
    causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in layers[::every]:
        layer.training = True


def token_logprobs(
    model: torch.nn.Module,
    tokens: Tensor,
    temperatures: Tensor,
    *,
    wanted: Tensor | None = None,
    rows: PackedRows | None = None,
) -> Tensor:
    """Return the log-prob of each token given the tokens before it: [rows, length] float32, nats.

    tokens: [rows, length] int64, padded on the right. Attention is causal: padding changes nothing before it.
    temperatures: [rows, 1] float32. wanted: bool [rows, length]; other tokens get 0. None: all tokens. rows: of a pass
    without padding; None: the pass is padded.

    Index t belongs to token t and is 0 at t = 0. The shift between logits and tokens happens only here.
    """
    return _score(model, tokens, temperatures, wanted, rows, entropy=False)[0]


def token_logprobs_and_entropy(
    model: torch.nn.Module,
    tokens: Tensor,
    temperatures: Tensor,
    *,
    wanted: Tensor | None = None,
    rows: PackedRows | None = None,
) -> tuple[Tensor, Tensor]:
    """`token_logprobs`, and the entropy of the distribution each token was drawn from: [rows, length] float32, nats."""
    return _score(model, tokens, temperatures, wanted, rows, entropy=True)


def score_batch(
    model: torch.nn.Module,
    batch: PaddedBatch,
    device: torch.device,
    *,
    temperature: float | None = None,
    wanted: NDArray[np.bool_] | None = None,
) -> Tensor:
    """Return log-probs of a padded batch, [rows, length] float32: see `token_logprobs`.

    Replays the batch's routes, if it has any. device: the model's. temperature: replaces the batch's temperatures.
    wanted: bool [rows, length]; default: the trainable tokens. Other tokens get 0. Gradients follow the caller's mode.
    """
    own = on_device(batch, device)
    temperatures = own.temperatures if temperature is None else torch.full_like(own.temperatures, temperature)
    chosen = own.mask if wanted is None else torch.from_numpy(wanted).to(device)
    rows = packed_rows(model, batch, device)
    with replayed(model, batch.routes, rows):
        return token_logprobs(model, own.tokens, temperatures, wanted=chosen, rows=rows)


def score_batch_and_entropy(model: torch.nn.Module, batch: PaddedBatch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return log-probs and entropies of a padded batch's trainable tokens: see `token_logprobs_and_entropy`.

    Replays the batch's routes, if it has any.
    """
    own = on_device(batch, device)
    rows = packed_rows(model, batch, device)
    with replayed(model, batch.routes, rows):
        return token_logprobs_and_entropy(model, own.tokens, own.temperatures, wanted=own.mask, rows=rows)


def _score(
    model: torch.nn.Module,
    tokens: Tensor,
    temperatures: Tensor,
    wanted: Tensor | None,
    rows: PackedRows | None,
    *,
    entropy: bool,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies (0 unless `entropy`), [rows, length]."""
    if isinstance(model, ShardedModel):
        return model.score(
            lambda causal: _score(causal, tokens, temperatures, wanted, rows, entropy=entropy),
            failed=lambda: (torch.zeros_like(temperatures * tokens), torch.zeros_like(temperatures * tokens)),
        )
    chunk: int = getattr(model, CHUNK_ATTRIBUTE, LOGPROB_CHUNK_TOKENS)
    positions = _positions(tokens, temperatures, wanted)
    arguments: dict[str, Any] = {"input_ids": tokens}
    context, sliced = context_of(model), None
    if rows is not None and context is not None:
        sliced = SlicedRows.of(rows.starts.diff().tolist(), tokens.shape[1], context, tokens.device)
        arguments, positions = sliced.arguments(tokens), positions.at(sliced.places)
        positions = positions._replace(wanted=positions.wanted & sliced.inside)
    elif rows is not None:
        arguments, positions = rows.arguments(tokens), positions.at(rows.places)
    head = find_head(model)
    if head is None:
        logits = model(**arguments, use_cache=False).logits.flatten(0, 1)
        values = checkpointed_logprobs(logits.__getitem__, positions, chunk, entropy=entropy)
    else:
        hidden = decoder_of(model)(**arguments, use_cache=False).last_hidden_state.flatten(0, 1)
        if isinstance(head, LinearHead):
            values = chunked_logprobs(head, hidden, positions, chunk, entropy=entropy)
        else:
            after_decoder = head.logits
            values = checkpointed_logprobs(lambda part: after_decoder(hidden[part]), positions, chunk, entropy=entropy)
    if sliced is not None:
        values = (sliced.whole(values[0]), sliced.whole(values[1]))
    if rows is not None:
        values = (rows.spread(values[0], tokens.numel()), rows.spread(values[1], tokens.numel()))
    logprobs, entropies = (torch.nn.functional.pad(each.view(tokens.shape)[:, :-1], (1, 0)) for each in values)
    return logprobs, entropies


def _positions(tokens: Tensor, temperatures: Tensor, wanted: Tensor | None) -> Positions:
    """The positions before the tokens. The last position of a row predicts a token outside the batch."""
    chosen = torch.ones_like(tokens, dtype=torch.bool) if wanted is None else wanted
    predicting = torch.nn.functional.pad(chosen[:, 1:], (0, 1))
    return Positions(
        targets=tokens.roll(-1, dims=1).flatten(),
        temperatures=temperatures.expand(tokens.shape).reshape(-1, 1),
        wanted=predicting.flatten(),
        scaled=bool((temperatures != 1).any()),
    )


def vocabulary_size(model: torch.nn.Module) -> int:
    """Number of token ids that the model has embeddings for."""
    if isinstance(model, ShardedModel):
        return vocabulary_size(model.causal)
    embedding: torch.nn.Embedding = model.get_input_embeddings()  # type: ignore[operator]
    return embedding.num_embeddings
