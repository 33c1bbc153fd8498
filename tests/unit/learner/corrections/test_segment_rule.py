"""The rule on unbroken runs of trainable tokens: its result, and the work it takes."""

from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from palimpsest.services.learner.corrections.ratios import log_mean, outside
from palimpsest.services.learner.corrections.sequence_rules import runs, segment_rule

INTERVAL = (0.8, 1.25)


def run_by_run(log_discrepancy: Tensor, usable: Tensor, mask: Tensor) -> Tensor:
    """The definition: the geometric mean of each run by itself. Turns x tokens operations."""
    number, removed = runs(mask), torch.zeros_like(mask)
    for run in range(int(number.max()) + 1 if number.numel() else 0):
        own = number == run
        removed |= own & outside(log_mean(log_discrepancy, usable & own), INTERVAL)
    return removed


@given(st.integers(0, 5), st.integers(0, 40), st.floats(0.0, 1.0), st.integers(0, 9999))
def test_the_removed_runs_are_those_of_the_definition(rows: int, length: int, share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, length, generator=generator) < share
    usable = mask & (torch.rand(rows, length, generator=generator) < 0.8)
    log_discrepancy = torch.where(usable, 0.5 * torch.randn(rows, length, generator=generator), 0.0)
    expected = run_by_run(log_discrepancy, usable, mask)
    assert torch.equal(segment_rule(log_discrepancy, usable, mask, INTERVAL), expected)


def test_a_mean_that_meets_a_bound_keeps_the_run() -> None:
    ratio = torch.log(torch.tensor([[1.25, 1.25, 0.0, 1.3]]))
    mask = torch.tensor([[True, True, False, True]])
    log_discrepancy = torch.where(mask, ratio, 0.0)
    assert segment_rule(log_discrepancy, mask, mask, INTERVAL).tolist() == [[False, False, False, True]]


class Work(TorchDispatchMode):
    """Number of operations, and of entries that they return."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        self.entries += sum(tensor.numel() for tensor in tree_leaves(result) if isinstance(tensor, Tensor))
        return result


@pytest.mark.parametrize("turns", [2, 64, 4096])
def test_the_work_does_not_grow_with_the_number_of_turns(turns: int) -> None:
    """8,192 tokens: as many operations for 4,096 turns as for one, and at most 40 entries a token."""
    tokens = 8192
    mask = torch.arange(tokens)[None] % (tokens // turns) != 0
    values = torch.zeros(1, tokens)
    counted = []
    for own in (mask, torch.ones_like(mask)):
        with Work() as work:
            segment_rule(values, own, own, INTERVAL)
        counted.append(work)
    assert counted[0].operations == counted[1].operations
    assert counted[0].entries <= 40 * tokens
