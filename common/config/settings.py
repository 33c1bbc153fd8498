"""Keys that may change while a run is running, and the check of their new values. Pure.

Every other key is fixed when a run begins. docs/control.md lists when each key takes effect.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from pydantic import ValidationError

from palimpsest.common.config.load import problems_of
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.config.schema_keys import expected_type, unknown_key


class AppliesFrom(StrEnum):
    """When a new value takes effect."""

    SAFE_POINT = "when no version is in training"
    """While the learner waits for a batch, or between two versions."""
    NEXT_VERSION = "next version"
    """With the next version that is trained: in all of its minibatches, on all ranks."""
    NEXT_GROUPS = "groups offered from then on"
    WORKERS = "at once, in each worker"


LOG_LEVEL, MAX_LIVE = "logs.level", "rollout.max_live"
VERSIONS, MAX_STALENESS = "learner.versions", "learner.max_staleness"
"""Keys that workers or replicas use too."""
_NEXT_VERSION = (
    VERSIONS,
    MAX_STALENESS,
    "learner.record",
    "learner.canary_trajectories",
    "learner.audit.fraction",
    "learner.checkpoint.every",
    "learner.checkpoint.keep",
    "learner.optimizer.lr",
    "learner.optimizer.warmup",
    "learner.optimizer.decay",
    "learner.optimizer.end_share",
    "learner.optimizer.max_grad_norm",
    "learner.loss.clip_low",
    "learner.loss.clip_high",
    "learner.loss.dual_clip",
    "learner.loss.entropy",
    "learner.discrepancy.weight_low",
    "learner.discrepancy.weight_high",
    "learner.discrepancy.band",
    "learner.discrepancy.tokens",
    "learner.discrepancy.geometric",
    "learner.discrepancy.sequence",
    "learner.discrepancy.segment",
    "learner.discrepancy.veto",
    "learner.discrepancy.difference",
    "learner.discrepancy.m2",
)
SETTINGS: Mapping[str, AppliesFrom] = {
    **dict.fromkeys(_NEXT_VERSION, AppliesFrom.NEXT_VERSION),
    LOG_LEVEL: AppliesFrom.SAFE_POINT,
    MAX_LIVE: AppliesFrom.WORKERS,
    "sampling.temperature": AppliesFrom.NEXT_GROUPS,
    "tasks.time_limit_s": AppliesFrom.NEXT_GROUPS,
}
"""Key -> when its new value takes effect."""
Settings = dict[str, Any]


class SettingRefused(ValueError):
    """A new value cannot be used. The error text says why."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        """`unknown_setting`, `needs_new_run` or `invalid_value`."""


def with_settings(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """Return the configuration with new values of some keys. Raises SettingRefused."""
    if not values:
        return config
    for name in values:
        _check_key(name)
    changed = config.model_dump()
    for name, value in values.items():
        *sections, last = name.split(".")
        at = changed
        for section in sections:
            at = at[section]
        at[last] = value
    try:
        return RunConfig.model_validate(changed)
    except ValidationError as error:
        raise SettingRefused("invalid_value", "\n".join(problems_of(error))) from None


def values_of(config: RunConfig) -> Settings:
    """Return the value of every key that may change."""
    return {name: value_of(config, name) for name in SETTINGS}


def value_of(config: RunConfig, name: str) -> Any:
    """Return the value of a key."""
    found: Any = config
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _check_key(name: str) -> None:
    key = tuple(name.split("."))
    if name in SETTINGS:
        return
    if expected_type(key) is None:
        raise SettingRefused("unknown_setting", unknown_key(key))
    raise SettingRefused(
        "needs_new_run",
        f"{name} is fixed when a run begins, because trajectories in flight and stored versions depend on it: "
        f"start a new run. GET /v1/settings lists the keys that may change",
    )
