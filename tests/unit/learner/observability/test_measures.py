"""Measures of the complete batch: perplexities, chi-square, moments of the advantages, by hand."""

import math

import numpy as np
import pytest

from palimpsest.common.messages import TrajectoryFinished
from palimpsest.common.versions import Version
from palimpsest.services.learner.observability.token_statistics import MEASURES, Tokens, whole_batch_measures
from palimpsest.services.learner.observability.version_record import Batch, of_versions, round_for_json
from tests.records.builders import a_finished, a_segment


def tokens(behavior: list[float], proximal: list[float], advantages: list[float]) -> Tokens:
    count = len(behavior)
    return Tokens(
        staleness=np.zeros(count, dtype=np.int64),
        behavior=np.array(behavior),
        proximal=np.array(proximal),
        current=np.array(proximal),
        old=np.array(proximal),
        entropy=np.ones(count),
        advantages=np.array(advantages),
        masked=np.zeros(count, dtype=np.bool_),
        clipped=np.zeros(count, dtype=np.bool_),
    )


def test_perplexity_chi_square_and_advantages_by_hand() -> None:
    """Log-probs -1 and -2 of the engine, -1.1 and -1.8 of the learner: r = e^-0.1 and e^0.2."""
    found = whole_batch_measures(tokens([-1.0, -2.0], [-1.1, -1.8], [1.0, -2.0]))
    assert tuple(found) == MEASURES
    assert found["behavior_perplexity"] == pytest.approx(math.exp(1.5))
    assert found["proximal_perplexity"] == pytest.approx(math.exp(1.45))
    assert found["perplexity_difference"] == pytest.approx(math.exp(1.45) - math.exp(1.5))
    assert found["discrepancy_chi2"] == pytest.approx((math.exp(-0.2) + math.exp(0.4)) / 2 - 1)
    assert (found["advantage_mean"], found["advantage_deviation"]) == (-0.5, 1.5)


def test_without_a_token_with_ratios_the_measures_are_unknown() -> None:
    found = whole_batch_measures(tokens([math.nan], [-1.0], [math.nan]))
    assert all(math.isnan(value) for value in found.values())


def test_the_mean_length_by_the_staleness_of_the_oldest_token() -> None:
    records: list[TrajectoryFinished] = [
        a_finished(0, 0, tokens=8, segments=(a_segment(2, 4, 1), a_segment(4, 6, 3))),
        a_finished(0, 1, tokens=12, segments=(a_segment(2, 6, 1),)),
        a_finished(0, 2, tokens=6, segments=(a_segment(2, 6, 3),)),
    ]
    assert of_versions(Batch(Version(3), Version(4), records, []))["length"] == {"0": 6.0, "2": 10.0}


def test_floats_are_rounded_and_counts_are_exact() -> None:
    assert round_for_json({"a": [0.123456789, float("inf")], "b": 1234567.0, "n": 7654321, "s": "x", "none": None}) == {
        "a": [0.12346, None],
        "b": 1234567.0,
        "n": 7654321,
        "s": "x",
        "none": None,
    }
