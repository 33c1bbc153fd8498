"""Forward and backward passes of the critic, beside those of the policy over the same micro-batch."""

import torch

from palimpsest.common.config.learner import LearnerConfig
from palimpsest.services.learner.losses.aggregate import Denominators
from palimpsest.services.learner.losses.objective import switch
from palimpsest.services.learner.model.critic import Critic
from palimpsest.services.learner.model.device_batch import on_device
from palimpsest.services.learner.model.failing_rows import may_be_of_row
from palimpsest.services.learner.sharding.pass_errors import completing
from palimpsest.services.learner.training.preparation import VersionInputs


class CriticPasses:
    """Adds to the critic's gradients. Does nothing without a critic."""

    def __init__(self, critic: Critic | None, config: LearnerConfig, device: torch.device) -> None:
        self._critic, self._config, self._device = critic, config, device

    def train(self, version: VersionInputs, place: int, denominators: Denominators) -> None:
        """Pass one micro-batch. Raises the error of a pass that fails."""
        if self._critic is None:
            return
        own = on_device(version.batches[place], self._device)
        loss = self._critic.loss(
            own.tokens,
            own.mask,
            version.prepared.returns[place],
            version.prepared.values[place],
            clip=switch(self._config.advantages.critic.clip),
            denominator=float(max(1, denominators.tokens)),
            rows=own.rows,
        )
        with completing(self._critic.model):
            loss.backward()  # type: ignore[no-untyped-call]

    def complete(self, version: VersionInputs, place: int, denominators: Denominators) -> None:
        """Take part in a pass of all ranks whose gradients are not used. Raises only errors that belong to no row."""
        try:
            self.train(version, place, denominators)
        except Exception as error:
            if not may_be_of_row(error):
                raise
