"""Context parallelism: the ranks of a group share the tokens of each row (learner.context_parallel).

A row is cut into 2 N chunks of equal length, and rank i of N computes chunks i and 2 N - 1 - i: a late chunk, which
attends to many tokens, together with an early one. So the ranks do equally much. A row is extended to a multiple of 2 N
tokens; what is added comes after the row, where no token of the row attends to it.

Everything per token is computed by the rank that has the token. An attention layer gathers keys and values of the
group; the backward pass sends each rank its share of their gradients. The log-probs are gathered at the end, so every
rank has those of whole rows, and gives a gradient to its own tokens only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from palimpsest.services.learner.distributed import Context

CONTEXT_ATTRIBUTE = "context_group"
"""Attribute of a causal model: the Context of its passes."""
ROWS = "context_rows"
"""Argument of the attention: where the tokens of a pass are. The model passes it through."""


@dataclass(frozen=True, slots=True, eq=False)
class SlicedRows:
    """Which tokens of the rows of a pass this rank computes, and where those of the other ranks are."""

    context: Context
    places: Tensor
    """[own tokens] int64: place of each own token in the flattened padded rows; of the row's last token for an added
    one."""
    inside: Tensor
    """bool [own tokens]: False for added tokens."""
    positions: Tensor
    """[1, own tokens] int64: place of each own token in its row."""
    chunks: tuple[int, ...]
    """Tokens of a chunk of each row."""
    order: Tensor
    """[tokens of all ranks] int64: row after row, the index of each token in the gathered tensor."""
    inverse: Tensor
    """[tokens of all ranks] int64: index in `order` of each token of the gathered tensor."""
    kept: Tensor
    """[tokens] int64: `order` without the added tokens."""

    @classmethod
    def of(cls, lengths: Sequence[int], length: int, context: Context, device: torch.device) -> "SlicedRows":
        """lengths: tokens of each row; length: of the padded rows."""
        chunks = [-(-own // (2 * context.size)) for own in lengths]
        local = 2 * sum(chunks)
        places, inside, positions, order, valid = [], [], [], [], []
        start = 0
        for row, (own, chunk) in enumerate(zip(lengths, chunks, strict=True)):
            steps = np.arange(chunk, dtype=np.int64)
            for part in parts_of(context):
                at = part * chunk + steps
                inside.append(at < own)
                positions.append(np.minimum(at, own - 1))
                places.append(row * length + positions[-1])
            for part in range(2 * context.size):
                late = part >= context.size
                owner = 2 * context.size - 1 - part if late else part
                order.append(owner * local + start + late * chunk + steps)
                valid.append(part * chunk + steps < own)
            start += 2 * chunk
        everywhere, real = np.concatenate(order), np.concatenate(valid)
        arrays = (
            np.concatenate(places), np.concatenate(inside), np.concatenate(positions)[None],
            everywhere, np.argsort(everywhere), everywhere[real],
        )  # fmt: skip
        own_places, own_inside, own_positions, *indices = (torch.from_numpy(array).to(device) for array in arrays)
        return cls(context, own_places, own_inside, own_positions, tuple(chunks), *indices)

    def arguments(self, tokens: Tensor) -> dict[str, Any]:
        """Return the arguments of a model's forward pass. tokens: [rows, length] int64."""
        return {"input_ids": tokens.flatten()[self.places][None], "position_ids": self.positions, ROWS: self}

    def whole(self, values: Tensor) -> Tensor:
        """Return the values of all tokens [tokens] of the rows from those of each rank [own tokens]."""
        result: Tensor = _Values.apply(values, self)  # type: ignore[no-untyped-call]
        return result

    def all_keys(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of all tokens, row after row, added tokens included.

        [1, heads, own tokens, head size] -> [1, heads, tokens of all ranks, head size]
        """
        both = torch.cat([key, value], dim=-1)[0].transpose(0, 1)
        gathered: Tensor = _KeysOfAll.apply(both, self)  # type: ignore[no-untyped-call]
        keys, values = torch.split(gathered.transpose(0, 1)[None], [key.shape[-1], value.shape[-1]], dim=-1)
        return keys, values


def parts_of(context: Context) -> tuple[int, int]:
    """Return the numbers of a rank's two chunks of each row.

    >>> [parts_of(Context(rank, 2, None)) for rank in range(2)]
    [(0, 3), (1, 2)]
    """
    return context.rank, 2 * context.size - 1 - context.rank


def context_of(model: torch.nn.Module) -> Context | None:
    """Return the ranks that share the rows of the model's passes; None: each rank has whole rows."""
    context: Context | None = getattr(model, CONTEXT_ATTRIBUTE, None)
    return context


class _KeysOfAll(torch.autograd.Function):
    """Tensors of all ranks; each rank's gradients of them are added up where the tokens are."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, rows: SlicedRows) -> Tensor:
        ctx.rows = rows
        rows.context.check()
        return rows.context.gather(own)[rows.order]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        rows: SlicedRows = ctx.rows
        rows.context.check()
        return rows.context.sum_of_shares(gradient[rows.inverse]), None


class _Values(torch.autograd.Function):
    """Values of all ranks. Every rank computes the same loss of them, so each takes the gradient of its own values."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, rows: SlicedRows) -> Tensor:
        ctx.rows, ctx.count = rows, len(own)
        rows.context.check()
        return rows.context.gather(own)[rows.kept]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        rows: SlicedRows = ctx.rows
        everywhere = gradient.new_zeros(ctx.count * rows.context.size).index_copy(0, rows.kept, gradient)
        return everywhere.view(rows.context.size, -1)[rows.context.rank], None
