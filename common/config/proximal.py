"""The `learner.proximal` section: the source of the proximal log-probs. docs/configuration.md is generated from it.

Three kinds are exact: the value of each token is its old log-prob, under the version that sampled it. The others are
surrogates. `PROXIMAL_KINDS` describes each kind to the rest of the system.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from palimpsest.common.config.section import Positive, PositiveFloat, Section, Share

MissingPolicy = Literal[
    "fail", "drop", "surrogate:bypass", "surrogate:current_recompute",
]  # fmt: skip


class SnapshotProximal(Section):
    """Exact: a second copy of the model loads the weights of each version and scores the tokens it sampled."""

    kind: Literal["snapshot"] = "snapshot"
    missing: MissingPolicy = "fail"
    """Policy for a version that the store does not hold: `fail` ends the run, `drop` leaves its tokens out of the loss,
    `surrogate:...` uses the log-probs of that surrogate. A metric counts these tokens."""
    prefetch: bool = False
    """Score arrived trajectories while their version is still current, to avoid loading it later. The batch layout
    differs then, so bf16 values differ by the rounding of the model at hand, which the canary measures: from 1e-3 nats
    for the example's model to 0.05 on average for SmolLM2-135M."""


class ReplicaProximal(Section):
    """Exact: other processes (`python -m palimpsest.services.learner.replica`) score trajectories as they arrive."""

    kind: Literal["replica"]
    wait_s: PositiveFloat = 60.0
    """Maximum wait of a batch for its scores, in seconds, counted from the first sign of a replica. After it `missing`
    applies."""
    missing: MissingPolicy = "fail"
    """Policy for tokens that no replica scored in time."""


class InterruptionProximal(Section):
    """Exact, without a second copy: workers stop before the weights change, and the learner first scores the tokens
    they sampled."""

    kind: Literal["interruption"]
    deadline_s: PositiveFloat = 5.0
    """Time for workers to stop, in seconds. The cut excludes workers that stop later."""
    hold_s: PositiveFloat | None = None
    """Time without a message from the learner, in seconds, after which workers that wait at a cut sample again: longer
    than the training and the publishing of a version. None: 120."""
    missing: MissingPolicy = "drop"
    """Policy for tokens that arrive too late to be scored."""


class BypassProximal(Section):
    """Surrogate: the behavior log-probs. The discrepancy ratio is 1, and the clip acts on the total ratio."""

    kind: Literal["bypass"]


class CurrentRecomputeProximal(Section):
    """Surrogate: the weights at the start of the training of a version, for tokens of every version."""

    kind: Literal["current_recompute"]


class LoglinearProximal(Section):
    """Surrogate: interpolation between behavior and current log-probs, weight (d - 1) / d at staleness d."""

    kind: Literal["interp_prox_loglinear"]


class LinearProximal(Section):
    """Surrogate: a mixture of the behavior and the current probability."""

    kind: Literal["linear_prox"]
    behavior_share: Share = 0.5
    """alpha: weight of the behavior policy in the mixture."""


class EwmaProximal(Section):
    """Surrogate: an exponential moving average of the weights of the versions, in float32."""

    kind: Literal["ewma_prox"]
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.8
    """beta: decay per version."""


class PpoEwmaAsyncProximal(Section):
    """Surrogate: a moving average with a decay that depends on the staleness, and with resets."""

    kind: Literal["ppo_ewma_async"]
    window: Annotated[int, Field(ge=0)] | Literal["max_staleness", "measured"] = "max_staleness"
    """W in beta = W / (W + 2); `measured`: beta = d / (1 + d) of the mean staleness d of trained tokens."""
    reset: Literal["off", "paper", "guarded"] = "paper"
    """When to reset the average. `paper`: to the current weights, when the share is below `threshold`. `guarded`: to
    the stored version whose age is the mean staleness, when the share is below `threshold` times its healthy level for
    `patience` versions in a row, at most once in `cooldown` versions."""
    trigger: Literal["active", "mask"] = "active"
    """Share that a reset depends on. `active`: tokens neither masked nor clipped. `mask`: tokens not masked, clipped or
    not."""
    threshold: Share = 0.9
    """tau: share below which a reset is due."""
    patience: Positive = 3
    """Consecutive versions below the threshold before a reset (guarded)."""
    cooldown: Positive = 8
    """Versions after a reset in which no other reset happens (guarded)."""


ExactConfig = SnapshotProximal | ReplicaProximal | InterruptionProximal
SurrogateConfig = (
    BypassProximal | CurrentRecomputeProximal | LoglinearProximal | LinearProximal | EwmaProximal | PpoEwmaAsyncProximal
)
ProximalConfig = Annotated[ExactConfig | SurrogateConfig, Field(discriminator="kind")]

RouteName = Literal["none", "snapshot", "replica", "interruption"]


@dataclass(frozen=True, slots=True)
class ProximalKind:
    """Properties of one kind of proximal, as the rest of the system needs them."""

    section: type[Section]
    """Configuration section of this kind."""
    exact: bool = False
    """Whether the values are old log-probs."""
    route: RouteName = "none"
    """How the learner obtains old log-probs."""
    per_forward_pass: bool = False
    """Whether each forward pass computes the values. The values of a minibatch are then unknown before its passes."""
    may_equal_behavior: bool = False
    """Whether a configuration exists in which the values equal the behavior log-probs."""

    @property
    def runs_replicas(self) -> bool:
        """Whether replica processes score trajectories."""
        return self.route == "replica"

    @property
    def cuts_workers(self) -> bool:
        """Whether workers stop and flush before the weights change."""
        return self.route == "interruption"


PROXIMAL_KINDS: dict[str, ProximalKind] = {
    "snapshot": ProximalKind(SnapshotProximal, exact=True, route="snapshot"),
    "replica": ProximalKind(ReplicaProximal, exact=True, route="replica"),
    "interruption": ProximalKind(InterruptionProximal, exact=True, route="interruption"),
    "bypass": ProximalKind(BypassProximal, may_equal_behavior=True),
    "current_recompute": ProximalKind(CurrentRecomputeProximal),
    "interp_prox_loglinear": ProximalKind(LoglinearProximal, per_forward_pass=True, may_equal_behavior=True),
    "linear_prox": ProximalKind(LinearProximal, per_forward_pass=True, may_equal_behavior=True),
    "ewma_prox": ProximalKind(EwmaProximal),
    "ppo_ewma_async": ProximalKind(PpoEwmaAsyncProximal),
}
"""`learner.proximal.kind` -> its properties. To add a kind, add its section to the union above, a row here, and its
source in services/learner."""
EXACT_KINDS = tuple(kind for kind, row in PROXIMAL_KINDS.items() if row.exact)
