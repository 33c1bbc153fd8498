"""Loading the model, and the log-prob that it assigns to each token."""

import torch
from torch import Tensor

from palimpsest.common.model_path import WHOLE, refuse_no_model, sentence
from palimpsest.common.user_error import UserError
from palimpsest.services.learner.batch.batching import PaddedBatch


def load_model(path: str, device: torch.device, attention: str) -> torch.nn.Module:
    """Load the causal LM of a folder or hub id, in bf16 and evaluation mode. Raises UserError."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    refuse_no_model(path)
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, attn_implementation=attention)
    except Exception as error:
        raise UserError(
            f"model.path: {path} is not a causal language model that can be loaded ({sentence(error)}): {WHOLE}"
        ) from None
    # Dropout stays off in training too: the current policy must be the one that sampled
    module: torch.nn.Module = model.to(device).eval()
    return module


def token_logprobs(model: torch.nn.Module, tokens: Tensor, temperatures: Tensor) -> tuple[Tensor, Tensor]:
    """Log-prob of each token given those before it, and the entropy of the distribution it was drawn from.

    tokens: [rows, length] int64, padded on the right (attention is causal: padding changes nothing before it).
    temperatures: [rows, 1] float32. Both results are [rows, length] float32, in nats; index t belongs to token t and is
    0 at t = 0. The shift between logits and tokens happens here and nowhere else.
    """
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float() / temperatures[:, :, None]
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(-1, tokens[:, 1:, None])[..., 0]
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return _from_second(chosen), _from_second(entropy)


def score_batch(
    model: torch.nn.Module, batch: PaddedBatch, device: torch.device, *, temperature: float | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of a padded batch: see `token_logprobs`. Gradients follow the caller's mode.

    device: the model's. temperature: of every row, in place of the batch's own.
    """
    if temperature is None:
        temperatures = torch.from_numpy(batch.temperatures).to(device)
    else:
        temperatures = torch.full((len(batch.rows), 1), temperature, device=device)
    return token_logprobs(model, torch.from_numpy(batch.tokens).to(device), temperatures)


def _from_second(values: Tensor) -> Tensor:
    return torch.nn.functional.pad(values, (1, 0))


def vocabulary_size(model: torch.nn.Module) -> int:
    """Number of token ids that the model has embeddings for."""
    embedding: torch.nn.Embedding = model.get_input_embeddings()  # type: ignore[operator]
    return embedding.num_embeddings
