"""Old log-probs that came with the rows are used unchanged; the current version is scored here; the rest is missing."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from palimpsest.common.config.proximal import MissingPolicy
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import Row, pad
from palimpsest.services.learner.model.policy import token_logprobs
from palimpsest.services.learner.old_logprobs.missing import MissingCounter, MissingReason
from palimpsest.services.learner.old_logprobs.precomputed_source import PrecomputedSource
from palimpsest.services.learner.proximal.types import Exact, Patched
from tests.learner_parts.models import CPU, load
from tests.records.builders import a_row

NOW = Version(3)


@pytest.fixture(scope="module")
def model(starting_model: Path) -> torch.nn.Module:
    return load(starting_model)


def source(
    model: torch.nn.Module, missing: MissingPolicy = "fail", misses: MissingCounter | None = None
) -> PrecomputedSource:
    return PrecomputedSource(
        model, CPU, max_tokens=10_000, missing=missing, why=MissingReason.NOT_SCORED, misses=misses or MissingCounter()
    )


def with_old(row: Row, old: list[float]) -> Row:
    return replace(row, old=np.array(old, dtype=np.float32))


def rows(*, complete: bool = True) -> list[Row]:
    """Versions 1 and 3 (the current version); -0.125 is the received value for version 1."""
    nan, last = float("nan"), -0.5 if complete else float("nan")
    return [
        with_old(a_row("a", [5, 6, 7, 8, 9], [-1, 1, 1, 3, 3]), [nan, -0.125, -0.25, nan, nan]),
        with_old(a_row("b", [5, 6, 7], [-1, 1, 1], behavior=[0, -2.0, -3.0]), [nan, -0.375, last]),
        a_row("c", [9, 8, 7, 6], [-1, 3, -1, 3]),
    ]


def scored(model: torch.nn.Module, *chosen: Row) -> torch.Tensor:
    batch = pad(chosen)
    with torch.no_grad():
        return token_logprobs(model, torch.from_numpy(batch.tokens), torch.from_numpy(batch.temperatures))


def test_known_values_stay_and_the_current_version_is_scored(model: torch.nn.Module) -> None:
    misses = MissingCounter()
    proximal = source(model, misses=misses).proximal([pad(rows())], NOW)
    assert isinstance(proximal, Exact)
    (values,) = proximal.logprobs
    own = scored(model, rows()[0], rows()[2])  # the pass has only rows with tokens of the current version
    assert values[0].tolist() == [0.0, -0.125, -0.25, *own[0, 3:5].tolist()]
    assert values[1].tolist() == [0.0, -0.375, -0.5, 0.0, 0.0]
    assert values[2].tolist() == [0.0, float(own[1, 1]), 0.0, float(own[1, 3]), 0.0]
    assert not misses.tokens


def test_18_4_at_staleness_0_values_equal_the_models_bit_for_bit(model: torch.nn.Module) -> None:
    batch = pad([a_row("a", [5, 6, 7, 8], [-1, 3, 3, 3]), a_row("b", [5, 9, 9], [-1, 3, 3])])
    (values,) = source(model).proximal([batch], NOW).logprobs
    mask = torch.from_numpy(batch.mask)
    assert torch.equal(values[mask], scored(model, *batch.rows)[mask])
    assert (values[~mask] == 0).all()


def test_rows_with_all_values_known_need_no_forward_pass() -> None:
    class Untouchable(torch.nn.Module):
        def forward(self, *_: object, **__: object) -> None:
            raise AssertionError("a forward pass")

    known = with_old(a_row("a", [5, 6, 7], [-1, 1, 3]), [0.0, -0.5, -0.75])
    (values,) = source(Untouchable()).proximal([pad([known])], NOW).logprobs
    assert values.tolist() == [[0.0, -0.5, -0.75]]


def test_a_probability_that_underflowed_is_known(model: torch.nn.Module) -> None:
    """-inf is the old log-prob; it is never replaced, and the loss masks and counts it as not finite."""
    known = with_old(a_row("a", [5, 6, 7], [-1, 1, 1]), [0.0, -0.5, -np.inf])
    proximal = source(model).proximal([pad([known])], NOW)
    assert isinstance(proximal, Exact)
    assert proximal.logprobs[0].tolist() == [[0.0, -0.5, -np.inf]]


def test_a_missing_score_stops_the_run(model: torch.nn.Module) -> None:
    with pytest.raises(UserError, match="no replica scored 1 token in 1 trajectory sampled by version 1") as error:
        source(model).proximal([pad(rows(complete=False))], NOW)
    assert error.value.code is ExitCode.UNAVAILABLE


def test_18_15_a_token_without_a_score_is_dropped_and_counted(model: torch.nn.Module) -> None:
    misses = MissingCounter()
    proximal = source(model, "drop", misses).proximal([pad(rows(complete=False))], NOW)
    assert isinstance(proximal, Exact)
    assert proximal.absent is not None
    assert proximal.absent[0].nonzero().tolist() == [[1, 2]]
    assert proximal.logprobs[0][1].tolist() == [0.0, -0.375, 0.0, 0.0, 0.0]
    assert misses.tokens == {("not_scored", "drop"): 1}


def test_18_15_a_token_without_a_score_gets_a_marked_surrogate(model: torch.nn.Module) -> None:
    misses = MissingCounter()
    bypassed = source(model, "surrogate:bypass", misses).proximal([pad(rows(complete=False))], NOW)
    recomputed = source(model, "surrogate:current_recompute", misses).proximal([pad(rows(complete=False))], NOW)
    assert isinstance(bypassed, Patched)
    assert isinstance(recomputed, Patched)
    assert float(bypassed.logprobs[0][1, 2]) == -3.0
    assert float(recomputed.logprobs[0][1, 2]) == float(scored(model, rows()[1])[0, 2])
    for patched in (bypassed, recomputed):
        assert patched.patched[0].nonzero().tolist() == [[1, 2]]
        assert float(patched.logprobs[0][1, 1]) == -0.375
    assert misses.tokens == {("not_scored", "surrogate:bypass"): 1, ("not_scored", "surrogate:current_recompute"): 1}
