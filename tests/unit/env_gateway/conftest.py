"""Fixtures of the gateway's unit tests."""

import pytest

from tests.unit.env_gateway.fakes import ManualClock


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()
