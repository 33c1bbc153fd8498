"""The `learner.proximal` section: where the clip's anchor comes from. The text under a key is its documentation.

Three kinds are exact: the values are old log-probs, each token's under its own version. The others are surrogates.
"""

from typing import Annotated, Literal

from pydantic import Field

from palimpsest.common.config.section import Positive, PositiveFloat, Section, Share

EXACT = ("snapshot", "replica", "interruption")
"""Kinds whose values are old log-probs."""
MissingPolicy = Literal[
    "fail", "drop", "surrogate:bypass", "surrogate:current_recompute",
]  # fmt: skip


class SnapshotProximal(Section):
    """Exact: a second copy of the model takes on each version's weights and scores its tokens."""

    kind: Literal["snapshot"] = "snapshot"
    missing: MissingPolicy = "fail"
    """When the store no longer has a version: end the run, leave its tokens out of the loss, or use a surrogate's
    log-probs for them. Counted and shown in each case."""
    prefetch: bool = False
    """Score what has arrived while its version is still the current one, so that it need not be loaded later. The
    values are then those of another batch layout, up to 1e-3 nats off in bf16."""


class ReplicaProximal(Section):
    """Exact: other processes (`python -m palimpsest.services.learner.replica`) score trajectories as they arrive."""

    kind: Literal["replica"]
    wait_s: PositiveFloat = 60.0
    """A batch waits at most so long for its scores, from the first replica heard of on; then `missing` decides."""
    missing: MissingPolicy = "fail"
    """What becomes of tokens that no replica scored in time."""


class InterruptionProximal(Section):
    """Exact, without any copy: workers stop before the weights change, and what they have sampled is scored first."""

    kind: Literal["interruption"]
    deadline_s: PositiveFloat = 5.0
    """A worker that has not stopped by then is left out of the cut."""
    missing: MissingPolicy = "drop"
    """What becomes of tokens that came too late to be scored."""


class BypassProximal(Section):
    """Surrogate: the behavior log-probs. No discrepancy is seen, and the clip acts on the total ratio."""

    kind: Literal["bypass"]


class CurrentRecomputeProximal(Section):
    """Surrogate: the weights at the start of the version's training, for tokens of whatever version."""

    kind: Literal["current_recompute"]


class LoglinearProximal(Section):
    """Surrogate: between behavior and current log-probs, by (d - 1) / d at staleness d."""

    kind: Literal["interp_prox_loglinear"]


class LinearProximal(Section):
    """Surrogate: a mixture of the behavior and the current probability."""

    kind: Literal["linear_prox"]
    behavior_share: Share = 0.5
    """alpha: the behavior policy's share of the mixture."""


class EwmaProximal(Section):
    """Surrogate: a moving average of the versions' weights, in float32."""

    kind: Literal["ewma_prox"]
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.8
    """beta, for each version."""


class PpoEwmaAsyncProximal(Section):
    """Surrogate: a moving average whose age follows the staleness, and that can be reset."""

    kind: Literal["ppo_ewma_async"]
    window: Annotated[int, Field(ge=0)] | Literal["max_staleness", "measured"] = "max_staleness"
    """W in beta = W / (W + 2); `measured`: beta = d / (1 + d) of the mean staleness d of trained tokens."""
    reset: Literal["off", "paper", "guarded"] = "paper"
    """`paper`: whenever the active share is below `threshold`. `guarded`: when it stays below `threshold` times its own
    healthy level for `patience` versions, and not again within `cooldown`."""
    threshold: Share = 0.9
    """tau."""
    patience: Positive = 3
    """Versions in a row (guarded)."""
    cooldown: Positive = 8
    """Versions after a reset without another (guarded)."""


ProximalConfig = Annotated[
    SnapshotProximal
    | ReplicaProximal
    | InterruptionProximal
    | BypassProximal
    | CurrentRecomputeProximal
    | LoglinearProximal
    | LinearProximal
    | EwmaProximal
    | PpoEwmaAsyncProximal,
    Field(discriminator="kind"),
]
