"""Prometheus metrics of sessions, in the gateway and in a worker that steps environments itself."""

from functools import cache

from prometheus_client import Counter, Gauge, Histogram

from palimpsest.common.metrics import REGISTRY, SECONDS

CREATED = Counter("palimpsest_gateway_sessions_created", "Sessions started", ["environment"], registry=REGISTRY)
ENDED = Counter(
    "palimpsest_gateway_sessions_ended", "Sessions ended, by status", ["environment", "status"], registry=REGISTRY
)
LIVE = Gauge("palimpsest_gateway_live_sessions", "Live sessions", ["environment"], registry=REGISTRY)
STEPS = Counter(
    "palimpsest_gateway_steps", "Steps applied; a repeated request counts once", ["environment"], registry=REGISTRY
)
STEP_SECONDS = Histogram(
    "palimpsest_gateway_step_seconds", "Time of a step of the environment", ["environment"], buckets=SECONDS,
    registry=REGISTRY,
)  # fmt: skip
RESET_SECONDS = Histogram(
    "palimpsest_gateway_reset_seconds", "Time to start a session", ["environment"], buckets=SECONDS, registry=REGISTRY
)
REPLAYS = Counter(
    "palimpsest_gateway_replays", "Repeated requests answered with the stored reply", ["request"], registry=REGISTRY
)  # request: create, step
REFUSED = Counter(
    "palimpsest_gateway_refused", "Requests refused, by error code", ["code"], registry=REGISTRY
)  # code: capacity, draining, step_conflict, step_gap, gone, unauthorized, ...
FAILURES = Counter(
    "palimpsest_gateway_environment_failures", "Sessions that failed in the environment", ["environment", "code"],
    registry=REGISTRY,
)  # fmt: skip
TOOL_ERRORS = Counter(
    "palimpsest_gateway_tool_errors", "Tool calls that failed, by cause", ["environment", "cause"], registry=REGISTRY
)  # cause: malformed, environment
LIMITED = Counter(
    "palimpsest_gateway_sessions_limited", "Sessions that ended at a limit", ["environment", "limit"], registry=REGISTRY
)  # limit: turns, calls, output_bytes
REWARD = Histogram(
    "palimpsest_gateway_reward", "Rewards of sessions", ["environment"],
    buckets=(0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99, 1.0), registry=REGISTRY,
)  # fmt: skip


class Of:
    """The metrics of one environment; cached, because a lookup by label is slow."""

    def __init__(self, environment: str) -> None:
        self.created = CREATED.labels(environment)
        self.live = LIVE.labels(environment)
        self.steps = STEPS.labels(environment)
        self.step_seconds = STEP_SECONDS.labels(environment)
        self.reset_seconds = RESET_SECONDS.labels(environment)
        self.malformed = TOOL_ERRORS.labels(environment, "malformed")
        self.tool_errors = TOOL_ERRORS.labels(environment, "environment")
        self.reward = REWARD.labels(environment)


of = cache(Of)
