"""For all tests of the gateway's parts."""

import pytest

from tests.unit.env_gateway.fakes import ManualClock


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()
