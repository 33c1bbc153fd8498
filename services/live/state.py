"""A run at one moment, as a person wants to know it, from what the services said. Pure."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from common.messages import VersionApplied
from services.live.watch import Seen, Sight
from services.local.deaths import Crash
from services.report.folder import Line
from services.report.naming import in_words
from services.report.summary import begins

RECENT = 5
"""Versions over which "recent" success and reward are means."""
PACE = 20
"""Versions over which the learner's pace is measured."""
SILENT_S = 10.0
"""A service that gave no answer for longer is reported."""
STARTING_S = 120.0
"""So is one that has been starting for longer."""
LEARNER, STORE, GATEWAY = "learner", "snapshot_store", "env_gateway"
NOTHING: Mapping[str, float] = MappingProxyType({})
GONE = "ConnectError"
"""Trouble of a service that does not listen."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What stays the same over a run's time."""

    run: str
    versions: int
    canary_tolerance: float
    replicas: frozenset[str] = frozenset()
    """Names of the services that are replicas."""


@dataclass(frozen=True, slots=True)
class Service:
    """One process and what it does, or waits for."""

    name: str
    doing: str
    waits: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What the view shows."""

    plan: Plan
    elapsed_s: float
    setup: bool
    """Nothing can be sampled yet."""
    stopping: bool
    trained_versions: int
    services: tuple[Service, ...]
    success: tuple[float, ...]
    """Of each version's batch."""
    reward: tuple[float, ...]
    last: Line | None
    """The newest version's line."""
    left_s: float | None
    """Estimate; None while there is no pace to go by."""
    rollout_tokens_per_s: float | None
    learner_tokens_per_s: float | None
    in_flight: int
    waiting: int
    """Trajectories that arrived and are not trained on yet."""
    ledger: Mapping[str, Any]
    warnings: tuple[str, ...]


def state(
    plan: Plan,
    sight: Sight,
    *,
    now: float,
    started: float,
    crashes: Sequence[Crash] = (),
    starts_again_in: Mapping[str, float] = NOTHING,
    stopping: bool = False,
) -> State:
    """The state at `now`, by the clock of the sight's answers. starts_again_in: dead process -> seconds."""
    lines = sight.lines
    learner = _status(sight.services.get(LEARNER, Seen()))
    others = {LEARNER, STORE, GATEWAY} | plan.replicas
    workers = {name: seen for name, seen in sight.services.items() if name not in others}
    ending = stopping or len(lines) >= plan.versions
    ledger = learner.get("trajectories") or (lines[-1]["trajectories"] if lines else {})
    return State(
        plan=plan,
        elapsed_s=now - started,
        setup=not any(_status(seen).get("seconds") for seen in workers.values()),
        stopping=stopping,
        trained_versions=len(lines),
        services=tuple(
            Service(name, f"starts again in {math.ceil(starts_again_in[name])} s", True)
            if name in starts_again_in
            else _service(plan, name, seen, sight.applied, now=now, ending=ending)
            for name, seen in sight.services.items()
        ),
        success=tuple(line["successes"].count("1") / line["batch"] for line in lines),
        reward=tuple(line["reward"] for line in lines),
        last=lines[-1] if lines else None,
        left_s=_left(plan, lines),
        rollout_tokens_per_s=_sampling_rate(workers.values()),
        learner_tokens_per_s=_training_rate(lines),
        in_flight=sum(_status(seen).get("live", 0) for seen in workers.values() if seen.trouble != GONE),
        waiting=learner.get("waiting_trajectories", 0),
        ledger=ledger,
        warnings=(
            *_failures(plan, sight, crashes, now=now, started=started, ending=ending),
            *_alerts(lines),
            *_losses(ledger, lines),
        ),
    )


def subject(warning: str) -> str:
    """What it is about, while its numbers change from version to version: an alert's rule; of others, all of it.

    >>> subject("clip_idle: 9 versions"), subject("dropped 3 trajectories: 3 deadline")
    ('clip_idle', 'dropped 3 trajectories: 3 deadline')
    """
    rule, colon, _ = warning.partition(": ")
    return rule if colon and " " not in rule else warning


def ready_at(sight: Sight) -> float | None:
    """When the first worker could sample, by the clock of the answers; None before that."""
    times = [
        seen.last.at - seen.last.status["seconds"]
        for seen in sight.services.values()
        if seen.last is not None and seen.last.status.get("seconds")
    ]
    return min(times, default=None)


def recent(values: Sequence[float]) -> float | None:
    """Mean over the newest few versions."""
    newest = values[-RECENT:]
    return sum(newest) / len(newest) if newest else None


def duration(seconds: float) -> str:
    """For people.

    >>> duration(8.4), duration(130), duration(7260)
    ('8 s', '2 min 10 s', '2 h 1 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def count(number: int, thing: str, things: str | None = None) -> str:
    """A number of things.

    >>> count(1, "version"), count(1200, "version")
    ('1 version', '1,200 versions')
    """
    return f"{number:,} {thing if number == 1 else things or thing + 's'}"


def _status(seen: Seen) -> Mapping[str, Any]:
    return seen.last.status if seen.last is not None else {}


def _service(
    plan: Plan, name: str, seen: Seen, applied: Sequence[VersionApplied], *, now: float, ending: bool
) -> Service:
    status, waiting = _status(seen), _status(seen).get("waiting_for")
    if seen.last is None:
        return Service(name, "starting", True)
    if seen.trouble == GONE:
        return Service(name, "ended" if ending else "starting again", not ending)
    if waiting is not None:
        return Service(name, "starting" if waiting == "the start" else f"waits for {waiting}", True)
    if name == LEARNER:
        doing = f"trains on the batch at version {status['version']}"
    elif name == STORE:
        doing = f"holds {count(status['versions'], 'version')}, {status['bytes'] / 2**20:.1f} MiB"
    elif name == GATEWAY:
        doing = "plays the environments"
    elif name in plan.replicas:
        doing = f"scores, {count(status['waiting'], 'trajectory', 'trajectories')} waiting"
    else:
        doing = f"samples with version {status['version']}, {status['live']} in flight" + _update(name, applied)
    age = now - seen.last.at
    return Service(name, doing + (f" ({duration(age)} ago)" if age > SILENT_S else ""), False)


def _update(worker: str, applied: Sequence[VersionApplied]) -> str:
    newest = next((a for a in reversed(applied) if a.worker == worker), None)
    return f", last update paused {1e3 * newest.pause_s:.0f} ms" if newest else ""


def _left(plan: Plan, lines: Sequence[Line]) -> float | None:
    steady = _steady(lines)
    if len(steady) < 2:
        return None
    pace = (steady[-1]["seconds"] - steady[0]["seconds"]) / (len(steady) - 1)
    return float(max(0.0, pace * (plan.versions - len(lines))))


def _training_rate(lines: Sequence[Line]) -> float | None:
    steady = _steady(lines)
    if len(steady) < 2:
        return None
    seconds: float = steady[-1]["seconds"] - steady[0]["seconds"]
    tokens: int = sum(line["tokens"] for line in steady[1:])
    return tokens / seconds if seconds > 0 else None


def _steady(lines: Sequence[Line]) -> Sequence[Line]:
    """The newest lines that one start wrote."""
    newest = lines[-PACE - 1 :]
    first = max((i for i, line in enumerate(newest) if begins(line)), default=0)
    return newest[first:]


def _sampling_rate(workers: Iterable[Seen]) -> float | None:
    rates = []
    for seen in workers:
        if seen.last is None or seen.earlier is None:
            continue
        tokens = seen.last.status["sampled_tokens"] - seen.earlier.status["sampled_tokens"]
        if tokens >= 0 and seen.last.at > seen.earlier.at:
            rates.append(tokens / (seen.last.at - seen.earlier.at))
    return sum(rates) if rates else None


def _failures(
    plan: Plan, sight: Sight, crashes: Sequence[Crash], *, now: float, started: float, ending: bool
) -> list[str]:
    """What went wrong with processes, newest first."""
    found = [
        f"{refused.worker} refused version {refused.version}: the canary is {refused.canary_error:.3g} nats off, "
        f"{plan.canary_tolerance} are allowed"
        for refused in sight.applied
        if not refused.accepted
    ]
    found += [crash.told(duration(crash.at - started)) for crash in reversed(crashes)]
    if ending:
        return found
    for name, seen in sight.services.items():
        silent = now - (seen.last.at if seen.last else started)
        if silent > (STARTING_S if seen.last is None or seen.trouble == GONE else SILENT_S):  # a start takes its time
            found.append(f"{name} has not answered for {duration(silent)}")
    return found


def _losses(ledger: Mapping[str, Any], lines: Sequence[Line]) -> list[str]:
    """What went wrong with trajectories."""
    found = []
    if dropped := ledger.get("dropped"):
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
        found.append(f"dropped {count(sum(dropped.values()), 'trajectory', 'trajectories')}: {reasons}")
    if dead := ledger.get("dead_lettered"):
        found.append(
            f"{dead:,} dead-lettered: `python -m services.learner dead-letters list` with the run's file says why"
        )
    if skipped := sum(line["skipped"] for line in lines):
        found.append(f"left out {count(skipped, 'optimizer step')}: the gradient was not finite")
    if lines and not lines[-1]["exact"]:
        found.append(
            f"the proximal is {in_words(lines[-1])}: its correction and update are not discrepancy and staleness ratio"
        )
    return found


def _alerts(lines: Sequence[Line]) -> list[str]:
    """What is wrong at the newest version by the alert rules; notices about the configuration are not among them."""
    alerts = lines[-1].get("alerts", ()) if lines else ()
    return [f"{alert['rule']}: {alert['says']}" for alert in alerts if alert["level"] == "warning"]
