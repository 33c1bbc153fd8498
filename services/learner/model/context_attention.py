"""Causal attention of this rank's tokens to the tokens of all ranks of a group (model/context.py)."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from palimpsest.services.learner.model.context import SlicedRows, parts_of

MASK_ENTRIES = 1 << 22
"""Queries x keys of a mask: queries are computed in blocks, so that no mask grows with the square of a row."""
Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Attention of [1, heads, tokens, head size] with a mask; causal without one. Returns [1, tokens, heads, head size]."""
Causal = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention of queries that belong to the last keys, each to the keys up to its own."""


def attend_across_ranks(query: Tensor, key: Tensor, value: Tensor, rows: SlicedRows, causal: Causal) -> Tensor:
    """Return the attention of this rank's tokens. [1, heads, own tokens, head size] -> [1, own tokens, heads, size].

    All ranks of the group must call it, and make the backward pass together.
    """
    keys, values = rows.all_keys(key, value)
    outputs, own, first = [], 0, 0
    for chunk in rows.chunks:
        for part in parts_of(rows.context):
            seen = slice(first, first + (part + 1) * chunk)
            outputs.append(causal(query[:, :, own : own + chunk], keys[:, :, seen], values[:, :, seen]))
            own += chunk
        first += 2 * rows.context.size * chunk
    return torch.cat(outputs, dim=1)


def causal_in_blocks(query: Tensor, key: Tensor, value: Tensor, attention: Attention) -> Tensor:
    """`Causal` by an attention that takes a mask. The backward pass makes the masks again."""
    queries, keys = query.shape[2], key.shape[2]
    if queries == keys:
        return attention(query, key, value, None)
    size = max(1, MASK_ENTRIES // keys)
    outputs = []
    for start in range(0, queries, size):
        block = query[:, :, start : start + size]
        before = keys - queries + start
        seen = slice(0, before + block.shape[2])
        compute = partial(_masked, before=before, attention=attention)
        if torch.is_grad_enabled():
            arguments = (block, key[:, :, seen], value[:, :, seen])
            outputs.append(checkpoint(compute, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            outputs.append(compute(block, key[:, :, seen], value[:, :, seen]))
    return torch.cat(outputs, dim=1)


def _masked(query: Tensor, key: Tensor, value: Tensor, *, before: int, attention: Attention) -> Tensor:
    """before: keys before the one of the first query."""
    places = torch.arange(key.shape[2], device=key.device)
    mask = places <= (before + places[: query.shape[2], None])
    return attention(query, key, value, mask[None, None])
