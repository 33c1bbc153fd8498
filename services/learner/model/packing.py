"""The packed layout: the rows of a pass one after another in one sequence, without padding (learner.layout).

Position ids start at 0 in each row, and a token attends to the tokens of its own row. The attention is registered with
transformers under a name of our own: on a CPU one causal call for each row, on a GPU torch's attention for rows of
unequal lengths. `flash_attention_2` reads the same arguments. No mask of tokens x tokens is made.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from palimpsest.common.user_error import UserError
from palimpsest.services.learner.model.context import ROWS, SlicedRows
from palimpsest.services.learner.model.context_attention import attend_across_ranks, causal_in_blocks
from palimpsest.services.learner.model.float32 import float32_forward
from palimpsest.services.learner.model.output_head import decoder_of

LAYOUT_ATTRIBUTE = "layout"
"""Attribute of a model: learner.layout. Copies of the model have it too."""
PACKED = "packed"
ATTENTION = "palimpsest_packed"
"""Name under which transformers knows the attention within rows. It has no function for masks, so none are made."""
PROBE_LENGTHS = (8, 5, 3)
PROBE_TOLERANCE = 1e-3
"""Largest difference of float32 hidden states between a packed row and the row alone, relative to the largest value.
Rounding gives 1e-6; a row that sees another one, or other positions, changes by its own size."""
MOST_HEAD_SIZE, HEAD_STEP, OLDEST_GPU = 256, 8, (8, 0)
"""Of torch's attention for rows of unequal lengths: largest head size, of which it takes multiples of 8, and the oldest
GPUs, by compute capability: Ampere."""
ONE_PART = 1
"""Parts of the keys that it adds up. By itself it chooses their number from the longest row and the number of rows, so
that the bits of a row would depend on the others."""
OTHER_VALUES = ("position_bias", "sliding_window", "softcap", "s_aux")
"""Arguments of an attention that give it other values than causal attention within rows."""


@dataclass(frozen=True, slots=True, eq=False)
class PackedRows:
    """Where the tokens of padded rows [rows, length] are in one sequence without padding."""

    places: Tensor
    """[tokens] int64: place of each token in the flattened padded rows."""
    positions: Tensor
    """[1, tokens] int64: place of each token in its row."""
    starts: Tensor
    """[rows + 1] int32: first token of each row, and the number of tokens."""
    longest: int
    """Tokens of the longest row."""

    @classmethod
    def of(cls, lengths: Sequence[int], length: int, device: torch.device) -> "PackedRows":
        """lengths: tokens of each row; length: of the padded rows.

        >>> rows = PackedRows.of([1, 3], 3, torch.device("cpu"))
        >>> rows.places.tolist(), rows.positions.tolist(), rows.starts.tolist()
        ([0, 3, 4, 5], [[0, 0, 1, 2]], [0, 1, 4])
        """
        positions = np.concatenate([np.arange(own, dtype=np.int64) for own in lengths])
        first = np.repeat(np.arange(len(lengths), dtype=np.int64) * length, lengths)
        starts = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
        places, inside, edges = (torch.from_numpy(array).to(device) for array in (first + positions, positions, starts))
        return cls(places, inside[None], edges, max(lengths))

    def arguments(self, tokens: Tensor) -> dict[str, Any]:
        """Return the arguments of a model's forward pass. tokens: [rows, length] int64."""
        return {
            "input_ids": tokens.flatten()[self.places][None],
            "position_ids": self.positions,
            "cu_seq_lens_q": self.starts,
            "cu_seq_lens_k": self.starts,
            "max_length_q": self.longest,
            "max_length_k": self.longest,
        }

    def spread(self, values: Tensor, size: int) -> Tensor:
        """Return values [tokens] at their places in flattened padded rows [size], 0 at padding."""
        return values.new_zeros(size).index_copy(0, self.places, values)


def packs_rows(model: torch.nn.Module) -> bool:
    """Whether the passes of a model are packed."""
    inner = getattr(model, "causal", model)  # of a sharded model
    return getattr(inner, LAYOUT_ATTRIBUTE, "") == PACKED


def packed_attention(attention: str) -> str:
    """Return the name of the attention with which transformers computes packed rows. attention: model.attention."""
    if attention != "sdpa":
        return attention
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, attend)
    return ATTENTION


def use_packing(model: torch.nn.Module) -> None:
    """Let the passes of a causal model be packed. Raises UserError if its values would not be those of each row."""
    refuse_other_values(model)
    setattr(model, LAYOUT_ATTRIBUTE, PACKED)


@torch.no_grad()
def refuse_other_values(model: torch.nn.Module) -> None:
    """Raise UserError unless packed rows have the hidden states of each row alone, in float32.

    Families with state besides attention, such as convolutions, or with positions of their own fail this.
    """
    device, decoder = next(model.parameters()).device, decoder_of(model)
    vocabulary: int = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    tokens = torch.zeros(len(PROBE_LENGTHS), max(PROBE_LENGTHS), dtype=torch.int64, device=device)
    for row, length in enumerate(PROBE_LENGTHS):
        tokens[row, :length] = (torch.arange(length, device=device) * (row + 2) + row + 1) % vocabulary
    rows = PackedRows.of(PROBE_LENGTHS, tokens.shape[1], device)
    family = type(model).__name__
    try:
        with float32_forward(model):
            packed = decoder(**rows.arguments(tokens), use_cache=False).last_hidden_state[0]
            alone = [
                decoder(input_ids=tokens[row : row + 1, :length], use_cache=False).last_hidden_state[0]
                for row, length in enumerate(PROBE_LENGTHS)
            ]
    except NotPackable as error:
        raise UserError(_refusal(family, str(error))) from None
    except Exception as error:  # the code of a model may raise anything
        raise UserError(_refusal(family, f"a packed pass fails: {type(error).__name__}: {error}")) from None
    expected = torch.cat(alone).float()
    if not float((packed.float() - expected).abs().max()) <= PROBE_TOLERANCE * float(expected.abs().max()):
        raise UserError(_refusal(family, "the values of a row depend on the rows before it in the sequence"))


class NotPackable(Exception):
    """Raised by the attention if it would compute something else than causal attention within rows."""


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of transformers' interface, [1, heads, tokens, head size] -> [1, tokens, heads, head size].

    Without `cu_seq_lens_q`: causal attention within each row of a rectangle, as `sdpa` computes it.
    """
    starts: Tensor | None = options.pop("cu_seq_lens_q", None)
    longest = options.pop("max_length_q", None)
    sliced: SlicedRows | None = options.pop(ROWS, None)
    if starts is None and sliced is None:
        return _whole(module, query, key, value, attention_mask, **options)
    if attention_mask is not None:
        raise NotPackable("the model makes an attention mask of its own")
    if named := [name for name in OTHER_VALUES if options.get(name) is not None]:
        raise NotPackable(f"its attention has {named[0]}")
    varlen = (
        query.is_cuda
        and query.shape[-1] == value.shape[-1]
        and has_varlen(query.dtype, query.shape[-1], torch.cuda.get_device_capability(query.device))
    )
    if sliced is not None:
        if varlen:
            causal = partial(_last_queries, scale=options.get("scaling"))
        else:
            causal = partial(causal_in_blocks, attention=lambda *tensors: _whole(module, *tensors, **options)[0])
        return attend_across_ranks(query, key, value, sliced, causal), None
    assert starts is not None
    if varlen:
        return _varlen(query, key, value, starts, int(longest or query.shape[2]), options.get("scaling")), None
    return attend_in_rows(module, query, key, value, starts.diff().tolist(), **options), None


def has_varlen(dtype: torch.dtype, head_size: int, capability: tuple[int, int]) -> bool:
    """Whether torch's attention for rows of unequal lengths computes this on a GPU of this compute capability.

    >>> has_varlen(torch.bfloat16, 128, (9, 0)), has_varlen(torch.float32, 128, (9, 0))
    (True, False)
    """
    half = dtype in (torch.bfloat16, torch.float16)
    return half and head_size <= MOST_HEAD_SIZE and head_size % HEAD_STEP == 0 and capability >= OLDEST_GPU


def attend_in_rows(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], **options: Any
) -> Tensor:
    """One causal call for each row. lengths: tokens of each row."""
    queries, keys, values = (torch.split(tensor, list(lengths), dim=2) for tensor in (query, key, value))
    outputs = [
        _whole(module, own_query, own_key, own_value, None, **options)[0]
        for own_query, own_key, own_value in zip(queries, keys, values, strict=True)
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _last_queries(query: Tensor, key: Tensor, value: Tensor, *, scale: float | None) -> Tensor:
    """Causal attention of queries that belong to the last keys."""
    from torch.nn.attention.varlen import varlen_attn

    sizes = query.shape[2], key.shape[2]
    first, second = (torch.tensor([0, size], dtype=torch.int32, device=query.device) for size in sizes)
    queries, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    gqa = query.shape[1] != key.shape[1]
    out = varlen_attn(
        queries, keys, values, first, second, sizes[0], sizes[1], scale=scale, window_size=(-1, 0), enable_gqa=gqa,
        num_splits=ONE_PART,
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out[None]


def _varlen(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, scale: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    queries, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    gqa = query.shape[1] != key.shape[1]
    out = varlen_attn(
        queries, keys, values, starts, starts, longest, longest, scale=scale, window_size=(-1, 0), enable_gqa=gqa,
        num_splits=ONE_PART,
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out[None]


def _whole(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    result: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return result


def _refusal(family: str, why: str) -> str:
    return f'learner.layout is "packed", which {family} does not support: {why}. Set learner.layout = "padded"'
