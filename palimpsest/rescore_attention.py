"""The attention of `palimpsest rescore` within packed rows, without the code of the services."""

from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

ROWS = "rescore_within_rows"
"""Name under which transformers knows it."""


def within_rows(attention: str) -> str:
    """Return the name of an attention that keeps packed rows apart. attention: model.attention.

    One call of `sdpa` for each row; on a GPU torch's attention for rows of unequal lengths.
    """
    if attention != "sdpa":
        return attention
    AttentionInterface.register(ROWS, attend_within_rows)
    return ROWS


def attend_within_rows(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: None, **options: Any
) -> tuple[torch.Tensor, None]:
    """Attention of transformers' interface. On a GPU that of the learner: another kernel rounds differently."""
    starts: torch.Tensor = options.pop("cu_seq_lens_q")
    if query.is_cuda:
        own, longest = [each[0].transpose(0, 1) for each in (query, key, value)], int(options["max_length_q"])
        out: Any = varlen_attn(
            own[0], own[1], own[2], starts, starts, longest, longest, scale=options["scaling"], window_size=(-1, 0),
            enable_gqa=query.shape[1] != key.shape[1], num_splits=1,
        )  # fmt: skip
        return out[None], None
    parts = zip(*(torch.split(each, starts.diff().tolist(), dim=2) for each in (query, key, value)), strict=True)
    return torch.cat([sdpa_attention_forward(module, *part, mask, **options)[0] for part in parts], dim=1), None
