"""Advantage estimators. Pure (docs/paper.md, "advantages"; docs/algorithms has a page for each method)."""

from palimpsest.services.learner.advantages.group_level import ESTIMATORS, dr_grpo, group_advantages, grpo, rloo
from palimpsest.services.learner.advantages.token_level import (
    TOKEN_KINDS,
    Estimated,
    MicroBatchRewards,
    token_advantages,
)

__all__ = [
    "ESTIMATORS",
    "TOKEN_KINDS",
    "Estimated",
    "MicroBatchRewards",
    "dr_grpo",
    "group_advantages",
    "grpo",
    "rloo",
    "token_advantages",
]
