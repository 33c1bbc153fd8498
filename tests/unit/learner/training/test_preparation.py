"""What is computed before the first step of a batch."""

import dataclasses
from pathlib import Path

import pytest
import torch

from palimpsest.services.learner.batch.batching import pad
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.training.preparation import prepare_batch
from palimpsest.services.learner.training.state import TrainingState
from tests.learner_parts.models import CurrentModel
from tests.records.builders import a_learner, a_row
from tests.unit.learner.model.test_critic import a_critic


@pytest.mark.thorough
def test_the_return_of_a_truncated_trajectory_continues_with_the_value_of_its_last_state(starting_model: Path) -> None:
    """With gamma and lambda 1 every return is the reward, plus that value if the trajectory reached a limit."""
    critic = a_critic(starting_model, head=0.5)
    ended = a_row("ended", [5, 40, 120, 7], [-1, 0, 0, -1], advantage=1.0)
    limited = dataclasses.replace(a_row("limited", [5, 40, 120, 7], [-1, 0, 0, -1], advantage=1.0), truncated=True)
    config = a_learner(advantages={"kind": "gae", "gamma": 1.0, "lam": 1.0})
    state = TrainingState(CurrentModel(critic.trainable.model), critic=critic)
    (returns,) = prepare_batch(state, [pad([ended, limited])], config, ProcessGroup(), torch.device("cpu")).returns
    last = float(critic.final_values(torch.tensor([[5, 40, 120, 7]]), torch.tensor([4]))[0])
    assert abs(last) > 1e-3
    assert returns[0, 1:3].tolist() == pytest.approx([1.0, 1.0], abs=1e-5)
    assert returns[1, 1:3].tolist() == pytest.approx([1.0 + last] * 2, rel=2e-2, abs=1e-5)
