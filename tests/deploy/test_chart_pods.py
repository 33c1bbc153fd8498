"""What the pods of the chart need to end in time and to leave a reason."""

from collections.abc import Callable

import pytest

from palimpsest.services.learner.replica import worker as replica
from palimpsest.services.rollout import worker as rollout
from tests.deploy.conftest import VALUES, Rendered

ENDING_S = 5
"""Seconds for what follows a worker's drain: the engine closes, the process ends."""


@pytest.fixture(params=VALUES)
def rendered(request: pytest.FixtureRequest, render: Callable[..., Rendered]) -> Rendered:
    return render(request.param)


def test_a_pod_has_the_time_that_its_program_takes_to_drain(rendered: Rendered) -> None:
    """A worker waits DRAIN_S for its trajectories, and as long again to publish them."""
    needed = {"rollout": 2 * rollout.DRAIN_S + ENDING_S, "replica": replica.DRAIN_S + ENDING_S}
    for name, spec, container in rendered.containers():
        grace = spec.get("terminationGracePeriodSeconds", 30)
        assert grace >= needed.get(container["name"], 0), name


def test_a_container_that_fails_shows_the_end_of_its_log(rendered: Rendered) -> None:
    """A refusal writes its own sentence; a crash leaves only the log."""
    for name, _spec, container in rendered.containers():
        assert container["terminationMessagePolicy"] == "FallbackToLogsOnError", name
