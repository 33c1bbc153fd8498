"""Discrepancy corrections: the weight and the mask of each token. Pure, without gradients."""

from palimpsest.services.learner.corrections.combine import alone, correct, limits, overlap
from palimpsest.services.learner.corrections.ratios import LOG_RATIO_BOUND, log_ratio
from palimpsest.services.learner.corrections.rules import Correction, Gather, Limits, Rules

__all__ = [
    "LOG_RATIO_BOUND",
    "Correction",
    "Gather",
    "Limits",
    "Rules",
    "alone",
    "correct",
    "limits",
    "log_ratio",
    "overlap",
]
