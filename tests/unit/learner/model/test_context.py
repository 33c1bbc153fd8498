"""Rows that are cut for the ranks of a group, and the attention of a part of a row."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from palimpsest.services.learner.distributed import Context
from palimpsest.services.learner.model import context_attention
from palimpsest.services.learner.model.context import SlicedRows
from palimpsest.services.learner.model.context_attention import causal_in_blocks
from tests.learner_parts.models import CPU


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("lengths", [[1], [2, 3], [7, 40, 5]])
def test_the_ranks_have_each_token_once_and_equally_many(size: int, lengths: list[int]) -> None:
    ranks = [SlicedRows.of(lengths, max(lengths), Context(rank, size, None), CPU) for rank in range(size)]
    assert len({len(rows.places) for rows in ranks}) == 1
    everywhere = torch.cat([rows.places for rows in ranks])
    real = torch.cat([rows.places[rows.inside] for rows in ranks])
    expected = [row * max(lengths) + t for row, length in enumerate(lengths) for t in range(length)]
    assert sorted(real.tolist()) == expected
    for rows in ranks:
        assert everywhere[rows.kept].tolist() == expected
        assert rows.order[rows.inverse].tolist() == list(range(len(everywhere)))
        assert rows.positions[0].tolist() == [place % max(lengths) for place in rows.places.tolist()]


def test_a_late_chunk_is_computed_together_with_an_early_one() -> None:
    places = [SlicedRows.of([8], 8, Context(rank, 2, None), CPU).places.tolist() for rank in range(2)]
    assert places == [[0, 1, 6, 7], [2, 3, 4, 5]]


@pytest.mark.parametrize("queries", [1, 5, 12])
@pytest.mark.parametrize("entries", [1, 30, 1 << 20])
def test_the_last_queries_attend_to_the_keys_up_to_their_own(
    queries: int, entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context_attention, "MASK_ENTRIES", entries)
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(1, 2, 12, 8, generator=generator).requires_grad_() for _ in range(3)]
    parts = [values.detach().clone().requires_grad_() for values in whole]

    def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None).transpose(1, 2)

    expected = scaled_dot_product_attention(*whole, is_causal=True)[:, :, -queries:]
    found = causal_in_blocks(parts[0][:, :, -queries:], parts[1], parts[2], plain).transpose(1, 2)
    assert torch.allclose(found, expected, atol=1e-6)
    expected.square().sum().backward()  # type: ignore[no-untyped-call]
    found.square().sum().backward()  # type: ignore[no-untyped-call]
    for own, other in zip(parts, whole, strict=True):
        assert own.grad is not None
        assert other.grad is not None
        assert torch.allclose(own.grad, other.grad, atol=1e-5)
