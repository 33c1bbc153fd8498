"""Run folders: a new one for a new run, the old one for a run that goes on."""

import datetime
from pathlib import Path
from typing import Any

from common.config import Invocation, load
from common.config.schema import RunConfig
from common.config.show import show
from common.files import write
from common.refusal import Refusal

SAVED = "run.toml"
IDENTITY = (
    "run.seed",
    "model.path",
    "model.chat_template_options",
    "tasks",
    "sampling",
    "bus",
    "learner.groups_per_batch",
    "learner.minibatches",
    "learner.max_staleness",
    "learner.recipe",
    "learner.proximal",
    "learner.discrepancy",
    "learner.loss",
    "learner.advantages",
    "learner.vcpo",
    "learner.optimizer",
)
"""Keys that make a run what it is: with other values it would be another run. The rest may change on --resume."""


def settle(invocation: Invocation, *, now: datetime.datetime) -> tuple[RunConfig, Path]:
    """The run to start or to go on with, and its saved file, which every service reads. Raises Refusal."""
    config = invocation.config
    if invocation.resume is not None:
        config = _resumed(config, invocation.resume)
    else:
        name = config.run.id or f"{now:%Y%m%d-%H%M%S}"
        config = config.model_copy(update={"run": config.run.model_copy(update={"id": name})})
        if (config.run.home / SAVED).exists():
            raise Refusal(
                f"{config.run.home} is another run already: go on with it by --resume {config.run.home}, or choose "
                f"another --run.id"
            )
    saved = config.run.home / SAVED
    write(saved, show(config).encode())
    return config, saved


def _resumed(config: RunConfig, home: Path) -> RunConfig:
    if not (home / SAVED).is_file():
        raise Refusal(f"--resume {home}: that is no run's folder (it has no {SAVED})")
    before = load([str(home / SAVED)], {}, program="").config
    differences = [
        f"  {key}: {old!r} there, {new!r} here"
        for prefix in IDENTITY
        for key, old, new in _differences(prefix, _at(before, prefix), _at(config, prefix))
    ]
    if differences:
        raise Refusal(
            f"--resume {home}: that run has another configuration:\n" + "\n".join(differences) + "\n"
            "Give those values, or leave RUN.toml out to go on with the run's own, or start a new run"
        )
    return config.model_copy(update={"run": config.run.model_copy(update={"id": before.run.id, "folder": home.parent})})


def _at(config: RunConfig, key: str) -> Any:
    value: Any = config.model_dump()
    for part in key.split("."):
        value = value[part]
    return value


def _differences(key: str, old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            difference
            for name in sorted(old.keys() | new.keys())
            for difference in _differences(f"{key}.{name}", old.get(name), new.get(name))
        ]
    return [] if old == new else [(key, old, new)]
