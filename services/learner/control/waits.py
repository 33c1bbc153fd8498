"""Who waits for whom, since when. Pure."""

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from palimpsest.common.outages import ROOM
from palimpsest.services.learner.observability.worker_watch import WorkerState

SILENT_S = 10.0
"""A worker without a heartbeat for this long counts as silent; it sends one every two seconds."""


class Wait(BaseModel):
    """What one part of the run does or waits for."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    who: str
    does: str
    """What it does; empty while it waits."""
    waits_for: str
    """What it waits for; empty while it works."""
    on: str
    """The service that it waits for; empty if there is none."""
    seconds: float | None
    """How long it has waited; None if it does not, or that is unknown."""


def waits(
    *,
    waiting_for: str | None,
    waited_s: float | None,
    status: Mapping[str, Any],
    workers: Mapping[str, WorkerState],
    outages: Iterable[Mapping[str, Any]],
    now: float,
    unix_now: float,
) -> list[Wait]:
    """Return the learner, its oldest group, each worker, and each service that does not answer.

    waiting_for, waited_s: of the learner. status: the fields of its /v1/status. now: of the clock of the
    workers' states.
    """
    found = [_learner(waiting_for, waited_s)]
    if group := status.get("oldest_group"):
        found.append(
            Wait(
                who=f"oldest group {group}",
                does="",
                waits_for="its trajectories, or its turn in a batch",
                on="rollout, learner",
                seconds=status.get("oldest_group_s"),
            )
        )
    found += [_worker(name, state, now) for name, state in sorted(workers.items())]
    found += [
        Wait(
            who="learner",
            does="",
            waits_for=_waited_for(outage),
            on=outage["of"],
            seconds=round(max(0.0, unix_now - outage["since"]), 1),
        )
        for outage in outages
    ]
    return found


def _waited_for(outage: Mapping[str, Any]) -> str:
    if outage["of"] == ROOM:
        return f"{ROOM}: {outage['problem']}"
    return f"{outage['of']} at {outage['address']} to answer ({outage['problem']})"


def _learner(waiting_for: str | None, waited_s: float | None) -> Wait:
    if waiting_for is None:
        return Wait(who="learner", does="trains", waits_for="", on="", seconds=None)
    on = "rollout" if waiting_for.startswith("trajectories") else "people" if waiting_for.startswith("resume") else ""
    seconds = None if waited_s is None else round(waited_s, 1)
    return Wait(who="learner", does="", waits_for=waiting_for, on=on, seconds=seconds)


def _worker(name: str, state: WorkerState, now: float) -> Wait:
    silent = now - state.heard
    if silent > SILENT_S:
        return Wait(who=name, does="", waits_for="unknown: it sends no heartbeat", on=name, seconds=round(silent, 1))
    alive = state.alive
    if alive.live:
        does = f"samples {alive.live} trajectories with version {alive.version}"
        return Wait(who=name, does=does, waits_for="", on="", seconds=None)
    waits_for = "tasks" if alive.version >= 0 else "the first version"
    since = state.idle_since
    return Wait(
        who=name,
        does="",
        waits_for=waits_for,
        on="learner",
        seconds=None if since is None else round(now - since, 1),
    )
