"""Computes the state that the view shows from the observations of a run. Pure."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from palimpsest.common.messages import VersionApplied
from palimpsest.common.text import count, duration
from palimpsest.services.live.history_tail import TrainedVersions, VersionPace
from palimpsest.services.live.outages import NAMES, EndedOutage, Outage
from palimpsest.services.live.poller import RunObservation, ServiceObservation
from palimpsest.services.local.exit_reasons import Crash
from palimpsest.services.report.history_line import Line
from palimpsest.services.report.labels import in_words

RECENT = 5
"""Number of versions over which "recent" success and reward are averaged."""
SILENT_S = 10.0
"""A service that has not answered for longer is reported."""
STARTING_S = 30.0
"""A service that has not answered this long after its start is reported; services answer before they load models."""
STALLED_S, STALLED_PACES = 60.0, 10.0
"""The run makes no progress if the newest version is older than both: seconds, and multiples of the pace."""
SILENCE = " has not answered for "
LEARNER, STORE, GATEWAY = "learner", "snapshot_store", "env_gateway"
NOTHING: Mapping[str, float] = MappingProxyType({})
GONE = "ConnectError"
"""`trouble` of a service that does not listen."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The run as it begins. A person may change `versions` later."""

    run: str
    versions: int
    replicas: frozenset[str] = frozenset()
    """Names of the services that are replicas."""


@dataclass(frozen=True, slots=True)
class ServiceState:
    """A process and its activity, or the reason why it waits."""

    name: str
    doing: str
    waits: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """The values that the view shows."""

    plan: Plan
    elapsed_s: float
    setup: bool
    """Whether no worker can sample yet."""
    stopping: bool
    trained_versions: int
    services: tuple[ServiceState, ...]
    success: Sequence[float]
    """Success rate of each version's batch; `reward` likewise."""
    reward: Sequence[float]
    last: Line | None
    """The newest version's line."""
    left_s: float | None
    """Estimated seconds until the end; None without a pace, or while there is no progress."""
    still_s: float | None
    """Seconds since the newest version was trained, if the run makes no progress; else None."""
    outages: tuple[Outage, ...]
    past: tuple[EndedOutage, ...]
    """Outages that are over, oldest first."""
    wall: float
    """The current time in Unix seconds."""
    rollout_tokens_per_s: float | None
    learner_tokens_per_s: float | None
    in_flight: int
    waiting: int
    """Number of trajectories that arrived and are not trained on yet."""
    ledger: Mapping[str, Any]
    warnings: tuple[str, ...]
    evaluation: str = ""
    """The evaluation in progress, or the result of the newest."""


def state(
    plan: Plan,
    sight: RunObservation,
    *,
    now: float,
    started: float,
    crashes: Sequence[Crash] = (),
    starts_again_in: Mapping[str, float] = NOTHING,
    stopping: bool = False,
) -> State:
    """Return the state at `now`, by the clock of the replies. starts_again_in: dead process -> seconds to restart."""
    trained, last = sight.trained, sight.trained.last
    learner = _status(sight.services.get(LEARNER, ServiceObservation()))
    plan = replace(plan, versions=learner.get("versions", plan.versions))
    others = {LEARNER, STORE, GATEWAY} | plan.replicas
    workers = {name: seen for name, seen in sight.services.items() if name not in others}
    ending = stopping or trained.versions >= plan.versions
    ledger = learner.get("trajectories") or (last["trajectories"] if last else {})
    outages = () if ending else sight.outages
    steady = _steady(trained.newest, _disturbed(sight, crashes, workers.values()))
    still_s = None if ending else _still(trained, steady, outages, now=now, started=started)
    return State(
        plan=plan,
        elapsed_s=now - started,
        setup=not any(_status(seen).get("seconds") for seen in workers.values()),
        stopping=stopping,
        trained_versions=trained.versions,
        services=tuple(
            ServiceState(name, f"restarts in {math.ceil(starts_again_in[name])} s", True)
            if name in starts_again_in
            else _service(plan, name, seen, sight.applied, outages, crashes, now=now, ending=ending)
            for name, seen in sight.services.items()
        ),
        evaluation=str(learner.get("evaluation", "")),
        success=trained.success,
        reward=trained.reward,
        last=last,
        left_s=_left(plan, trained, steady) if still_s is None else None,
        still_s=still_s,
        outages=outages,
        past=sight.past,
        wall=sight.clock + now,
        rollout_tokens_per_s=_sampling_rate(workers.values()),
        learner_tokens_per_s=_training_rate(steady) if still_s is None else None,
        in_flight=sum(_status(seen).get("live", 0) for seen in workers.values() if seen.trouble != GONE),
        waiting=learner.get("waiting_trajectories", 0),
        ledger=ledger,
        warnings=(
            *_failures(sight, crashes, started=started),
            *(() if ending else _silences(sight, {outage.of for outage in outages}, now=now, started=started)),
            *_alerts(last),
            *_losses(ledger, trained),
        ),
    )


def subject(warning: str) -> str:
    """Return the part of a warning that stays while its numbers change: the alert rule or the service, else all of it.

    >>> subject("clip_idle: 9 versions"), subject("dropped 3 trajectories: 3 deadline")
    ('clip_idle', 'dropped 3 trajectories: 3 deadline')
    """
    if SILENCE in warning:
        return warning.partition(SILENCE)[0]
    rule, colon, _ = warning.partition(": ")
    return rule if colon and " " not in rule else warning


def ready_at(sight: RunObservation) -> float | None:
    """Return when the first worker could sample, by the clock of the replies; None before that."""
    times = [
        seen.last.at - seen.last.status["seconds"]
        for seen in sight.services.values()
        if seen.last is not None and seen.last.status.get("seconds")
    ]
    return min(times, default=None)


def recent(values: Sequence[float]) -> float | None:
    """Return the mean over the newest RECENT versions."""
    newest = values[-RECENT:]
    return sum(newest) / len(newest) if newest else None


def _status(seen: ServiceObservation) -> Mapping[str, Any]:
    return seen.last.status if seen.last is not None else {}


def _service(
    plan: Plan,
    name: str,
    seen: ServiceObservation,
    applied: Sequence[VersionApplied],
    outages: Sequence[Outage],
    crashes: Sequence[Crash],
    *,
    now: float,
    ending: bool,
) -> ServiceState:
    status, waiting = _status(seen), _status(seen).get("waiting_for")
    if seen.last is None:
        return ServiceState(name, "starting its process", True)
    if seen.trouble == GONE:
        restarts = any(crash.name == name and crash.at >= seen.last.at for crash in crashes)
        return ServiceState(name, "ended" if ending else _exited_text(restarts=restarts), not ending)
    if away := [NAMES.get(outage.of, outage.of) for outage in outages if name in outage.waiting]:
        return ServiceState(name, f"waits for an answer from {' and '.join(away)}", True)
    if waiting is not None:
        return ServiceState(name, "starting" if waiting == "the start" else f"waits for {waiting}", True)
    if name == LEARNER:
        doing = f"trains on the batch at version {status['version']}"
    elif name == STORE:
        doing = f"holds {count(status['versions'], 'version')}, {status['bytes'] / 2**20:.1f} MiB"
    elif name == GATEWAY:
        doing = "runs the environments"
    elif name in plan.replicas:
        doing = f"scores, {count(status['waiting'], 'trajectory', 'trajectories')} waiting"
    else:
        doing = f"samples with version {status['version']}, {status['live']} in flight" + _update(name, applied)
    age = now - seen.last.at
    return ServiceState(name, doing + (f" ({duration(age)} ago)" if age > SILENT_S else ""), False)


def _exited_text(*, restarts: bool) -> str:
    """The supervisor decides on a restart after the process exits, and lists the crash only if it restarts it."""
    return "its process exited; restarting it" if restarts else "its process exited"


def _update(worker: str, applied: Sequence[VersionApplied]) -> str:
    newest = next((a for a in reversed(applied) if a.worker == worker), None)
    return f", last update paused {1e3 * newest.pause_s:.0f} ms" if newest else ""


def _left(plan: Plan, trained: TrainedVersions, steady: Sequence[VersionPace]) -> float | None:
    pace = _pace(steady)
    return None if pace is None else max(0.0, pace * (plan.versions - trained.versions))


def _pace(steady: Sequence[VersionPace]) -> float | None:
    """Return the seconds per version."""
    return (steady[-1].seconds - steady[0].seconds) / (len(steady) - 1) if len(steady) > 1 else None


def _training_rate(steady: Sequence[VersionPace]) -> float | None:
    if len(steady) < 2:
        return None
    seconds = steady[-1].seconds - steady[0].seconds
    return sum(step.tokens for step in steady[1:]) / seconds if seconds > 0 else None


def _steady(newest: Sequence[VersionPace], disturbed: float) -> Sequence[VersionPace]:
    """Return the newest versions that one start of the learner trained without a disturbance."""
    first = max((i for i, step in enumerate(newest) if step.begins), default=0)
    return [step for step in newest[first:] if step.arrived > disturbed]


def _disturbed(sight: RunObservation, crashes: Sequence[Crash], workers: Iterable[ServiceObservation]) -> float:
    """Return the time of the last disturbance of the pace: an outage, a crash, or a worker that started to sample."""
    times = [past.ended - sight.clock for past in sight.past] + [crash.at for crash in crashes]
    times += [
        seen.last.at - seen.last.status["seconds"]
        for seen in workers
        if seen.last is not None and seen.last.status.get("seconds")
    ]
    return max(times, default=-math.inf)


def _still(
    trained: TrainedVersions, steady: Sequence[VersionPace], outages: Sequence[Outage], *, now: float, started: float
) -> float | None:
    since = now - max(trained.newest[-1].arrived if trained.newest else started, started)
    if outages:
        return max(0.0, since)
    pace = _pace(steady)
    return since if pace is not None and since > max(STALLED_S, STALLED_PACES * pace) else None


def _sampling_rate(workers: Iterable[ServiceObservation]) -> float | None:
    rates = []
    for seen in workers:
        if seen.last is None or seen.earlier is None or "sampled_tokens" not in seen.earlier.status:
            continue  # the worker is starting
        tokens = seen.last.status.get("sampled_tokens", -1) - seen.earlier.status["sampled_tokens"]
        if tokens >= 0 and seen.last.at > seen.earlier.at:
            rates.append(tokens / (seen.last.at - seen.earlier.at))
    return sum(rates) if rates else None


def _failures(sight: RunObservation, crashes: Sequence[Crash], *, started: float) -> list[str]:
    """Return warnings about processes: refused versions, then crashes, newest first."""
    found = [
        f"{refused.worker} refused version {refused.version}: canary error {refused.canary_error:.3g} nats, "
        f"reason in its log"
        for refused in sight.applied
        if not refused.accepted
    ]
    found += [crash.to_text(duration(crash.at - started)) for crash in reversed(crashes)]
    return found


def _silences(sight: RunObservation, outages: Collection[str], *, now: float, started: float) -> list[str]:
    """Return warnings about services that do not answer, except those shown as outages."""
    found = []
    for name, seen in sight.services.items():
        silent = now - (seen.last.at if seen.last else started)
        if name not in outages and silent > (
            STARTING_S if seen.last is None or seen.trouble == GONE else SILENT_S
        ):  # a start takes longer
            found.append(f"{name}{SILENCE}{duration(silent)}")
    return found


def _losses(ledger: Mapping[str, Any], trained: TrainedVersions) -> list[str]:
    """Return warnings about lost trajectories, skipped steps and the proximal policy."""
    found = []
    if dropped := ledger.get("dropped"):
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
        found.append(f"dropped {count(sum(dropped.values()), 'trajectory', 'trajectories')}: {reasons}")
    if dead := ledger.get("dead_lettered"):
        found.append(f"{dead:,} dead-lettered: for the reasons, run `palimpsest dead-letters list` with the run's file")
    if skipped := trained.skipped:
        found.append(f"skipped {count(skipped, 'optimizer step')}: the gradient was not finite")
    if trained.last is not None and not trained.last["exact"]:
        found.append(
            f"the proximal is {in_words(trained.last)}: its correction and update are not discrepancy and staleness "
            f"ratio"
        )
    return found


def _alerts(last: Line | None) -> list[str]:
    """Return the warnings of the alert rules at the newest version, without notices about the configuration."""
    alerts = last.get("alerts", ()) if last else ()
    unknown = last.get("unknown_alerts", ()) if last else ()
    found = [f"{alert['rule']}: {alert['says']}" for alert in alerts if alert["level"] == "warning"]
    return found + [f"{rule}: unknown; version {last['version']} has no value for it" for rule in unknown if last]
