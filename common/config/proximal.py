"""The `learner.proximal` section: where the clip's anchor comes from. The text under a key is its documentation.

Three kinds are exact: each token's value is its old log-prob, under the version that sampled it. The others are
surrogates. `PROXIMAL_KINDS` says what the rest of the system needs to know about each kind.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from palimpsest.common.config.section import Positive, PositiveFloat, Section, Share

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


ExactConfig = SnapshotProximal | ReplicaProximal | InterruptionProximal
SurrogateConfig = (
    BypassProximal | CurrentRecomputeProximal | LoglinearProximal | LinearProximal | EwmaProximal | PpoEwmaAsyncProximal
)
ProximalConfig = Annotated[ExactConfig | SurrogateConfig, Field(discriminator="kind")]

RouteName = Literal["none", "snapshot", "replica", "interruption"]


@dataclass(frozen=True, slots=True)
class ProximalKind:
    """What the rest of the system needs to know about one kind of proximal."""

    section: type[Section]
    """Its configuration."""
    exact: bool = False
    """Whether its values are old log-probs."""
    route: RouteName = "none"
    """What the learner does to obtain old log-probs, besides training."""
    per_forward_pass: bool = False
    """Whether it is computed in each forward pass, so that no rule can see the values of a minibatch beforehand."""
    may_equal_behavior: bool = False
    """Whether a configuration can make it equal the behavior policy."""

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
"""`learner.proximal.kind` -> its row. A new kind needs its section in the union above, a row here, and its source."""
EXACT_KINDS = tuple(kind for kind, row in PROXIMAL_KINDS.items() if row.exact)
